"""Whether the engine does what it was told: read from its log and its metrics, and asked with fixed prompts.

`serve` writes the engine's whole command line into the log before it becomes the engine; here each of its promises is
held against what the engine says of itself after that (vLLM 0.28 to 0.33: v1/engine/core.py, platforms/cuda.py and
cpu.py, v1/attention, v1/worker). Standard library only.
"""

from __future__ import annotations

import base64
import re
import shlex
import struct
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference import causes, probe
from inference.catalog import Model
from inference.launcher import uses_mla
from inference.problem import Problem

# What the engine writes when it does something else than it was asked to.
FALLBACK = re.compile(r"[^\n]*(?:[Ff]alling back|[Ff]allback to|Cannot use|defaulting to FA|not supported on)[^\n]*")
# Where NaN logits end: the token with id 0, which many vocabularies have as "!".
OVERFLOW = re.compile(r"!{8,}")


@dataclass
class Proof:
    """What was asked for and is so (``lines``), and what is not (``failures``)."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def hold(self, what: str, asked: object, said: object) -> None:
        """Compare, and note the result."""
        if asked == said:
            self.lines.append(f"{what}: {said}")
        else:
            self.failures.append(f"{what} is {said or 'not in the log'}, asked for was {asked}")


def read_log(path: Path) -> str:
    """The log from the engine's last start on, also where it was rotated since (``.1`` is the newest of the old ones).

    Empty where the last start is in none of them.
    """
    text = ""
    for part in [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, 10))]:
        if not part.is_file():
            break
        text = part.read_text(encoding="utf-8", errors="replace") + text
        if causes.START in text:
            return causes.last_start(text)
    return ""


def asked_for(log: str) -> dict[str, str]:
    """The engine's options from the line that `serve` has written; a switch is ``"true"``."""
    words = shlex.split(log[len(causes.START) :].split("\n", 1)[0])
    options: dict[str, str] = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            name, has_value, value = word.partition("=")
            following = words[index + 1] if index + 1 < len(words) else "--"
            options[name] = value if has_value else "true" if following.startswith("--") else following
    return options


def from_log(model: Model, log: str) -> Proof:
    """Data type, context, parallelism and attention, as the engine's log tells them."""
    proof = Proof()
    options = asked_for(log)
    config = _last(r"Initializing a V1 LLM engine \(v(?P<version>[^)]+)\) with config: (?P<config>[^\n]*)", log)
    if not config:
        proof.failures.append(
            "the engine has not said how it is configured: it is still starting, or its log has changed"
        )
        return proof
    said = dict(re.findall(r"(\w+)=([^,\s]+)", config["config"]))
    proof.lines.append(f"engine: vLLM {config['version']} on {said.get('device_config')}")
    proof.hold("data type", options.get("--dtype"), said.get("dtype", "").removeprefix("torch."))
    proof.hold("context", options.get("--max-model-len"), said.get("max_seq_len"))
    proof.hold("tensor parallel", options.get("--tensor-parallel-size", "1"), said.get("tensor_parallel_size"))
    if said.get("device_config") == "cpu":
        _cpu_attention(model, options, log, proof)
    else:
        _gpu_attention(options, log, proof)
        gib = {"weights": "weights", "kv": "KV cache", "graphs": "CUDA graphs"}
        parts = [f"{gib[name]} {size:.2f}" for name, size in memory(log).items() if name in gib]
        proof.lines += [f"GiB on each GPU: {', '.join(parts)}"] if parts else []
    if proof.failures:
        proof.failures += [f"the engine says: {line.strip()}" for line in dict.fromkeys(FALLBACK.findall(log))][:5]
    return proof


