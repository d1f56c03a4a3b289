"""The provider plugin for real: its own packages, started as the plugin daemon does it, asked in the daemon's protocol.

The model server is one of the tests' that notes what it was asked, because what matters here is what the plugin sends
and how it takes each kind of answer. That a real server is content with it is shown by a deploy's own question.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import python312

PLUGIN = Path(__file__).resolve().parents[2] / "inference" / "provider_plugin"
KEY = "model-key-0123456789"


def png(width: int, height: int) -> bytes:
    """A grey picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class ModelServer:
    """An OpenAI-compatible server; a test sets what the model can and what comes next, and reads what was asked."""

    def __init__(self) -> None:
        self.most_images, self.tools, self.context = 0, False, 4096
        self.asked: list[dict[str, Any]] = []
        self.status = 200
        self.message: dict[str, Any] = {"role": "assistant", "content": "Yes."}
        self.deltas: list[dict[str, Any]] = []
        self.breaks_off: dict[str, Any] | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.headers["Authorization"] != f"Bearer {KEY}":
                    self.say(401, {"error": "Unauthorized"})
                    return
                self.say(200, {"data": [{"id": "m", "max_model_len": server.context, "root": "/weights"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][-1]["content"]
                images = [part for part in content if part["type"] == "image_url"] if isinstance(content, list) else []
                if body.get("max_tokens") == 1:  # one of the plugin's trials
                    if "tools" in body and not server.tools:
                        self.say(400, {"error": {"message": "no tool parser", "code": 400}})
                    elif images and not server.most_images:
                        self.say(400, {"error": {"message": "m is not a multimodal model", "code": 400}})
                    elif len(images) > server.most_images:
                        message = f"At most {server.most_images} image(s) may be provided in one prompt."
                        self.say(400, {"error": {"message": message, "code": 400}})
                    else:
                        self.say(200, {"choices": [{"message": {"content": "p"}}]})
                    return
                server.asked.append(body)
                usage = {"prompt_tokens": 87, "completion_tokens": 5, "total_tokens": 92}
                if server.status != 200:
                    self.say(server.status, server.message)
                elif body.get("stream"):
                    events: list[dict[str, Any]] = [
                        {"choices": [{"index": 0, "delta": delta}]} for delta in server.deltas
                    ]
                    events += [server.breaks_off] if server.breaks_off else [{"choices": [], "usage": usage}]
                    self.stream(events)
                else:
                    choice = {"index": 0, "message": server.message, "finish_reason": "stop"}
                    self.say(200, {"object": "chat.completion", "id": "1", "choices": [choice], "usage": usage})

            def say(self, status: int, value: Any) -> None:
                self.answer(status, "application/json", json.dumps(value).encode())

            def stream(self, events: list[dict[str, Any]]) -> None:
                lines = [f"data: {json.dumps(event)}\n\n" for event in events]
                self.answer(200, "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]).encode())

            def answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Tests are quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Refused(Exception):
    """An error of the plugin: the class by which Dify knows it, and its text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


class Plugin:
    """The plugin's process, as the daemon runs it: requests and answers are lines of JSON."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.process = subprocess.Popen(
            [str(python), "-m", "main"],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "INSTALL_METHOD": "local", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.declared = json.loads(self._line())
        self.sessions = 0

    def _line(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return line
        raise AssertionError(f"the plugin ended with {self.process.wait()}")

    def call(self, action: str, server: ModelServer, credentials: dict[str, Any], **more: Any) -> list[Any]:
        """What the plugin answers to one request, piece by piece. Raises Refused."""
        self.sessions += 1
        session = str(self.sessions)
        data = {
            "type": "model",
            "action": action,
            "user_id": "u",
            "provider": "kit_inference",
            "model_type": "llm",
            "model": "m",
            "credentials": {"endpoint_url": server.url, "api_key": KEY, **credentials},
            **more,
        }
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"session_id": session, "event": "request", "data": data}) + "\n")
        self.process.stdin.flush()
        pieces: list[Any] = []
        while True:
            said = json.loads(self._line())
            if said["event"] != "session" or said["session_id"] != session:
                continue
            if said["data"]["type"] == "error":
                error = said["data"]["data"]
                raise Refused(error["error_type"], error["message"])
            if said["data"]["type"] == "end":
                return pieces
            pieces.append(said["data"]["data"])

    def schema(self, server: ModelServer, **credentials: str) -> dict[str, Any]:
        """What Dify offers for the model."""
        schema: dict[str, Any] = self.call("get_ai_model_schemas", server, credentials)[0]["model_schema"]
        return schema

    def ask(
        self, server: ModelServer, *messages: dict[str, Any], stream: bool = False, **credentials: str
    ) -> tuple[str, dict[str, Any]]:
        """The answer's text and the usage that Dify would note."""
        more = {"model_parameters": {"max_tokens": 64}, "stop": [], "tools": [], "prompt_messages": list(messages)}
        pieces = self.call("invoke_llm", server, credentials, stream=stream, **more)
        text = "".join(piece["delta"]["message"]["content"] for piece in pieces)
        return text, pieces[-1]["delta"]["usage"]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def user(text: str, *images: bytes, mime: str = "image/png") -> dict[str, Any]:
    """A question as Dify sends it: images before the text."""
    parts = [
        {"type": "image", "format": "png", "mime_type": mime, "base64_data": base64.b64encode(i).decode()}
        for i in images
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "data": text}] if parts else text}


