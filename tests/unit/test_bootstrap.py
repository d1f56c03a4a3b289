"""The bootstrap's decisions; the whole of it runs at every `make`."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("bootstrap", ROOT / "deploy/bootstrap.py")
assert SPEC is not None
assert SPEC.loader is not None
bootstrap = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bootstrap)


def test_the_lock_has_uv_for_this_machine() -> None:
    name, digest = bootstrap.locked_uv((ROOT / "uv.lock").read_text())
    assert platform.machine() in name
    assert re.fullmatch(r"[0-9a-f]{64}", digest)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_each_architecture_gets_its_own_wheel(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert bootstrap.locked_uv((ROOT / "uv.lock").read_text())[0].endswith(f"{machine}.whl")


def test_an_unknown_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    with pytest.raises(bootstrap.BootstrapError, match=r"sparc64[\s\S]*Remedy"):
        bootstrap.locked_uv((ROOT / "uv.lock").read_text())


def test_an_index_that_does_not_answer_is_named_with_the_remedy(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, ROOT / "deploy/bootstrap.py", "--venv", tmp_path / "venv"],
        env={"PATH": "/usr/bin:/bin", "KIT_PYPI_INDEX": "http://127.0.0.1:9/simple", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    # With uv already in .cache the failure comes from uv, without it from the download; both must name the way out.
    assert outcome.returncode == 2
    assert "127.0.0.1:9" in outcome.stderr
    assert "Remedy" in outcome.stderr
