"""The engine's or the router's virtual environment: exactly the lock, every file by its hash. Standard library only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from inference.problem import Problem

# By lock. Importing what a server imports compiles the bytecode of those 5,000 modules; compiling all 21,000 files of
# the environment takes three times as long, and leaving it to the start would do it in several processes at once. What
# an engine for GPUs imports depends on the GPU: there everything is compiled.
WARM_UP = {
    "router": ("vllm_router.router",),
    "cpu": (
        "vllm.entrypoints.cli.serve",
        "vllm.entrypoints.openai.api_server",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.executor.multiproc_executor",
        "vllm.model_executor.model_loader.default_loader",
        "vllm.model_executor.models.llama",
        "vllm.v1.attention.backends.cpu_attn",
        "transformers.modeling_gguf_pytorch_utils",
    ),
}
# Our plugin for vLLM. It stays where it lies, like this package: a newer kit's replaces it without a new environment.
PLUGIN = Path(__file__).with_name("vllm_kimi_vl")


def install(lock: Path, venv: Path, uv: str, python: str) -> None:
    """Make the environment, from scratch after an attempt that was cut off; ``venv/complete`` is written last.

    Raises:
        Problem: a command failed; its own output went to stdout and stderr.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    interpreter = str(venv / "bin" / "python")
    _run([uv, "venv", "--quiet", "--no-config", "--clear", "--python", python, str(venv)], environment, "uv venv")
    print(f"installing the packages of {lock.name}", flush=True)
    _run(
        [
            uv,
            "pip",
            "install",
            "--no-config",
            "--no-deps",
            "--require-hashes",
            "--python",
            interpreter,
            "-r",
            str(lock),
            *(["--compile-bytecode"] if lock.stem not in WARM_UP else []),
        ],
        environment,
        f"installing the packages of {lock.name}",
    )
    if lock.stem in ("cpu", "cuda"):  # not an older engine: what the plugin brings, it does not know
        plugin = [uv, "pip", "install", "--quiet", "--no-config", "--no-deps", "--offline", "--python", interpreter]
        _run([*plugin, "--editable", str(PLUGIN)], environment, "installing the kit's plugin for vLLM")
    if modules := WARM_UP.get(lock.stem):
        print("compiling what it imports", flush=True)
        _run(
            [interpreter, "-c", "import importlib\nfor name in " + repr(modules) + ": importlib.import_module(name)"],
            environment | {"CUDA_VISIBLE_DEVICES": "", "VLLM_NO_USAGE_STATS": "1"},
            "importing what was installed",
        )
    # `python -m inference` in this environment, from whatever folder it is called.
    for site_packages in venv.glob("lib/python3*/site-packages"):
        (site_packages / "dify_kit.pth").write_text(f"{Path(__file__).resolve().parents[1]}\n", encoding="utf-8")
    temporary = venv / "complete.new"
    temporary.write_text(f"{lock.name}\n", encoding="utf-8")
    temporary.replace(venv / "complete")


def _run(argv: list[str], environment: dict[str, str], what: str) -> None:
    if code := subprocess.run(argv, env=environment, check=False).returncode:
        raise Problem(
            f"{what} ended with {code}; the lines above say why. Remedy: for a network error check kit_pypi_index and "
            "the kit's proxy settings, for a full disk make room, then run again: what was downloaded is kept."
        )
