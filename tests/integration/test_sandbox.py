"""dify-sandbox as the kit builds and runs it: what code in workflows can do, and what it can't."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pwd
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import kit_egress, kit_subids

from .conftest import REPO, build_part, free_port, python312, running

USER = f"kit-test-{os.getpid()}"
KEY = "key-of-the-test"
MODULES = REPO / "deploy/plugins/module_utils"


def lacking() -> str:
    """What this machine has not got to build and run a sandbox; the kit's preflight names the same."""
    commands = [name for name in ("go", "gcc", "pkg-config", "newuidmap", "git") if not shutil.which(name)]
    if commands:
        return f"no {', '.join(commands)} on the PATH; apt-get install gcc git pkg-config uidmap gives all but go"
    if subprocess.run(["pkg-config", "--exists", "libseccomp"], check=False).returncode:
        return "libseccomp's headers are missing; apt-get install libseccomp-dev"
    if subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True, check=False).returncode:
        return "this machine refuses user namespaces"
    return ""


def python_for_all() -> str:
    """An interpreter that every user may read: root's own is of no use to another user."""
    for path in map(Path, [python312(str(Path(sys.executable).with_name("uv"))), "/usr/bin/python3"]):
        if path.is_file() and all(parent.stat().st_mode & 1 for parent in path.resolve().parents):
            return str(path)
    pytest.skip("no Python on this machine that every user may read; apt-get install python3")