def assistant(text: str) -> dict[str, Any]:
    """An earlier answer."""
    return {"role": "assistant", "content": text, "tool_calls": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's files with their own packages, at their pins and hashes."""
    uv = str(Path(sys.executable).with_name("uv"))
    python = python312(uv)
    if not python:
        pytest.skip("no Python 3.12 on this machine: install one, or let uv fetch it (uv python install 3.12)")
    folder = tmp_path_factory.mktemp("plugin") / "plugin"
    shutil.copytree(PLUGIN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    venv = folder / ".venv"
    subprocess.run([uv, "venv", "-q", "--no-config", "--python", python, str(venv)], check=True)
    subprocess.run(
        [uv, "pip", "install", "-q", "--no-config", "--require-hashes", "-r", str(PLUGIN / "requirements.txt")],
        env={**os.environ, "VIRTUAL_ENV": str(venv)},
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def plugin(folder: Path) -> Iterator[Plugin]:
    running = Plugin(folder / ".venv" / "bin" / "python", folder)
    yield running
    running.stop()


@pytest.fixture
def server() -> Iterator[ModelServer]:
    running = ModelServer()
    yield running
    running.stop()


def test_declares_itself_to_the_daemon(plugin: Plugin) -> None:
    assert (plugin.declared["author"], plugin.declared["name"]) == ("dify-kit", "kit_inference")


@pytest.mark.parametrize("sees", [0, 4])
@pytest.mark.parametrize("tools", [False, True])
def test_dify_is_told_what_the_server_says(plugin: Plugin, server: ModelServer, sees: int, tools: bool) -> None:
    server.most_images, server.tools = sees, tools
    schema = plugin.schema(server)
    assert schema["model_properties"] == {"context_size": 4096, "mode": "chat"}
    assert ("vision" in schema["features"]) == bool(sees)
    assert ({"multi-tool-call", "stream-tool-call"} <= set(schema["features"])) == tools
    limit = next(rule for rule in schema["parameter_rules"] if rule["name"] == "max_tokens")
    assert (limit["max"], limit["default"]) == (4096, 1024)


def test_settings_win_over_the_server_where_they_promise_less(plugin: Plugin, server: ModelServer) -> None:
    server.most_images = 4
    schema = plugin.schema(server, context_size="2048", vision_support="no_support")
    assert (schema["model_properties"]["context_size"], schema["features"]) == (2048, [])
    assert plugin.schema(server, context_size="9999")["model_properties"]["context_size"] == 4096


def test_an_image_reaches_the_server_as_it_is(plugin: Plugin, server: ModelServer) -> None:
    server.most_images = 2
    picture = png(280, 224)
    text, usage = plugin.ask(server, user("What is this?", picture))
    assert (text, usage["prompt_tokens"], usage["completion_tokens"]) == ("Yes.", 87, 5)
    (asked,) = server.asked
    (image, question) = asked["messages"][0]["content"]
    assert image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(picture).decode()
    assert question == {"type": "text", "text": "What is this?"}
    assert asked["max_tokens"] == 64


@pytest.mark.parametrize(
    ("images", "mime", "expected"),
    [
        ([png(28, 28)] * 3, "image/png", "at most 2 images with a question, not 3"),
        ([b"<svg xmlns='http://www.w3.org/2000/svg'/>"], "image/svg+xml", "Image 1 is an SVG drawing. Send it as PNG"),
        ([png(28, 28), b"\x00\x00\x00\x18ftypheic"], "image/png", "Image 2 is in a format that model servers don't"),
        ([png(28, 28)[:14]], "image/png", "Image 1 is damaged"),
        ([png(28, 28).replace(struct.pack(">II", 28, 28), struct.pack(">II", 20000, 10000))], "image/png", "million"),
    ],
)
def test_an_image_that_cannot_be_read_is_refused_before_the_server_is_asked(
    plugin: Plugin, server: ModelServer, images: list[bytes], mime: str, expected: str
) -> None:
    server.most_images = 2
    with pytest.raises(Refused, match=expected) as refusal:
        plugin.ask(server, user("What is this?", *images, mime=mime))
    assert refusal.value.kind == "InvokeBadRequestError"
    assert server.asked == []


def test_a_text_model_is_sent_no_image(plugin: Plugin, server: ModelServer) -> None:
    with pytest.raises(Refused, match="does not see images"):
        plugin.ask(server, user("What is this?", png(28, 28)))
    # The app's model was changed in the middle of a conversation.
    plugin.ask(server, user("What is this?", png(28, 28)), assistant("A square."), user("Which colour?"))
    assert [part["type"] for part in server.asked[0]["messages"][0]["content"]] == ["text", "text"]


def test_older_images_give_way_to_the_newest(plugin: Plugin, server: ModelServer) -> None:
    server.most_images = 2
    old, new = png(28, 28), png(56, 56)
    plugin.ask(server, user("And this?", old, old), assistant("Grey."), user("And these?", new))
    first, _, last = server.asked[0]["messages"]
    assert [part["type"] for part in first["content"]] == ["text", "image_url", "text"]
    assert "not shown again" in first["content"][0]["text"]
    assert last["content"][0]["image_url"]["url"].endswith(base64.b64encode(new).decode())


def test_earlier_reasoning_is_not_sent_again(plugin: Plugin, server: ModelServer) -> None:
    plugin.ask(server, user("One?"), assistant("<think>\nHm.\n</think>Two."), user("Three?"))
    assert [message["content"] for message in server.asked[0]["messages"]] == ["One?", "Two.", "Three?"]


@pytest.mark.parametrize(
    ("deltas", "message", "expected"),
    [
        (
            [{"reasoning_content": "Hm"}, {"reasoning_content": "m."}, {"content": "Yes."}],
            {"reasoning_content": "Hmm.", "content": "Yes."},
            "<think>\nHmm.\n</think>Yes.",
        ),
        ([{"reasoning": "Hmm."}, {"content": "Yes."}], {"reasoning": "Hmm.", "content": "Yes."}, None),
        (
            [{"content": "◁thi"}, {"content": "nk▷Hmm.◁/thin"}, {"content": "k▷Yes."}],
            {"content": "◁think▷Hmm.◁/think▷Yes."},
            "<think>Hmm.</think>Yes.",
        ),
        ([{"content": "◁think▷Hm"}], {"content": "◁think▷Hm"}, "<think>Hm</think>"),
    ],
)
def test_reasoning_stands_apart(
    plugin: Plugin, server: ModelServer, deltas: list[dict[str, str]], message: dict[str, str], expected: str | None
) -> None:
    expected = expected or "<think>\nHmm.\n</think>Yes."
    server.deltas, server.message = deltas, message
    text, usage = plugin.ask(server, user("Is it?"), stream=True)
    assert (text, usage["prompt_tokens"], usage["completion_tokens"]) == (expected, 87, 5)
    assert server.asked[0]["stream_options"] == {"include_usage": True}
    assert plugin.ask(server, user("Is it?"))[0] == expected


@pytest.mark.parametrize(
    ("status", "message", "kind", "expected"),
    [
        (401, {"error": "Unauthorized"}, "InvokeAuthorizationError", "refuses the API key"),
        (404, {"error": {"message": "The model `m` does not exist."}}, "InvokeBadRequestError", "Choose a model"),
        (
            400,
            {"error": {"message": "This model's maximum context length is 4096 tokens. However, ..."}},
            "InvokeBadRequestError",
            r"4096 tokens.*Begin a new conversation",
        ),
        (400, {"detail": "temperature must be positive"}, "InvokeBadRequestError", "temperature.*the model's param"),
        (429, {"error": {"message": "slow down"}}, "InvokeRateLimitError", r"slow down\). Ask again later"),
        (500, {"error": {"message": "EngineDeadError"}}, "InvokeServerUnavailableError", "EngineDeadError.*make logs"),
        (503, {"error": "no worker"}, "InvokeServerUnavailableError", "no worker"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_says_what_to_do(
    plugin: Plugin, server: ModelServer, status: int, message: dict[str, Any], kind: str, expected: str, stream: bool
) -> None:
    server.status, server.message = status, message
    with pytest.raises(Refused, match=expected) as refusal:
        plugin.ask(server, user("Is it?"), stream=stream)
    assert refusal.value.kind == kind


def test_an_answer_that_breaks_off(plugin: Plugin, server: ModelServer) -> None:
    server.deltas, server.breaks_off = [{"content": "Ye"}], {"error": {"message": "EngineCore died", "code": 500}}
    with pytest.raises(Refused, match=r"broke off its answer: EngineCore died") as refusal:
        plugin.ask(server, user("Is it?"), stream=True)
    assert refusal.value.kind == "InvokeServerUnavailableError"


def test_a_server_that_is_gone(plugin: Plugin, server: ModelServer) -> None:
    plugin.schema(server)  # known from before
    server.stop()
    with pytest.raises(Refused, match=r"refused.*make logs SERVICE=inference") as refusal:
        plugin.ask(server, user("Is it?"))
    assert refusal.value.kind == "InvokeConnectionError"


@pytest.mark.parametrize(
    ("credentials", "expected"),
    [
        ({}, None),
        ({"api_key": "wrong"}, "refuses the API key"),
        ({"endpoint_url": "localhost:8000"}, "no http"),
        ({"endpoint_url": "http://127.0.0.1:9/v1"}, "does not answer.*refused"),
        ({"context_size": "many"}, "no number above 0"),
        ({"max_images": "-1"}, "no number above 0"),
    ],
)
def test_credentials_are_validated_by_a_real_answer(
    plugin: Plugin, server: ModelServer, credentials: dict[str, str], expected: str | None
) -> None:
    if expected is None:
        assert plugin.call("validate_model_credentials", server, credentials)[0]["result"] is True
        assert server.asked[0]["messages"] == [{"role": "user", "content": "ping"}]
        return
    with pytest.raises(Refused, match=expected) as refusal:
        plugin.call("validate_model_credentials", server, credentials)
    assert refusal.value.kind == "CredentialsValidateFailedError"


def test_a_model_that_is_not_served(plugin: Plugin, server: ModelServer) -> None:
    with pytest.raises(Refused, match=r"does not serve 'other'. It serves: m") as refusal:
        plugin.call("validate_model_credentials", server, {}, model="other")
    assert refusal.value.kind == "CredentialsValidateFailedError"


def test_an_image_counts_when_dify_makes_room_for_the_answer(plugin: Plugin, server: ModelServer) -> None:
    server.most_images = 2

    def tokens(*messages: dict[str, Any]) -> int:
        return int(plugin.call("get_llm_num_tokens", server, {}, tools=[], prompt_messages=messages)[0]["num_tokens"])

    assert tokens(user("Is it?", png(280, 224))) - tokens(user("Is it?")) == pytest.approx(80, abs=3)
