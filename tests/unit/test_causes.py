"""Deaths of the engine get their names.

engine_logs/ has excerpts of real starts that failed, on vLLM 0.32's CPU build. What only a GPU host can say is quoted
from the issues that are named beside it, or from the sources of vLLM 0.33.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inference import causes, cli

LOGS = Path(__file__).with_name("engine_logs")
ON_PROCESSORS = {
    "port-taken": (r"another program holds the engine's port", "inference_port"),
    "kv-cache-too-small": (r"conversation of 90000 tokens needs 1\.93 GiB .* there are 1\.0 GiB", "46464 or less"),
    "context-too-long": (
        r"inference_max_model_len is 90000, and the model was trained for 8192 tokens",
        "8192 or less",
    ),
    "host-memory-short": (r"is to have 200\.0 GiB, and only [\d.]+ of the host's [\d.]+ GiB", "inference_kv_cache_gib"),
    "weights-missing": (r"files of weights are missing", "make deploy"),
    "weights-damaged": (r"a file of weights is damaged", "make deploy"),
    "weights-of-another-model": (r"another model's than config\.json describes", "make deploy"),
    "architecture-unknown": (r"doesn't have the model's architecture \('NoSuchForCausalLM'\)", "another model"),
    "shared-memory-short": (r"need 160 MiB of /dev/shm, and 63 MiB are free", "--shm-size=1g"),
    "library-missing": (r"lacks the library libnuma\.so\.1, which", "libnuma1 (Debian"),
    "process-killed": (r"was killed \(signal 9\), as the kernel does when the host's memory is short", "dmesg"),
    "step-too-slow": (r"a step of the model was not done in the five minutes", "top"),
}
ON_GPUS = {
    # vllm-project/vllm#20305, pytorch/pytorch#175666
    "ValueError: Free memory on device (31.44/47.38 GiB) on startup is less than desired GPU memory utilization "
    "(0.95, 45.01 GiB). Decrease GPU memory utilization": r"take 45\.01 GiB, and only 31\.44 of the GPU's 47\.38",
    "ValueError: Free memory on device cuda:0 (19.77/22.05 GiB) on startup is less than desired GPU memory utilization "
    "(0.9, 19.84 GiB).": r"take 19\.84 GiB, and only 19\.77 of the GPU's 22\.05",
    # vllm-project/vllm#27508
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 786.00 MiB. GPU 0 has a total capacity of 79.11 GiB "
    "of which 140.75 MiB is free.": r"the GPU ran out of memory when the engine asked for 786\.00 MiB",
    'raise ValueError("No available memory for the cache blocks. "': r"leave no memory for the KV cache",
    # vllm-project/vllm#15329
    "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.": r"no C compiler",
    # vllm-project/vllm#14452
    "RuntimeError: CUDA error: no kernel image is available for execution on the device": r"no kernels for this GPU",
    # lllyasviel/Fooocus#1313
    "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).": r"driver is older",
    # llm-d/llm-d#352
    "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)": r"NCCL",
    # vllm-project/vllm#1157
    "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has "
    "compute capability 7.5.": r"no bfloat16",
    # vLLM 0.33, platforms/cuda.py and v1/attention/backends/mla/prefill/selector.py
    "ValueError: Selected backend AttentionBackendEnum.FLASH_ATTN_MLA is not valid for this configuration. "
    "Reason: ['compute capability not supported']": r"FLASH_ATTN_MLA cannot be had here: \['compute capability",
    "ValueError: Selected MLA prefill backend FLASH_ATTN is not valid for this configuration. "
    "Reason: ['ImportError']": r"FLASH_ATTN cannot be had here: \['ImportError'\]",
}


@pytest.mark.parametrize("name", ON_PROCESSORS)
def test_real_deaths_on_processors(name: str) -> None:
    what, remedy = ON_PROCESSORS[name]
    found = causes.explain((LOGS / f"{name}.txt").read_text())
    assert found is not None
    assert re.search(what, found[0]), found
    assert remedy in found[1], found


@pytest.mark.parametrize("line", ON_GPUS)
def test_deaths_on_gpus(line: str) -> None:
    found = causes.explain(f"(EngineCore pid=104) ERROR 05-05 12:36:59 [core.py:718] {line}\nINFO: Shutting down\n")
    assert found is not None
    assert re.search(ON_GPUS[line], found[0]), found
    assert "{" not in "".join(found)


def test_a_healthy_log_names_no_cause() -> None:
    assert causes.explain((LOGS / "cpu-start.txt").read_text()) is None


def test_the_first_cause_explains_the_later_ones() -> None:
    text = "torch.OutOfMemoryError: CUDA out of memory.\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    found = causes.explain(text)
    assert found is not None
    assert "GPU ran out of memory" in found[0]


def test_the_next_start_does_not_hide_why_the_last_one_died() -> None:
    damaged = (LOGS / "weights-damaged.txt").read_text()
    taken = (LOGS / "port-taken.txt").read_text()
    found = causes.explain(f"{causes.START}m: a\n{taken}{causes.START}m: a\n{damaged}{causes.START}m: a\n")
    assert found is not None
    assert "damaged" in found[0]


def test_two_lines_for_kit_services(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", (LOGS / "port-taken.txt").open())
    assert cli.main(["explain"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
