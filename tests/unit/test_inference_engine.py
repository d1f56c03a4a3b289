"""What the engine is started with, and what an earlier start left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference import catalog, cli, engine, launcher
from inference.problem import Problem

MODEL = catalog.load("smollm2-135m")


def settings(tmp_path: Path, **changes: int) -> engine.Settings:
    return engine.Settings(weights=tmp_path / "w", state=tmp_path / "s", host="127.0.0.1", port=1234, **changes)  # type: ignore[arg-type]


def pairs(argv: list[str]) -> dict[str, str]:
    """Options and their values, as ``--port=1`` or as two words."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    return dict(itertools.pairwise(words))


def test_command_from_the_catalog(tmp_path: Path) -> None:
    argv = engine.command(MODEL, settings(tmp_path))
    assert argv[1:5] == ["-m", "inference.vllm_cli", "serve", str(tmp_path / "w")]
    assert "--enforce-eager" in argv
    assert pairs(argv) | {
        "--served-model-name": "smollm2-135m",
        "--host": "127.0.0.1",
        "--port": "1234",
        "--dtype": "bfloat16",
        "--max-model-len": "8192",
        "--max-num-seqs": "8",
        "--shutdown-timeout": "30",
        "--tool-call-parser": "hermes",
    } == pairs(argv)


def test_mla_on_a_cpu(tmp_path: Path) -> None:
    tiny = catalog.load("tiny-kimi-vl")
    assert "--attention-backend=CPU_MLA" in engine.command(tiny, settings(tmp_path))
    assert not set(launcher.CPU_MLA) & set(engine.command(MODEL, settings(tmp_path)))


def test_a_site_decides(tmp_path: Path) -> None:
    chosen = settings(tmp_path, max_model_len=2048, max_num_seqs=3, kv_cache_gib=2, stop_seconds=5)
    assert pairs(engine.command(MODEL, chosen)) | {
        "--max-model-len": "2048",
        "--max-num-seqs": "3",
        "--shutdown-timeout": "5",
    } == pairs(engine.command(MODEL, chosen))
    assert engine.environment(MODEL, chosen)["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert engine.environment(MODEL, settings(tmp_path))["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_longer_than_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"inference_max_model_len is 9000.*8192 tokens.*Remedy"):
        engine.command(MODEL, settings(tmp_path, max_model_len=9000))


def test_offline_and_silent(tmp_path: Path) -> None:
    environment = engine.environment(MODEL, settings(tmp_path))
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["TMPDIR"] == str(tmp_path / "s" / "tmp")
    assert environment["TORCH_COMPILE_DISABLE"] == "1"


def test_what_speaks_within_the_host_is_heard_by_nobody_else(tmp_path: Path) -> None:
    """Gloo would listen at the address that the host's name has; tests/e2e/machine.py is such a host."""
    environment = engine.environment(MODEL, settings(tmp_path))
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"


def test_the_key_is_never_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "very-secret-key")
    options = ["serve", "smollm2-135m", f"--weights={tmp_path}", f"--state={tmp_path}", "--port=1"]
    assert cli.main([*options, "--hardware=cpu", "--print"]) == 0
    shown = capsys.readouterr()
    assert "--served-model-name=smollm2-135m" in shown.out
    assert "very-secret-key" not in shown.out + shown.err


def test_no_service_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    options = ["serve", "smollm2-135m", f"--weights={tmp_path}", f"--state={tmp_path}", "--port=1", "--hardware=cpu"]
    assert cli.main(options) == 2
    assert "anybody could use the model" in capsys.readouterr().err


def test_no_service_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    options = ["serve", "smollm2-135m", f"--weights={tmp_path}", f"--state={tmp_path}", "--port=1", "--hardware=cpu"]
    assert cli.main(options) == 2
    assert f"no weights in {tmp_path}" in capsys.readouterr().err


@pytest.fixture
def group() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes of one group of their own: the first has the engine's title, the second an ordinary one."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    first = subprocess.Popen(["VLLM::EngineCore", *sleeper[1:]], executable=sys.executable, process_group=0)
    second = subprocess.Popen(sleeper, process_group=first.pid)
    yield [first, second]
    for process in (first, second):
        process.kill()
        process.wait()


def test_leftovers_of_a_killed_server_die_and_nothing_else(
    tmp_path: Path, group: list[subprocess.Popen[bytes]]
) -> None:
    engine_core, bystander = group
    (tmp_path / "process-group").write_text(str(engine_core.pid))
    assert engine.stop_leftovers(tmp_path) == [engine_core.pid]
    assert engine_core.wait(5) == -signal.SIGKILL
    assert bystander.poll() is None
    assert (tmp_path / "process-group").read_text() == str(os.getpgrp())


def test_processes_of_other_groups_live(tmp_path: Path, group: list[subprocess.Popen[bytes]]) -> None:
    (tmp_path / "process-group").write_text(str(group[0].pid + 1_000_000))
    assert engine.stop_leftovers(tmp_path) == []
    time.sleep(0.2)
    assert group[0].poll() is None


@pytest.mark.parametrize("note", [None, ""])
def test_first_start(tmp_path: Path, note: str | None) -> None:
    if note is not None:
        (tmp_path / "process-group").write_text(note)
    assert engine.stop_leftovers(tmp_path) == []
    assert (tmp_path / "process-group").read_text() == str(os.getpgrp())
