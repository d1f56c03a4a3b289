"""A site's ``mirrors.json``: host -> kind -> the mirror that was chosen; the controller's, beside the inventory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _load(path: Path) -> dict[str, Any]:
    # A file that somebody broke is one without choices: they are measured anew.
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def read(path: Path, host: str) -> dict[str, Any]:
    """Kind -> what was chosen for a host: ``address``, what was measured (``seconds``, ``rate``) and when."""
    return {kind: one for kind, one in _load(path).get(host, {}).items() if one.get("address")}


def record(path: Path, host: str, chosen: Mapping[str, Any]) -> None:
    """Add choices; Ansible asks several hosts at a time, each in a process of its own."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = _load(path)
        known[host] = {**known.get(host, {}), **chosen}
        new = path.with_name(f".{path.name}.new")
        new.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        new.replace(path)
    finally:
        os.close(folder)


def used(named: Mapping[str, str], mode: str, path: str, host: str, sources: Mapping[str, str]) -> dict[str, str]:
    """The mirrors in use: those that the site names, then (mode auto) the chosen ones; empty for the source itself."""
    chosen = read(Path(path), host) if mode == "auto" else {}
    result = dict(named)
    for kind, one in chosen.items():
        if not result.get(kind) and one["address"] != sources.get(kind):
            # Go asks a proxy for everything unless it is told to go on; others' tools know their own way.
            result[kind] = one["address"] + (",direct" if kind == "go" else "")
    return result
