"""The tool chain's decisions: pins, interpreters, links, what is current."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lock_runtime
import pytest
import yaml
from ansible.module_utils import kit_runtime
from ansible.module_utils.kit_runtime import NoPython, Python, Runtime, RuntimeFailure, link, pick, probe

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PIN = {"source": "npm", "name": "tool", "hash": "sha512-AAAA"}
LOCK = {
    "uv": {"1.0": {"any": PIN}},
    "patchelf": {"1.0": {"any": PIN}},
    "pnpm": {"11.0.0": {"any": PIN}, "11.1.0": {"any": PIN}},
    "node": {"22.0.0": {"linux-sparc": PIN}},
}


def params(**changes: Any) -> dict[str, Any]:
    return {
        "cache": "/nowhere",
        "tools": [],
        "lock": LOCK,
        "versions": {},
        "requirements": "redis==1.0",
        "links": {},
        "python": "",
        "python_version": VERSION,
        "python_download": "",
        "python_staged": "",
        "download_seconds": 5,
        "mirrors": {},
        **changes,
    }


def test_pick_the_only_version() -> None:
    assert pick(LOCK, "uv", "", "linux-x64").version == "1.0"


@pytest.mark.parametrize(
    ("tool", "version", "words"),
    [
        ("pnpm", "12.0.0", r"pnpm 12\.0\.0 is not among.*11\.0\.0, 11\.1\.0.*make runtime-lock"),
        ("pnpm", "", "no version named"),
        ("node", "22.0.0", "no build for linux-x64"),
    ],
)
def test_pick_says_what_to_do(tool: str, version: str, words: str) -> None:
    with pytest.raises(RuntimeFailure, match=words):
        pick(LOCK, tool, version, "linux-x64")


def test_probe_finds_the_interpreter_behind_a_venv() -> None:
    found = probe(sys.executable, VERSION)
    if isinstance(found, str):  # a Python without headers is of no use to the kit, but runs these tests
        assert "Python.h" in found
        return
    assert found.version.startswith(VERSION)
    assert found.executable == os.path.realpath(found.executable)
    assert found.prefix == os.path.realpath(sys.base_prefix)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('echo \'{"version": "2.7.18", "missing": []}\'', "is Python 2.7.18"),
        ("echo something", "is not a Python interpreter"),
        ("echo 'libpython3.12.so.1.0: cannot open' >&2; exit 127", "cannot open"),
        ("exit 3", "ends with code 3"),
        (
            f'echo \'{{"version": "{VERSION}.1", "missing": ["the module ssl"]}}\'',
            "lacks the module ssl",
        ),
    ],
)  # fmt: skip
def test_probe_says_why_not(tmp_path: Path, script: str, words: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    assert words in str(probe(str(program), VERSION))


def test_probe_of_nothing(tmp_path: Path) -> None:
    assert "No such file" in str(probe(str(tmp_path / "python3.12"), "3.12"))


def test_no_python_names_every_reason_and_remedy(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path, params(python="/no/such/python"))
    with pytest.raises(NoPython, match=r"/no/such/python: No such file.*apt install.*runtime_python_mirror.*pyenv"):
        runtime.choose_python(tmp_path)


def test_a_chosen_python_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer one that appears on the PATH must not rebuild everything."""
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime/state.json").write_text(json.dumps({"python": "/before/python"}))
    works = {"/before/python": Python("/before/python", "/before", "3.12.1")}
    monkeypatch.setattr(kit_runtime, "probe", lambda command, version: works.get(command, f"{command}: no"))
    assert Runtime(tmp_path, params()).choose_python(tmp_path).executable == "/before/python"


def test_link_is_switched_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "bin/tool"
    link(path, "one")
    link(path, "two")
    link(path, "two")
    assert os.readlink(path) == "two"
    assert os.listdir(path.parent) == ["tool"]


def test_current_is_what_was_asked_for_and_is_there(tmp_path: Path) -> None:
    root = tmp_path / "runtime"
    (root / "venv").mkdir(parents=True)
    (root / "venv/.complete").touch()
    (root / "bin").mkdir()
    (root / "bin/uv").touch()
    runtime = Runtime(tmp_path, params())
    assert not runtime.is_current()
    (root / "state.json").write_text(json.dumps({"inputs": runtime.inputs, "links": ["bin/uv"]}))
    assert runtime.is_current()
    assert not Runtime(tmp_path, params(requirements="redis==2.0")).is_current()
    (root / "bin/uv").unlink()
    assert not runtime.is_current()
    (root / "state.json").write_text("{half")
    assert not runtime.is_current()


def test_lock_file_is_complete_and_sorted() -> None:
    text = lock_runtime.LOCK.read_text()
    lock = yaml.safe_load(text)["runtime_lock"]
    assert text == lock_runtime.render(lock), "edited by hand? `make runtime-lock` writes it"
    for tool in ("go", "node", "patchelf", "uv"):
        (platforms,) = lock[tool].values()
        assert sorted(platforms) == sorted(lock_runtime.PLATFORMS), tool


def test_requirements_are_those_that_are_pinned() -> None:
    folder = lock_runtime.ROLE / "files"
    wanted = [line.split()[0] for line in (folder / "requirements.in").read_text().splitlines() if line[0] != "#"]
    pinned = (folder / "requirements.txt").read_text()
    for requirement in wanted:
        name, version = requirement.split("==")
        name = name.split("[")[0]
        assert f"\n{name}=={version} \\\n    --hash=sha256:" in pinned, f"{requirement}: run `make runtime-lock`"
