"""`kitctl debug` on a program like Dify's API (gunicorn, gevent): a debugger attaches and stops at a breakpoint."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.kit_supervisor import Service, reconcile

from .conftest import Home

APP = """def application(environ, start_response):
    number = 41
    number += 1
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"answer {number}".encode()]
"""


class Debugger:
    """The part of an editor that speaks the Debug Adapter Protocol: one session."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.file = self.socket.makefile("rb")
        self.sequence = 0
        self.unread: deque[dict[str, Any]] = deque()
        self.request("initialize", adapterID="debugpy", pathFormat="path")

    def send(self, command: str, arguments: dict[str, Any]) -> int:
        self.sequence += 1
        body = json.dumps(
            {"seq": self.sequence, "type": "request", "command": command, "arguments": arguments}
        ).encode()
        self.socket.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        return self.sequence

    def receive(self, **wanted: Any) -> dict[str, Any]:
        """The next message with these fields; others are kept."""
        for _ in range(len(self.unread)):
            message = self.unread.popleft()
            if wanted.items() <= message.items():
                return message
            self.unread.append(message)
        while True:
            length = int(self.file.readline().split(b":")[1])
            self.file.readline()
            message = json.loads(self.file.read(length))
            if wanted.items() <= message.items():
                return message  # type: ignore[no-any-return]
            self.unread.append(message)

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        answer = self.receive(type="response", request_seq=self.send(command, arguments))
        assert answer["success"], answer
        return answer.get("body", {})  # type: ignore[no-any-return]

    def attach(self, breakpoint_file: Path, line: int, **arguments: Any) -> None:
        sequence = self.send("attach", {"justMyCode": False, **arguments})
        self.receive(type="event", event="initialized")
        self.request("setBreakpoints", source={"path": str(breakpoint_file)}, breakpoints=[{"line": line}])
        self.request("configurationDone")
        assert self.receive(type="response", request_seq=sequence)["success"]


@pytest.fixture(scope="module")
def app_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    venv = tmp_path_factory.mktemp("app") / "venv"
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(venv)], check=True)
    packages = ["gunicorn==25.3.0", "gevent", "gevent-websocket", "packaging"]
    environment = {**os.environ, "VIRTUAL_ENV": str(venv)}
    subprocess.run([uv, "pip", "install", "-q", *packages], env=environment, check=True)
    return venv


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_breakpoint_stops_the_worker_and_restart_is_the_way_back(home: Home, app_venv: Path) -> None:
    app = home.root / "app" / "app.py"
    app.parent.mkdir()
    app.write_text(APP)
    (home.root / "runtime/bin/uv").symlink_to(Path(sys.executable).with_name("uv"))
    passed_on = ("SSL_CERT_FILE", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "HTTPS_PROXY", "https_proxy")
    lines = [f"{name}='{os.environ[name]}'\n" for name in passed_on if name in os.environ]
    (home.root / "etc/env/build.env").write_text("".join(lines))
    port, debug_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}/"
    worker = ["--worker-class", "geventwebsocket.gunicorn.workers.GeventWebSocketWorker", "--workers", "2"]
    service = Service(
        "api",
        command=(f"{app_venv}/bin/python", "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", *worker, "app:application"),
        directory="app",
        ready={"http": url},
    )
    reconcile([service], home.root)

    shown = home.kitctl("debug", "api", "--port", str(debug_port))
    assert shown.returncode == 0, shown.stderr
    assert f'"port": {debug_port}' in shown.stdout
    assert "kitctl restart api" in shown.stdout

    parent = Debugger(debug_port)
    parent.attach(app, 4)
    # gunicorn's worker is a forked process: the debugger is told, and attaches to it as an editor does.
    child = parent.receive(type="event", event="debugpyAttach")["body"]
    debugger = Debugger(debug_port)
    debugger.attach(app, 4, subProcessId=child["subProcessId"])

    answers: list[bytes] = []
    asker = threading.Thread(target=lambda: answers.append(urllib.request.urlopen(url, timeout=120).read()))
    asker.start()
    stopped = debugger.receive(type="event", event="stopped")["body"]
    assert stopped["reason"] == "breakpoint"
    frame = debugger.request("stackTrace", threadId=stopped["threadId"])["stackFrames"][0]
    assert (frame["source"]["path"], frame["line"]) == (str(app), 4)
    assert debugger.request("evaluate", expression="number", frameId=frame["id"])["result"] == "42"
    debugger.request("setBreakpoints", source={"path": str(app)}, breakpoints=[])
    debugger.request("continue", threadId=stopped["threadId"])
    asker.join(30)
    assert answers == [b"answer 42"]

    # A deploy leaves the session alone (nothing it knows of has changed), and one restart ends it.
    assert not reconcile([service], home.root).changed
    assert home.kitctl("restart", "api").returncode == 0
    assert b"debugpy" not in Path(f"/proc/{home.pid('api')}/cmdline").read_bytes()
    assert not reconcile([service], home.root).changed


def test_a_program_that_is_not_python_is_refused(home: Home) -> None:
    reconcile([Service("sleep", command=("/bin/sleep", "100"))], home.root)
    refused = home.kitctl("debug", "sleep")
    assert refused.returncode == 1
    assert refused.stderr == "sleep is no Python program: debugpy cannot run it.\n"