class Sandbox:
    """A running one, reached as Dify's API reaches it."""

    def __init__(self, port: int, egress: int) -> None:
        self.port, self.egress = port, egress

    def post(self, language: str, code: str, key: str = KEY) -> tuple[int, dict[str, Any]]:
        body = {"language": language, "code": code, "preload": "", "enable_network": True}
        headers = {"X-Api-Key": key, "Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self.port}/v1/sandbox/run"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, {}

    def run(self, language: str, code: str) -> str:
        """What the code prints."""
        status, answer = self.post(language, code)
        assert (status, answer["code"], answer["data"]["error"]) == (200, 0, ""), answer
        return str(answer["data"]["stdout"]).strip()

    def tried(self, expression: str) -> str:
        """The value of a Python expression, or the name of the error that it ends with."""
        failed = "except OSError as error:\n    print(type(error).__name__)"
        return self.run("python3", f"import os, socket\ntry:\n    print({expression})\n{failed}")


@pytest.fixture(scope="module")
def user() -> Iterator[pwd.struct_passwd]:
    """An ordinary user with subordinate ids: a throw-away one where the tests run as root."""
    if os.getuid():
        me = pwd.getpwuid(os.getuid())
        if kit_subids.find(Path("/etc/subuid").read_text(), me.pw_name, me.pw_uid) is None:
            pytest.skip(f"{me.pw_name} has no range of ids in /etc/subuid; root can give one")
        yield me
        return
    subprocess.run(["useradd", "--create-home", USER], check=True)
    try:
        yield pwd.getpwnam(USER)
    finally:
        subprocess.run(["userdel", "--remove", USER], check=True, capture_output=True)


@pytest.fixture(scope="module")
def sandbox(smokescreen: Path, user: pwd.struct_passwd) -> Iterator[Sandbox]:
    if reason := lacking():
        pytest.skip(reason)
    release = yaml.safe_load((REPO / "deploy/releases/1.16.0.yml").read_text())["sandbox"]
    tag, repository = release["version"], release["repository"]
    asked = ["git", "ls-remote", "--exit-code", repository, f"refs/tags/{tag}"]
    if subprocess.run(asked, capture_output=True, check=False).returncode:
        pytest.skip(f"{repository} does not answer; a mirror set up with git's insteadOf will do")
    python = python_for_all()
    root = Path(tempfile.mkdtemp(prefix="kit-sandbox-", dir="/var/tmp"))
    root.chmod(0o755)
    try:
        # A mirror may have other commits; the deploy tests hold them against the release file.
        source = {"repository": repository, "tag": tag, "commit": release["commit"], "verify": "warn"}
        built = build_part(root, "sandbox", python, **source)
        for name in ("kit_sandbox.py", "kit_subids.py"):
            shutil.copy(MODULES / name, root)
        (root / "mount").mkdir()
        port, egress = free_port(), free_port()
        command = [python, f"{root}/kit_sandbox.py", f"--port={port}", f"--egress={egress}", f"--root={root}/mount"]
        command += [f"--binary={built}/main", f"--python={built}/venv/bin/python", f"--node={built}/node"]
        command += ["--ca=/etc/ssl/certs/ca-certificates.crt", "--timeout=15"]
        identity: dict[str, Any] = (
            {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
        )
        with (
            running(kit_egress.command(str(smokescreen), egress, ["127.0.0.2"]), egress),
            (root / "log").open("w") as log,
        ):
            process = subprocess.Popen(
                command, env={"PATH": "/usr/bin:/bin", "API_KEY": KEY}, stdout=log, stderr=log, cwd="/", **identity
            )
            try:
                wait_for_health(port, process, root / "log")
                yield Sandbox(port, egress)
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0, (root / "log").read_text()
        left = [line for line in Path("/proc").glob("[0-9]*/cmdline") if is_sandbox_of(user, line)]
        assert left == [], "the sandbox's processes outlived a stop"
    finally:
        shutil.rmtree(root)


def is_sandbox_of(user: pwd.struct_passwd, line: Path) -> bool:
    with contextlib.suppress(OSError):
        return line.stat().st_uid == user.pw_uid and line.read_bytes().startswith(b"/sandbox/main")
    return False


def wait_for_health(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def test_python_and_its_packages(sandbox: Sandbox) -> None:
    code = "import json, re, math, datetime, jinja2, requests, httpx\nprint(json.dumps({'answer': 6 * 7}))"
    assert json.loads(sandbox.run("python3", code)) == {"answer": 42}


def test_javascript(sandbox: Sandbox) -> None:
    assert sandbox.run("nodejs", "console.log(JSON.stringify({answer: [1, 2, 3].map(n => n * 14)}))") == (
        '{"answer":[14,28,42]}'
    )


def test_a_template_as_dify_sends_it(sandbox: Sandbox) -> None:
    code = """
import jinja2
import json
from base64 import b64decode

def main(**inputs):
    template_code = b64decode('SGVsbG8ge3sgbmFtZSB9fQ==').decode('utf-8')
    template = jinja2.Template(template_code)
    return template.render(**inputs)

inputs_obj = json.loads(b64decode('eyJuYW1lIjogIkRpZnkifQ==').decode('utf-8'))
output = main(**inputs_obj)
result = f'''<<RESULT>>{output}<<RESULT>>'''
print(result)
"""
    assert sandbox.run("python3", code) == "<<RESULT>>Hello Dify<<RESULT>>"


def test_a_stranger_is_refused(sandbox: Sandbox) -> None:
    assert sandbox.post("python3", "print(1)", key="wrong")[0] == 401


def test_code_that_never_ends_is_ended(sandbox: Sandbox) -> None:
    _, answer = sandbox.post("python3", "while True: pass")
    assert "timeout" in answer["data"]["error"]
    assert sandbox.run("python3", "print(1)") == "1"


def test_it_is_a_user_of_its_own(sandbox: Sandbox) -> None:
    assert 10000 <= int(sandbox.tried("os.getuid()")) < 11000


def test_it_sees_none_of_the_hosts_files(sandbox: Sandbox, user: pwd.struct_passwd) -> None:
    secret = Path(user.pw_dir) / "site.env"
    secret.write_text("SECRET_KEY='x'")
    secret.chmod(0o644)
    for path in (str(secret), "/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/1/environ", "/root", "/sys"):
        assert sandbox.tried(f"os.stat({path!r})") == "FileNotFoundError", path
    assert set(sandbox.tried("*os.listdir('/etc')").split()) <= {
        "hosts",
        "localtime",
        "nsswitch.conf",
        "resolv.conf",
        "ssl",
    }
    script = f"try {{ require('fs').readFileSync('{secret}') }} catch (error) {{ console.log(error.code) }}"
    assert sandbox.run("nodejs", script) == "ENOENT"
    assert KEY not in sandbox.tried("dict(os.environ)")


def test_it_cannot_change_what_the_next_run_finds(sandbox: Sandbox) -> None:
    for path in ("/python.so", "/new", "/tmp/new", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt", jinja(sandbox)):
        assert sandbox.tried(f"open({path!r}, 'a')") in ("PermissionError", "OSError"), path
    attack = "const fs = require('fs'); for (const path of ['/var/sandbox/x', '/x', '/tmp/x', '/etc/hosts'])"
    attack += " try { fs.appendFileSync(path, 'x'); console.log(path) } catch (error) {}"
    assert sandbox.run("nodejs", attack) == ""
    # What it changes in its own memory is gone with it.
    sandbox.run("python3", "import jinja2\njinja2.Template.render = None")
    test_a_template_as_dify_sends_it(sandbox)


def jinja(sandbox: Sandbox) -> str:
    return sandbox.run("python3", "import jinja2; print(jinja2.__file__)")


class Service(http.server.BaseHTTPRequestHandler):
    """A service of the host, on its loopback."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the inside")

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_its_only_way_out_is_the_egress_proxy(sandbox: Sandbox) -> None:
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Service) as server:
        threading.Thread(target=socketserver.BaseServer.serve_forever, args=(server,), daemon=True).start()
        port = server.server_address[1]
        for host, number in (("127.0.0.1", port), ("127.0.0.1", sandbox.egress), ("127.0.0.1", sandbox.port)):
            assert sandbox.tried(f"socket.create_connection(({host!r}, {number}), 5)") == "ConnectionRefusedError"
        for host in ("10.0.0.1", "169.254.169.254", "192.0.2.1", "1.1.1.1"):
            assert sandbox.tried(f"socket.create_connection(({host!r}, 80), 5)") == "OSError", host
        ask = "import requests\nanswer = requests.get('http://{}:{}/', timeout=10)\n"
        ask += "print(answer.status_code, answer.text)"
        assert sandbox.run("python3", ask.format("127.0.0.2", port)) == "200 the inside"  # which the site has opened
        assert sandbox.run("python3", ask.format("127.0.0.1", port)).startswith("407 ")
        assert sandbox.run("python3", ask.format("169.254.169.254", 80)).startswith("407 ")
        server.shutdown()
