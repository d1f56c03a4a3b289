"""The parts of the provider plugin that need no SDK: what it learns from a server, and the marks of reasoning."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from models.server import FRESH_SECONDS, Facts, Server, ServerProblem
from models.thinking import ThinkingMarks, without_thoughts

PLUGIN = Path(__file__).resolve().parents[2] / "inference" / "provider_plugin"


class Model:
    """An OpenAI-compatible server with one model whose abilities a test sets."""

    def __init__(self) -> None:
        self.images, self.tools, self.context, self.root, self.refusal = 0, False, 8192, "v1", 400
        self.tells_limit = True
        self.trials = 0
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listed = {"id": "m", "max_model_len": model.context, "root": model.root}
                self.answer(200, {"data": [listed]})

            def do_POST(self) -> None:
                model.trials += 1
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                images = len(body["messages"][0]["content"]) - 1 if "tools" not in body else 0
                refused = images > model.images or ("tools" in body and not model.tools)
                said = f"At most {model.images} image(s) may be provided" if model.tells_limit else "too long"
                self.answer(model.refusal if refused else 200, {"error": said} if refused else {})

            def answer(self, status: int, value: Any) -> None:
                said = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: Any) -> None:
                """Tests are quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Model]:
    monkeypatch.setattr(Server, "_known", {})
    monkeypatch.setattr(Server, "memory", tmp_path / "learnt.json")
    served = Model()
    yield served
    served.stop()


@pytest.mark.parametrize(("images", "tools"), [(10, False), (0, True), (4, True), (1, False)])
def test_abilities_are_tried(model: Model, images: int, tools: bool) -> None:
    model.images, model.tools = images, tools
    assert Server(model.url).facts("m") == Facts(8192, images, tools, "v1")


def test_a_limit_that_is_not_told_is_found_by_trying(model: Model) -> None:
    model.images, model.tells_limit = 4, False
    assert Server(model.url).facts("m").images == 2


def test_asks_once_until_the_weights_change(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(f"{model.url}/v1")
    server.facts("m")
    model.context, model.images = 4096, 10
    assert server.facts("m").context == 8192
    tried = model.trials
    # Later the list is read again, and nothing tried for the same weights.
    monkeypatch.setattr("models.server.FRESH_SECONDS", -FRESH_SECONDS)
    assert server.facts("m") == Facts(4096, 0, False, "v1")
    assert model.trials == tried
    model.root = "v2"
    assert server.facts("m").images == 10


def test_a_silent_server_is_remembered_but_not_validated(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(model.url)
    learnt = server.facts("m")
    model.stop()
    monkeypatch.setattr(Server, "_known", {})  # another process
    assert server.facts("m") == learnt
    with pytest.raises(ServerProblem, match=r"does not answer: .*refused"):
        server.facts("m", anew=True)
    with pytest.raises(ServerProblem, match="does not answer"):
        server.facts("other")


def test_a_busy_server_says_nothing_about_its_model(model: Model) -> None:
    model.refusal = 503
    with pytest.raises(ServerProblem, match="503"):
        Server(model.url).facts("m")


@pytest.mark.parametrize("endpoint", ["", "localhost:8000", "ftp://host/v1"])
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(ServerProblem, match="no http"):
        Server(endpoint)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("◁think▷Hm.◁/think▷Paris.", "<think>Hm.</think>Paris."),
        ("a ◁ b, ◁thin", "a ◁ b, ◁thin"),
        ("plain", "plain"),
        ("◁◁think▷x", "◁<think>x</think>"),
        ("◁think▷cut of", "<think>cut of</think>"),
    ],
)
def test_marks_are_translated_wherever_they_are_cut(text: str, expected: str, size: int) -> None:
    marks = ThinkingMarks()
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(map(marks.feed, pieces)) + marks.flush() == expected


def test_earlier_thoughts_are_left_out() -> None:
    assert without_thoughts("<think>\nHm,\nhm.\n</think>\n\nYes. <think>a</think>No.") == "Yes. No."
    assert without_thoughts("<think>never ended") == "<think>never ended"


def test_every_file_that_the_manifest_names_exists() -> None:
    manifest = yaml.safe_load((PLUGIN / "manifest.yaml").read_text())
    assert (PLUGIN / "_assets" / manifest["icon"]).is_file()
    for name in manifest["plugins"]["models"]:
        provider = yaml.safe_load((PLUGIN / name).read_text())
        sources = provider["extra"]["python"]
        assert all((PLUGIN / path).is_file() for path in [sources["provider_source"], *sources["model_sources"]])


def test_every_package_of_the_plugin_is_pinned_by_hash() -> None:
    wanted = [line for line in (PLUGIN / "requirements.in").read_text().splitlines() if not line.startswith("#")]
    locked = (PLUGIN / "requirements.txt").read_text()
    assert all(line.replace("_", "-") + " \\\n    --hash=sha256:" in locked for line in wanted)
