"""A real proxy: every tool and the modules go through it, and nobody does for this host; a real mail server."""

from __future__ import annotations

import http.server
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from ansible.module_utils import kit_dify, kit_files, kit_network, kit_preflight
from ansible.module_utils.kit_preflight import Source

from .conftest import REPO, self_signed

PROBE = REPO / "tests/hosts/probe.py"


class Proxy:
    """proxy.py with a user and a password, as companies have it; its log tells who asked for what."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        self.file = folder / "log"
        command = [sys.executable, "-m", "proxy", "--hostname=127.0.0.1", f"--port={self.port}", "--num-workers=1"]
        command += ["--num-acceptors=1", "--basic-auth=kit:pass-word", "--log-level=INFO"]
        with self.file.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert time.monotonic() < end, self.file.read_text()
            time.sleep(0.1)
        self.url = f"http://kit:pass-word@127.0.0.1:{self.port}"

    def asked(self, host: str) -> bool:
        """Whether somebody was passed on to this host; the line comes when the connection ends."""
        end = time.monotonic() + 10
        while host not in self.file.read_text():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    running = Proxy(tmp_path_factory.mktemp("proxy"))
    yield running
    running.process.terminate()
    running.process.wait(20)


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """A server of this host; its address by the name that is not the number."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


CLIENTS = {
    "urllib": [
        sys.executable,
        "-c",
        "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read())",
    ],
    "requests": [sys.executable, "-c", "import sys, requests; print(requests.get(sys.argv[1]).content)"],
    "curl": ["curl", "-sS", "-m", "20"],
    "git": ["git", "-c", "http.lowSpeedTime=20", "ls-remote"],
    "uv": [str(Path(sys.executable).with_name("uv")), "pip", "download"],
}


def environment(proxy: Proxy, tmp_path: Path, bundle: str = "/etc/ssl/certs/ca-certificates.crt") -> dict[str, str]:
    env = kit_network.environment(bundle, proxy.url, proxy.url, ".internal.example")
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), **env}


@pytest.mark.parametrize("client", ["urllib", "requests", "curl", "git"])
def test_other_hosts_are_asked_through_the_proxy(proxy: Proxy, tmp_path: Path, client: str) -> None:
    if not shutil.which(CLIENTS[client][0]):
        pytest.skip(f"{client} is not on this machine; installing it enables this")
    # The proxy answers that there is no such host: what counts is that it was the one who looked.
    host = f"{client}.way-out.invalid"
    subprocess.run(
        [*CLIENTS[client], f"http://{host}/"], env=environment(proxy, tmp_path), capture_output=True, timeout=60
    )
    assert proxy.asked(host), proxy.file.read_text()


@pytest.mark.parametrize("client", ["urllib", "requests", "curl"])
def test_this_host_is_asked_directly(proxy: Proxy, tmp_path: Path, page: str, client: str) -> None:
    if not shutil.which(CLIENTS[client][0]):
        pytest.skip(f"{client} is not on this machine; installing it enables this")
    env = environment(proxy, tmp_path)
    for url in (page, page.replace("127.0.0.1", "localhost")):
        done = subprocess.run([*CLIENTS[client], url], env=env, capture_output=True, text=True, timeout=60)
        assert "here" in done.stdout, done.stderr
    port = page.rstrip("/").rpartition(":")[2]
    assert f":{port}" not in proxy.file.read_text()


def test_packages_come_through_the_proxy(proxy: Proxy, tmp_path: Path) -> None:
    """uv, with the site's index and certificates, as it installs everything here."""
    uv = CLIENTS["uv"][0]
    env = environment(proxy, tmp_path) | {"UV_CACHE_DIR": str(tmp_path / "uv"), "UV_HTTP_TIMEOUT": "60"}
    done = subprocess.run(
        [uv, "pip", "install", "--target", str(tmp_path / "t"), "--no-deps", "--python", sys.executable, "six"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t/six.py").is_file()
    assert proxy.asked("443"), proxy.file.read_text()


def test_preflight_asks_through_the_proxy(proxy: Proxy, tmp_path: Path, page: str) -> None:
    env = environment(proxy, tmp_path)
    source = Source("PyPI", "http", "http://preflight.way-out.invalid/", "")
    assert kit_preflight.ask_http(source, env).fault
    assert proxy.asked("preflight.way-out.invalid")
    assert kit_preflight.ask_http(Source("own", "http", page, ""), env).fault == ""


# --- mail ------------------------------------------------------------------------------------------


class MailServer(Controller):
    """aiosmtpd with STARTTLS, a user and a password."""

    def __init__(self, folder: Path) -> None:
        self_signed(folder / "crt", folder / "key", "IP:127.0.0.1")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "crt", folder / "key")

        def knows(_server: Any, _session: Any, _envelope: Any, _mechanism: str, given: LoginPassword) -> AuthResult:
            return AuthResult(success=(given.login, given.password) == (b"dify", b"pass'word"), handled=False)

        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        super().__init__(
            object(),
            hostname="127.0.0.1",
            port=port,
            tls_context=context,
            require_starttls=True,
            auth_require_tls=True,
            authenticator=knows,
        )


def test_make_check_logs_in_at_the_mail_server(tmp_path: Path) -> None:
    """The settings as Dify is told them, in the file that it reads, at a real server."""
    server = MailServer(tmp_path)
    server.start()
    (tmp_path / "etc/env").mkdir(parents=True)

    def checked(password: str, **changes: Any) -> str:
        mail = {"server": "127.0.0.1", "port": server.port, "from": "d@example.com", "user": "dify", **changes}
        text = kit_files.render_env(kit_dify.mail_env(mail, password))
        (tmp_path / "etc/env/api.env").write_text(text)
        question = [sys.executable, str(PROBE), "mail", f'{{"home": "{tmp_path}"}}']
        return subprocess.run(question, capture_output=True, text=True, check=True).stdout.strip().strip('"')

    try:
        assert checked("pass'word") == ""
        assert checked("wrong") == f"127.0.0.1, port {server.port} refuses the login of dify (535)"
        assert "wrong" not in checked("wrong")
        assert checked("pass'word", security="tls") != ""
        assert checked("", user="", security="none") == ""
    finally:
        server.stop()
    assert "refused" in checked("pass'word")
