"""Kimi-VL without remote code: the plugin against the published algorithm, and a tiny Kimi-VL served on the CPU.

Takes about two minutes after the engine's installation, which it shares with the other modules.
"""

from __future__ import annotations

import base64
import json
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference import catalog
from tests.gpu.real import answers

from .conftest import REPO, Engine, ModelServer, model_server

MODEL = "tiny-kimi-vl"
QUESTION = "What do you see in the picture?"
# As Kimi-VL's model card and its repository's chat template write a question; N is the number of an image's tokens.
BEFORE = "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|><|im_user|>user<|im_middle|>"
AFTER = "<|im_end|><|im_assistant|>assistant<|im_middle|>"


def image_text(tokens: int) -> str:
    return f"<|media_start|>image<|media_content|>{'<|media_pad|>' * tokens}<|media_end|>"


# Width and height, and the tokens that such an image has: a token for each 28 x 28 pixels, begun ones included; at most
# 64 x 64 patches of 14 pixels before that.
IMAGES = {
    (280, 224): 80,
    (1, 1): 1,
    (29, 27): 2,
    (1000, 30): 72,
    (896, 896): 1024,
    (1024, 1024): 1089,
    (4000, 2000): 1058,
}
PROMPTS = {
    "text": BEFORE + QUESTION + AFTER,
    "system": f"<|im_system|>system<|im_middle|>你很有用。<|im_end|><|im_user|>user<|im_middle|>{QUESTION}{AFTER}",
    "two images": BEFORE + image_text(80) + "and" + image_text(2) + QUESTION + AFTER,
} | {f"{size}": BEFORE + image_text(tokens) + QUESTION + AFTER for size, tokens in IMAGES.items()}