def _gpu_attention(options: dict[str, str], log: str, proof: Proof) -> None:
    attention = options.get("--attention-backend")
    # Asked by name it says "Using <name> backend."; choosing itself, "... out of potential backends".
    said = _last(r"Using (?:AttentionBackendEnum\.)?(?P<name>[A-Z0-9_]+) (?:attention )?backend(?:\.| out of)", log)
    proof.hold("attention", attention, said["name"] if said else "")
    if prefill := options.get("--attention-config.mla_prefill_backend"):
        said = _last(r"Using (?P<name>[A-Z0-9_]+) MLA prefill backend\.", log)
        proof.hold("MLA prefill", prefill, said["name"] if said else "")
    if vision := options.get("--mm-encoder-attn-backend"):
        said = _last(r"Using backend (?:AttentionBackendEnum\.)?(?P<name>[A-Z0-9_]+) for vit attention", log) or _last(
            r"Using (?:AttentionBackendEnum\.)?(?P<name>[A-Z0-9_]+) for MMEncoderAttention", log
        )
        proof.hold("vision attention", vision, said["name"] if said else "")
    if experts := options.get("--moe-backend"):
        said = _last(r"Using (?P<name>[\w ]+) Unquantized MoE backend", log)
        proof.hold("experts", experts, said["name"].lower() if said else "")
    if attention == "FLASH_ATTN":
        said = _last(r"Using FlashAttention version (?P<name>\w+)", log)
        if said and said["name"] != "None":
            proof.lines.append(f"FlashAttention: version {said['name']}")
        else:
            proof.failures.append("the engine names no version of FlashAttention")


def _cpu_attention(model: Model, options: dict[str, str], log: str, proof: Proof) -> None:
    """The CPU build names its attention only where it is MLA's; refused wishes it names always."""
    said = _last(r"Using (?P<name>\w+_MLA) backend\.", log)
    if uses_mla(model):
        proof.hold("attention", options.get("--attention-backend"), said["name"] if said else "")
    elif refused := _last(r"(?P<line>Cannot use \S+ backend on CPU)", log):
        proof.failures.append(refused["line"])
    else:
        proof.lines.append("attention: the CPU build's only one, CPU_ATTN")


def from_metrics(log: str, metrics: str) -> Proof:
    """The KV cache as /metrics tells it: it must hold one conversation of full length."""
    proof = Proof()
    options = asked_for(log)
    info = _last(r"vllm:cache_config_info\{(?P<labels>.*)\}", metrics)
    if not info:
        proof.failures.append("/metrics has no vllm:cache_config_info")
        return proof
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info["labels"]))
    blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    if blocks.isdigit() and size.isdigit():
        tokens, context = int(blocks) * int(size), int(options.get("--max-model-len", "0"))
        proof.lines.append(f"KV cache: {tokens} tokens, {tokens / max(context, 1):.1f} conversations of {context}")
        if tokens < context:
            proof.failures.append(f"the KV cache has {tokens} tokens, a conversation may have {context}")
    else:
        proof.failures.append(f"/metrics does not say how large the KV cache is ({blocks!r} blocks of {size!r})")
    if share := options.get("--gpu-memory-utilization"):
        said = labels.get("gpu_memory_utilization", "")
        proof.hold("GPU memory share", float(share), float(said) if re.fullmatch(r"[\d.]+", said) else said)
    if options.get("--enable-prefix-caching"):
        proof.hold("prefix caching", "True", labels.get("enable_prefix_caching"))
    return proof


def memory(log: str) -> dict[str, float]:
    """What the engine reports of its memory, per GPU: GiB of ``weights``, ``kv`` and ``graphs``, and ``kv_tokens``."""
    patterns = {
        "weights": r"Model loading took (?P<n>[\d.]+) GiB",
        "kv": r"Available KV cache memory: (?P<n>-?[\d.]+) GiB",
        "kv_tokens": r"KV cache size: (?P<n>[\d,]+) tokens",
        "graphs": r"Graph capturing finished in \d+ secs, took (?P<n>-?[\d.]+) GiB",
    }
    found = {name: _last(pattern, log) for name, pattern in patterns.items()}
    return {name: float(match["n"].replace(",", "")) for name, match in found.items() if match}


def _last(pattern: str, text: str) -> re.Match[str] | None:
    found = list(re.finditer(pattern, text))
    return found[-1] if found else None


# --- Does it calculate? -----------------------------------------------------------------------------
def prompts(model: Model) -> dict[str, list[dict[str, Any]]]:
    """Fixed questions that have shown overflows: short, Chinese, long, numbers, and a picture where the model sees."""
    long = " ".join(f"Line {number}: the quick brown fox jumps over the lazy dog." for number in range(60))
    asked: dict[str, list[dict[str, Any]]] = {
        "short": [{"type": "text", "text": "What is the capital of France?"}],
        "chinese": [{"type": "text", "text": "用一句话介绍长城。"}],
        "numbers": [{"type": "text", "text": "Continue: 1, 1, 2, 3, 5, 8, 13, 21, 34,"}],
        "long": [{"type": "text", "text": f"{long}\nHow many lines are there?"}],
    }
    if "image" in model.modalities:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_picture()}"}}
        asked["picture"] = [picture, {"type": "text", "text": "Describe this picture."}]
    return asked


