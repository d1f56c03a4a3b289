"""Readiness means that the model answered, against a real server on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from inference import cli, probe
from inference.problem import Problem

KEY = "the-right-key"


class Endpoint(ThreadingHTTPServer):
    """Answers `answer` to whoever knows the key."""

    answer: Any = None
    asked: dict[str, Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        self.server.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers["Authorization"] == f"Bearer {KEY}"
        body = json.dumps(self.server.answer if known else {"error": "Unauthorized"}).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def completion(text: str | None) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": 2}}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    server = Endpoint(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_answer_is_ready(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.answer = completion("Hello!")
    assert cli.main(["ready", "m", f"--url={endpoint.url}"]) == 0
    assert "m answered 'Hello!' in 0." in capsys.readouterr().out
    assert endpoint.asked["model"] == "m"


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_an_empty_answer_is_not(endpoint: Endpoint, text: str | None) -> None:
    endpoint.answer = completion(text)
    with pytest.raises(Problem, match="empty answer"):
        probe.ready(endpoint.url, "m")


@pytest.mark.parametrize("answer", [{}, [], {"choices": []}, "hello"])
def test_another_kind_of_server(endpoint: Endpoint, answer: object) -> None:
    endpoint.answer = answer
    with pytest.raises(Problem, match="not in the way of OpenAI's API"):
        probe.ready(endpoint.url, "m")


def test_wrong_key_says_what_to_do_and_not_the_key(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "wrong-key")
    with pytest.raises(Problem, match=r"said 401.*Remedy: the key is not the one") as caught:
        probe.ready(endpoint.url, "m")
    assert "wrong-key" not in str(caught.value)


def test_waits_only_for_a_server_that_does_not_listen(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    with pytest.raises(probe.Silent, match="Nobody listens"):
        probe.ready("http://127.0.0.1:9/v1", "m", wait=0.7)
    assert 0.4 < time.monotonic() - begin < 5
    monkeypatch.setenv("VLLM_API_KEY", "wrong-key")
    begin = time.monotonic()
    with pytest.raises(Problem, match="401"):
        probe.ready(endpoint.url, "m", wait=30)
    assert time.monotonic() - begin < 5


def test_a_configured_proxy_is_not_asked(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    endpoint.answer = completion("Hello!")
    assert "Hello!" in probe.ready(endpoint.url, "m")
