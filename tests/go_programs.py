"""Servers written in Go that no package registry has as a program, built from the module that it does have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import yaml
from ansible.module_utils import kit_fetch, kit_runtime

ROOT = Path(__file__).resolve().parents[1]
# Outlives a run: a build takes minutes.
PROGRAMS = Path(os.environ.get("KIT_TEST_PROGRAMS") or "/var/tmp/kit-test-programs")


def build(module: str, version: str, package: str, ldflags: str = "") -> Path:
    """The program of a module's package (its folder there), built unless it was before.

    ``ldflags`` are the linker's, beside those that leave out what only a debugger reads.
    Not by `go install`: that refuses modules which replace or exclude others.
    """
    program = PROGRAMS / f"{module.replace('/', '-')}-{version}" / Path(package).name
    if program.exists():
        return program
    # A developer's own caches are used where they are named.
    environment = {"GOPATH": str(PROGRAMS / "path"), "GOCACHE": str(PROGRAMS / "cache"), **os.environ}
    environment |= {"GOFLAGS": "-modcacherw", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
    go = find_go()
    found = subprocess.run(
        [go, "mod", "download", "-json", f"{module}@{version}"],
        env=environment, check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    made = program.with_name(f"{program.name}.{os.getpid()}")
    program.parent.mkdir(parents=True, exist_ok=True)
    argv = [go, "build", "-mod=readonly", f"-ldflags=-s -w {ldflags}", "-o", str(made), f"./{package}"]
    subprocess.run(argv, env=environment, check=True, cwd=json.loads(found.stdout)["Dir"])
    made.rename(program)
    return program


def find_go() -> str:
    """The machine's Go, or the one that the kit pins for hosts."""
    if found := shutil.which("go"):
        return found
    folder = PROGRAMS / "go"
    if not (folder / "bin/go").exists():
        lock = yaml.safe_load((ROOT / "roles/runtime/vars/main/lock.yml").read_text())["runtime_lock"]
        artefact = kit_runtime.pick(lock, "go", "", kit_runtime.host_platform())
        PROGRAMS.mkdir(parents=True, exist_ok=True)
        kit_fetch.unpack(artefact, kit_fetch.fetch(artefact, PROGRAMS, os.environ.get("GOPROXY", "")), folder)
    return str(folder / "bin/go")