def png(width: int, height: int, colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    """An image of one colour, as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(colour) * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def part(image: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}}


def question(*parts: bytes | str) -> dict[str, Any]:
    """A request with texts and images in this order."""
    content = [{"type": "text", "text": one} if isinstance(one, str) else part(one) for one in parts]
    return {"messages": [{"role": "user", "content": content}]}


@pytest.fixture(scope="module")
def weights(engine: Engine) -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="kit-kimi-vl-"))
    fetch = [str(engine.python), "-m", "inference", "fetch", MODEL, f"--output={root}/m", f"--cache={root}/cache"]
    done = subprocess.run(fetch, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    yield root / "m"
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def computed(engine: Engine, weights: Path) -> dict[str, Any]:
    """What the plugin computes, beside the references: see kimi_vl_cases.py."""
    script = [str(engine.python), str(Path(__file__).with_name("kimi_vl_cases.py")), str(weights), *PROMPTS.values()]
    done = subprocess.run(script, env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def server(engine: Engine, weights: Path) -> Iterator[ModelServer]:
    with model_server(engine.python, MODEL, weights) as running:
        yield running


def compare(engine: Engine, weights: Path, answers: Path) -> subprocess.CompletedProcess[str]:
    """What tests/gpu/reference.py says."""
    script = [str(engine.python), str(REPO / "tests/gpu/reference.py"), str(weights), str(answers)]
    return subprocess.run(script, env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)


def test_an_h100_calculated_as_float32_does(engine: Engine, weights: Path, tmp_path: Path) -> None:
    # What `make test-gpu` asks of a GPU, with the answers of the first one: float16, FlashAttention, vLLM 0.33.
    recorded = REPO / "tests/data/tiny_kimi_vl_h100.json"
    done = compare(engine, weights, recorded)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("16 of 16 tokens the same") == 4
    answers = json.loads(recorded.read_text())
    answers["short"]["tokens"][5][1] -= 0.1
    answers["numbers"]["tokens"][2][0] = answers["numbers"]["tokens"][1][0]
    (tmp_path / "wrong.json").write_text(json.dumps(answers))
    done = compare(engine, weights, tmp_path / "wrong.json")
    assert done.returncode == 1
    assert "numbers: 16 of 16" not in done.stdout
    assert "short: 16 of 16 tokens the same, log probabilities at most 0.1" in done.stdout


def test_this_processor_calculates_as_float32_does(
    engine: Engine, server: ModelServer, weights: Path, tmp_path: Path
) -> None:
    def post(body: dict[str, Any]) -> Any:
        status, text = server.call("/chat/completions", body)
        assert status == 200, text
        return json.loads(text)

    said = answers(catalog.load(MODEL), post)
    (tmp_path / "said.json").write_text(json.dumps(said))
    done = compare(engine, weights, tmp_path / "said.json")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("16 of 16 tokens the same") == 4


def ask(server: ModelServer, body: dict[str, Any]) -> tuple[str, int]:
    """The answer, and the tokens of the prompt."""
    status, text = server.call("/chat/completions", body)
    assert status == 200, text
    answer = json.loads(text)
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def refusal(server: ModelServer, body: dict[str, Any]) -> str:
    """What a 400 says."""
    status, text = server.call("/chat/completions", body)
    assert status == 400, text
    return str(json.loads(text)["error"]["message"])


@pytest.mark.parametrize(("kind", "least"), [("tokens", 450), ("images", 110), ("reasoning", 40)])
def test_the_plugin_computes_what_is_published(computed: dict[str, Any], kind: str, least: int) -> None:
    cases = computed[kind]
    assert {case: pair for case, pair in cases.items() if pair[0] != pair[1]} == {}  # [ours, reference]
    assert len(cases) > least


def test_text(server: ModelServer, computed: dict[str, Any]) -> None:
    answer, tokens = ask(server, {"messages": [{"role": "user", "content": QUESTION}]})
    assert answer.strip()
    assert tokens == computed["lengths"][PROMPTS["text"]]


def test_a_system_message_replaces_the_usual_one(server: ModelServer, computed: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": "你很有用。"}, {"role": "user", "content": QUESTION}]
    assert ask(server, {"messages": messages})[1] == computed["lengths"][PROMPTS["system"]]


@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_an_images_tokens_are_counted_exactly(
    server: ModelServer, computed: dict[str, Any], size: tuple[int, int]
) -> None:
    answer, tokens = ask(server, question(png(*size), QUESTION))
    assert answer.strip()
    assert tokens == computed["lengths"][PROMPTS[str(size)]]


def test_two_images(server: ModelServer, computed: dict[str, Any]) -> None:
    _, tokens = ask(server, question(png(280, 224), "and", png(29, 27), QUESTION))
    assert tokens == computed["lengths"][PROMPTS["two images"]]


def first_token(server: ModelServer, colour: tuple[int, int, int]) -> dict[str, float]:
    """The likeliest first tokens of an answer about an image of a colour: token -> logarithm of its probability."""
    body = question(png(280, 224, colour), QUESTION) | {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    status, text = server.call("/chat/completions", body)
    assert status == 200, text
    [token] = json.loads(text)["choices"][0]["logprobs"]["content"]
    return {one["token"]: one["logprob"] for one in token["top_logprobs"]}


def test_the_answer_depends_on_the_image(server: ModelServer) -> None:
    red, again, blue = (first_token(server, colour) for colour in [(255, 0, 0), (255, 0, 0), (0, 0, 255)])

    def distance(one: dict[str, float], other: dict[str, float]) -> float:
        return max(abs(logprob - other.get(token, -30)) for token, logprob in one.items())

    # bfloat16 gives a little more or less from time to time.
    assert distance(red, again) < 0.5
    assert distance(red, blue) > 2


def events(server: ModelServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    """A stream's events."""
    status, text = server.call("/chat/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert (status, lines[-1]) == (200, "[DONE]"), text
    return [json.loads(line) for line in lines[:-1]]


def joined(chunks: list[dict[str, Any]], name: str) -> str:
    return "".join(choice["delta"].get(name) or "" for chunk in chunks for choice in chunk["choices"])


def test_streams(server: ModelServer, computed: dict[str, Any]) -> None:
    chunks = events(server, question(png(280, 224), QUESTION))
    assert joined(chunks, "content").strip()
    assert len(chunks) > 10
    assert chunks[-1]["usage"]["prompt_tokens"] == computed["lengths"][PROMPTS["(280, 224)"]]


def test_too_many_images(server: ModelServer) -> None:
    assert "At most 2 image(s)" in refusal(server, question(*[png(28, 28)] * 3, QUESTION))


@pytest.mark.parametrize("image", [b"no image", png(280, 224)[:-40], b""], ids=["another file", "cut off", "empty"])
def test_a_broken_image(server: ModelServer, image: bytes) -> None:
    assert "Failed to load image" in refusal(server, question(image, QUESTION))


def test_a_huge_image(server: ModelServer) -> None:
    assert "14000x14000" in refusal(server, question(png(14000, 14000), QUESTION))


def test_an_image_that_is_too_long(server: ModelServer) -> None:
    assert "size=8000x30" in refusal(server, question(png(8000, 30), QUESTION))


def test_a_text_with_the_images_token_harms_nobody(server: ModelServer) -> None:
    ask(server, question("What is <|media_pad|>?"))
    server.call("/chat/completions", question("What is <|media_pad|>?", png(280, 224)))
    assert ask(server, question(png(280, 224), QUESTION))[0].strip()


def test_an_unknown_role(server: ModelServer) -> None:
    message = refusal(server, {"messages": [{"role": "tool", "content": "7", "tool_call_id": "1"}]})
    assert "system, user and assistant, not tool" in message


def test_wrong_key(server: ModelServer) -> None:
    assert server.call("/chat/completions", question(QUESTION), key="wrong")[0] == 401


def test_reasoning_is_kept_apart(server: ModelServer) -> None:
    """The marks are several tokens each; the answer is forced, for the model would not say it."""
    text = "◁think▷I see <b> ◁ a circle.\n◁/think▷It is a circle."
    body = question(png(280, 224), QUESTION) | {"structured_outputs": {"choice": [text]}, "max_tokens": 200}
    status, whole = server.call("/chat/completions", body)
    assert status == 200, whole
    message, usage = json.loads(whole)["choices"][0]["message"], json.loads(whole)["usage"]
    expected = ("I see <b> ◁ a circle.\n", "It is a circle.")
    assert (message["reasoning"], message["content"]) == expected
    chunks = events(server, body)
    assert (joined(chunks, "reasoning"), joined(chunks, "content")) == expected
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert chunks[-1]["usage"]["completion_tokens_details"] == usage["completion_tokens_details"]


def test_no_remote_code_and_the_real_models_attention(server: ModelServer, weights: Path) -> None:
    command = Path(f"/proc/{server.process.pid}/cmdline").read_text().split("\0")
    assert not [argument for argument in command if "remote" in argument]
    assert "auto_map" in json.loads((weights / "config.json").read_text())
    assert list(weights.glob("*.py")) == []
    assert "Using CPU_MLA backend" in server.log.read_text()