def _picture(width: int = 224, height: int = 168) -> str:
    """A PNG of coloured stripes, as base64."""
    colours = [(230, 30, 30), (30, 200, 60), (40, 60, 220), (250, 220, 40)]
    row = b"".join(bytes(colours[x * len(colours) // width]) for x in range(width))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * height)
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    ).decode()


def request(model: Model, content: list[dict[str, Any]]) -> dict[str, Any]:
    """A body for /v1/chat/completions: the likeliest sixteen tokens, with their probabilities."""
    return {
        "model": model.id,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 16,
        "min_tokens": 16,
        "logprobs": True,
        "skip_special_tokens": False,
    }


def calculates(model: Model, ask: Callable[[dict[str, Any]], Any]) -> Proof:
    """Whether numbers stay in range: sixteen tokens to each prompt, with their probabilities.

    Args:
        model: which prompts it can take.
        ask: posts a body to /v1/chat/completions and returns the answer; raises `Problem`.
    """
    proof = Proof()
    for name, content in prompts(model).items():
        try:
            trouble = _trouble(ask(request(model, content)))
        except Problem as problem:
            if "not JSON compliant" not in str(problem):  # what the engine says when it has no number to write
                raise
            trouble = "a token's probability is no number (NaN)"
        if trouble:
            proof.failures.append(f"the prompt `{name}`: {trouble}")
    if not proof.failures:
        proof.lines.append(f"numbers: in range in {len(prompts(model))} fixed prompts")
    return proof


def _trouble(answer: Any) -> str:
    """What is wrong with an answer; empty where nothing is."""
    choice = answer["choices"][0]
    message = choice["message"]
    text = (message.get("content") or "") + (message.get("reasoning") or message.get("reasoning_content") or "")
    tokens = (choice.get("logprobs") or {}).get("content") or []
    if OVERFLOW.search(text):
        return f"the answer is {text[:40]!r}, as when numbers overflow"
    if any(not _finite(token.get("logprob")) for token in tokens):
        return "a token's probability is no number (NaN)"
    if not text.strip() and not answer["usage"]["completion_tokens"]:
        return "the answer is empty"
    if tokens and len({token["token"] for token in tokens}) == 1 and tokens[0]["token"] in ("", "!"):
        return f"the answer is {len(tokens)} times {tokens[0]['token']!r}"
    return ""


def _finite(number: object) -> bool:
    return isinstance(number, int | float) and number == number and abs(number) < float("inf")


# --- All of it --------------------------------------------------------------------------------------
def check(model: Model, url: str, log: Path, numbers: bool = True) -> list[str]:
    """Prove a running engine; returns a line for each promise that it keeps.

    Args:
        model: its catalog entry.
        url: the engine's own endpoint with its /v1 (not a router's).
        log: its log file.
        numbers: also ask the fixed prompts; takes as long as some hundred tokens.

    Raises:
        Problem: what it does not keep, with the engine's own words for it.
    """
    text = read_log(log)
    proofs = [from_log(model, text), from_metrics(text, _metrics(url.removesuffix("/v1") + "/metrics"))] if text else []
    if not text:  # after weeks; it was proved when it started
        proofs.append(
            Proof([f"the engine's last start is in {log} no more: `make restart SERVICE=inference` proves it anew"])
        )
    failures = [failure for proof in proofs for failure in proof.failures]
    if failures:
        raise Problem(
            f"{model.id} is not served as planned: {'; '.join(failures)}. Remedy: read {log}; what the engine was told "
            f"stands in its line `{causes.START.strip()}`. inference_dtype and inference_arguments tell it otherwise."
        )
    if numbers:
        proofs.append(calculates(model, lambda body: probe.post(f"{url}/chat/completions", body, timeout=120)))
        if failures := proofs[-1].failures:
            raise Problem(
                f"{model.id} answers, but not in words: {'; '.join(failures)}. Remedy: inference_dtype: bfloat16, if "
                "it is float16 now; else the weights may be damaged: `python -m inference fetch --verify` tells."
            )
    return [line for proof in proofs for line in proof.lines]


def _metrics(url: str) -> str:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as response:
            return str(response.read().decode())
    except OSError as error:
        raise Problem(f"{url} does not answer: {error}. Remedy: `make status`, then `make deploy`.") from None
