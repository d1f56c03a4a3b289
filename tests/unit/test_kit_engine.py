"""Which engine a host gets, and which hosts are refused before anything is changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from action import kit_engine

from inference import catalog
from inference.problem import Problem

KIMI = catalog.load("kimi-vl-a3b-instruct")
SMALL = catalog.load("smollm2-135m")
SETTINGS: dict[str, Any] = {
    "hardware": "auto",
    "goal": "longest-context",
    "dtype": "",
    "max_model_len": 0,
    "max_num_seqs": 0,
    "images_per_prompt": -1,
    "gpu_memory_utilization": 0,
    "replicas": 1,
}
A100 = "580.65.06, 0, NVIDIA A100-SXM4-80GB, 81920, 500, 8.0\ndriver 0\ncompiler\n"


def test_a_host_without_gpu() -> None:
    chosen, notices = kit_engine.choice(SMALL, SETTINGS, "compiler\n")
    assert (chosen["hardware"], chosen["lock"]) == ("cpu", "cpu")
    assert [notice.partition(".")[0] for notice in notices] == ["smollm2-135m does not see images"]
    [notice] = kit_engine.choice(catalog.load("tiny-kimi-vl"), SETTINGS, "compiler\n")[1]
    assert "random weights" in notice
    assert kit_engine.choice(catalog.load("smolvlm-500m"), SETTINGS, "compiler\n")[1] == []


@pytest.mark.parametrize(
    ("gpu", "proposed"),
    [
        (A100, "kimi-vl-a3b-instruct"),
        ("580.65.06, 0, NVIDIA A10, 23028, 500, 8.6\ndriver 0\ncompiler\n", "qwen3-vl-8b"),
        ("580.65.06, 0, Tesla T4, 15360, 300, 7.5\ndriver 0\ncompiler\n", "qwen3-vl-4b"),
    ],
)
def test_a_small_model_is_not_the_last_word_on_a_gpu(gpu: str, proposed: str) -> None:
    _, notices = kit_engine.choice(SMALL, SETTINGS, gpu)
    assert f"`make model MODEL={proposed}`. {proposed} on " in notices[0]
    assert "tokens of context" in notices[0]
    _, notices = kit_engine.choice(catalog.load(proposed), SETTINGS, gpu)
    assert not any("make model" in notice for notice in notices)


def test_a_host_with_gpu() -> None:
    chosen, notices = kit_engine.choice(KIMI, SETTINGS, A100)
    assert chosen == {"hardware": "cuda", "lock": "cuda", "dtype": "float16"}
    assert any(
        "float16, attention TRITON_MLA, MLA prefill FLASH_ATTN, vision attention FLASH_ATTN" in n for n in notices
    )


def test_an_older_engine_has_a_lock_of_its_own() -> None:
    chosen, _ = kit_engine.choice(catalog.load("chameleon-7b"), SETTINGS, A100)
    assert chosen["lock"] == "cuda-0.28.0"


def test_every_engine_of_the_catalog_is_locked() -> None:
    for model in map(catalog.load, catalog.ids()):
        for hardware, engine in model.engines.items():
            lock = f"{hardware}-{engine.version}" if engine.version else hardware
            assert (kit_engine.LOCKS / f"{lock}.txt").is_file(), model.id


def test_locks_hold_the_version_that_their_input_names() -> None:
    for source in kit_engine.LOCKS.glob("*.in"):
        wanted = [line for line in source.read_text().splitlines() if line.startswith("vllm")]
        locked = source.with_suffix(".txt").read_text()
        assert wanted
        assert all(f"{line} \\" in locked for line in wanted), source


@pytest.mark.parametrize(
    ("model", "output", "said"),
    [
        (KIMI, "", r"does not run on cpu"),
        (KIMI, "580.65.06, 0, Tesla T4, 15360, 300, 7.5\ndriver 0\ncompiler\n", r"FlashAttention only"),
        (KIMI, "580.65.06, 0, NVIDIA A10, 23028, 500, 8.6\ndriver 0\ncompiler\n", r"does not fit on one NVIDIA A10"),
        (
            SMALL,
            "580.65.06, 0, Tesla V100-SXM2-32GB, 32768, 400, 7.0\ndriver 0\ncompiler\n",
            r"compute capability 7\.0",
        ),
        (KIMI, A100.replace("580.65", "550.54"), r"driver is 550\.54"),
        (KIMI, A100.replace("compiler", ""), r"neither gcc nor clang"),
        (SMALL, "compiler\nwithout libnuma.so.1\n", r"no libnuma\.so\.1, which vLLM's CPU build needs"),
        (SMALL, "compiler\nshm 65536\n", r"/dev/shm has 64 MiB"),
        (KIMI, "NVIDIA-SMI has failed\ndriver 9\n", r"nvidia-smi ended with 9: NVIDIA-SMI has failed"),
    ],
)
def test_refused(model: catalog.Model, output: str, said: str) -> None:
    with pytest.raises(Problem, match=rf"(?s){said}.*Remedy: "):
        kit_engine.choice(model, SETTINGS, output)


def test_no_gpu_is_used_that_the_site_does_not_want() -> None:
    chosen, _ = kit_engine.choice(SMALL, SETTINGS | {"hardware": "cpu"}, A100)
    assert chosen["hardware"] == "cpu"
    with pytest.raises(Problem, match="inference_hardware is cuda"):
        kit_engine.choice(SMALL, SETTINGS | {"hardware": "cuda"}, "compiler\n")


def test_a_gpu_host_is_not_asked_for_what_processors_need() -> None:
    chosen, _ = kit_engine.choice(KIMI, SETTINGS, f"{A100}without libnuma.so.1\nshm 65536\n")
    assert chosen["hardware"] == "cuda"


def test_an_engine_on_several_gpus_needs_shared_memory() -> None:
    two = "".join(f"580.65.06, {index}, NVIDIA A10, 23028, 500, 8.6\n" for index in range(2)) + "driver 0\ncompiler\n"
    assert kit_engine.choice(KIMI, SETTINGS, f"{two}shm 1048576\n")[0]["hardware"] == "cuda"
    with pytest.raises(Problem, match=r"/dev/shm has 64 MiB.*--shm-size=1g"):
        kit_engine.choice(KIMI, SETTINGS, f"{two}shm 65536\n")


def test_a_model_for_processors_leaves_the_gpu_alone() -> None:
    chosen, notices = kit_engine.choice(catalog.load("tiny-kimi-vl"), SETTINGS, A100)
    assert chosen["lock"] == "cpu"
    assert any("is not used" in notice for notice in notices)


def test_the_look_is_a_command_that_a_shell_understands(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.65.06, 0, Tesla T4, 15360, 300, 7.5'\n")
    smi.chmod(0o755)
    for path, there in ((f"{tmp_path}:/usr/bin:/bin", True), ("/usr/bin:/bin", False)):
        done = subprocess.run(["/bin/sh", "-c", kit_engine.LOOK], env={"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen = kit_engine.looked(done.stdout)
        assert (seen.gpus is not None) == there
        listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
        assert seen.numa == (kit_engine.NUMA in listed)
        assert seen.shm == shutil.disk_usage("/dev/shm").total // 1024**2
