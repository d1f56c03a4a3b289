"""Release files against the sources they describe, wherever `git ls-remote` of Dify's repositories answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import release_file
import yaml

sys.path.insert(0, str(release_file.RELEASES.parent / "plugins"))
from module_utils import kit_release, kit_release_source

RELEASES = release_file.RELEASES
VERSIONS = sorted(path.stem for path in RELEASES.glob("*.yml"))


def _load(name: str) -> Any:
    return yaml.safe_load((RELEASES / f"{name}.yml").read_text())


def test_real_source_is_what_the_file_says(real: tuple[str, Path, Path]) -> None:
    version, dify, daemon = real
    assert kit_release_source.check_checkout(_load(version), dify, daemon, _load(f"env-keys/{version}")) == []


def test_real_source_gives_the_committed_files(real: tuple[str, Path, Path], tmp_path: Path) -> None:
    version, dify, daemon = real
    (tmp_path / f"{version}.yml").write_text((RELEASES / f"{version}.yml").read_text())
    _, problems = release_file.write(version, dify, daemon, tmp_path)
    assert problems == []
    for name in (f"{version}.yml", f"env-keys/{version}.yml"):
        assert (tmp_path / name).read_text() == (RELEASES / name).read_text()


def test_real_adjustments_fit_once(real: tuple[str, Path, Path]) -> None:
    version, dify, _ = real
    changed = kit_release.apply_adjustments(_load(version)["adjustments"], dify)
    try:
        assert changed
        with pytest.raises(kit_release.ReleaseError, match="matches 0 times"):
            kit_release.apply_adjustments(_load(version)["adjustments"], dify)
    finally:
        subprocess.run(["git", "-C", str(dify), "checkout", "-q", "."], check=True)
