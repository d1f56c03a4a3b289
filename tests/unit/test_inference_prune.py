"""What no service uses is listed, and goes only when asked for."""

from __future__ import annotations

import os
from pathlib import Path

from inference import cli, prune

MIB = 2**20


def site(tmp_path: Path) -> tuple[Path, Path]:
    home, cache = tmp_path / "home", tmp_path / "cache"
    for folder in (
        "etc/conf.d",
        "inference/venv-new",
        "inference/venv-old",
        "inference/models/a-1",
        "inference/models/b-2",
    ):
        (home / folder).mkdir(parents=True)
    (cache / "inference/models/a-1").mkdir(parents=True)
    (home / "etc/conf.d/inference.conf").write_text(
        f"command = {home}/inference/venv-new/bin/python -m inference serve b --weights={home}/inference/models/b-2\n"
    )
    for folder in ("venv-new", "venv-old", "models/b-2"):
        (home / "inference" / folder / "file").write_bytes(b"x" * MIB)
    (cache / "inference/models/a-1/model.safetensors").write_bytes(b"x" * 2 * MIB)
    os.link(cache / "inference/models/a-1/model.safetensors", home / "inference/models/a-1/model.safetensors")
    return home, cache


def test_only_what_no_service_names(tmp_path: Path) -> None:
    home, cache = site(tmp_path)
    left = prune.unused(home, cache)
    assert [(one.name, len(one.folders)) for one in left] == [("a-1", 2), ("venv-old", 1)]
    assert left[0].size == 2 * MIB, "two names of one file are freed once"


def test_a_file_with_another_name_elsewhere_frees_nothing(tmp_path: Path) -> None:
    home, _ = site(tmp_path)
    assert prune.freed([home / "inference/models/a-1"]) == 0


def test_nothing_goes_unless_asked_for(tmp_path: Path) -> None:
    home, cache = site(tmp_path)
    assert cli.main(["prune", f"--home={home}", f"--cache={cache}"]) == 0
    assert (home / "inference/venv-old").exists()
    assert cli.main(["prune", f"--home={home}", f"--cache={cache}", "--delete"]) == 0
    assert not (home / "inference/venv-old").exists()
    assert not (cache / "inference/models/a-1").exists()
    assert (home / "inference/venv-new").exists()
    assert prune.report(home, cache, delete=False) == ["Nothing is left of earlier models and engines."]
