"""Environments and weights that no service of the host uses any more. Standard library only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Left:
    """What an earlier model or engine has left: folders of one name, and the bytes that deleting all of them frees."""

    name: str
    folders: tuple[Path, ...]
    size: int


def unused(home: Path, cache: Path) -> list[Left]:
    """What lies in ``<home>/inference`` and in the cache, and is named in no service's configuration; largest first.

    Args:
        home: kit_home.
        cache: kit_cache.
    """
    in_use = "\n".join(path.read_text(encoding="utf-8") for path in sorted((home / "etc/conf.d").glob("*.conf")))
    named: dict[str, list[Path]] = {}
    for folder, pattern in (
        (home / "inference", "venv-*"),
        (home / "inference", "router-*"),
        (home / "inference/models", "*"),
        (cache / "inference/models", "*"),
    ):
        for path in folder.glob(pattern):
            if path.is_dir() and path.name not in in_use:
                named.setdefault(path.name, []).append(path)
    left = [Left(name, tuple(folders), freed(folders)) for name, folders in named.items()]
    return sorted(left, key=lambda one: (-one.size, one.name))


def freed(folders: Iterable[Path]) -> int:
    """Bytes on the disk that go when all these folders go: a file that has links elsewhere stays."""
    links: dict[tuple[int, int], tuple[int, int, int]] = {}
    for folder in folders:
        for root, _, files in os.walk(folder):
            for name in files:
                status = os.lstat(os.path.join(root, name))
                key = (status.st_dev, status.st_ino)
                seen = links.get(key, (0, 0, 0))[0]
                links[key] = (seen + 1, status.st_nlink, status.st_blocks * 512)
    return sum(size for seen, all_links, size in links.values() if seen == all_links)


def report(home: Path, cache: Path, delete: bool) -> list[str]:
    """A line for each; with ``delete`` they are gone afterwards."""
    left = unused(home, cache)
    lines = []
    for one in left:
        lines.append(f"{one.size / 1e9:6.1f} GB  {one.name}")
        if delete:
            for folder in one.folders:
                shutil.rmtree(folder)
    if not left:
        return ["Nothing is left of earlier models and engines."]
    total = sum(one.size for one in left) / 1e9
    return [
        *lines,
        f"{total:6.1f} GB  {'freed' if delete else 'in all; `make prune-models ARGS=--delete` removes them'}",
    ]
