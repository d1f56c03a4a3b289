"""Put a Dify plugin's Python packages into its package, so that a host without any package index can install it.

    make plugin-package PLUGIN=json_process.difypkg

Takes a package or a plugin's folder and writes `<author>-<name>_<version>-linux-<machine>.difypkg`: the same files, a
folder `wheels`, and a `requirements.txt` that names exactly these wheels by hash and no index. `uv.lock` and
`pyproject.toml` are left out, because by them the plugin daemon would ask the addresses that they name. The result is
for any Dify, not only for the kit's; it is not signed, since the original's signature does not cover it: `make deploy`
signs it with the site's key.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from packaging.tags import Tag
from packaging.utils import parse_wheel_filename

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plugins"))
from module_utils.kit_plugin import PackageError, identity

PYTHON = (3, 12)  # what the plugin daemon asks for
GLIBC = (2, 28)  # the oldest of the kit's hosts
# What tools leave behind, and what a developer keeps beside a plugin.
LEFT_OUT = {"__pycache__", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".git", ".env"}
# Said by the new requirements.txt, or no longer true of a package with other files.
REPLACED = {"requirements.txt", "pyproject.toml", "uv.lock", ".verification.dify.json"}


def files_of(plugin: Path) -> dict[str, bytes]:
    """A plugin's files by name.

    Raises:
        PackageError: it is neither a package nor a plugin's folder.
    """
    if plugin.is_dir():
        ignored = (plugin / ".difyignore").read_text().split() if (plugin / ".difyignore").is_file() else []
        files = {}
        for path in sorted(plugin.rglob("*")):
            name = path.relative_to(plugin)
            left_out = set(name.parts) & LEFT_OUT or any(
                fnmatch.fnmatch(part, pattern.strip("/"))
                for pattern in ignored
                for part in (*name.parts, name.as_posix())
            )
            if path.is_file() and not left_out:
                files[name.as_posix()] = path.read_bytes()
    else:
        try:
            with zipfile.ZipFile(plugin) as archive:
                files = {member.filename: archive.read(member) for member in archive.infolist() if not member.is_dir()}
        except (OSError, zipfile.BadZipFile) as error:
            raise PackageError(f"{plugin} is no plugin package ({error}).\nRemedy: PLUGIN=x.difypkg") from None
        outside = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
        if outside:
            raise PackageError(f"{plugin} would write outside its folder ({outside[0]}).\nRemedy: do not install it.")
    if "manifest.yaml" not in files:
        raise PackageError(f"{plugin} holds no manifest.yaml.\nRemedy: PLUGIN= a .difypkg or a plugin's folder.")
    return files


def run(*command: str) -> None:
    """A tool of the kit's environment; PackageError with its last words if it fails."""
    # Nothing is run with the plugin's Python here: its version is a figure to resolve for.
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise PackageError(
            f"`{' '.join(Path(word).name for word in command[:4])}` failed:\n{done.stdout.strip()[-2000:]}\n"
            "Remedy: mend what it names. The package index is the one of UV_DEFAULT_INDEX or PIP_INDEX_URL, else PyPI."
        )


def pin(folder: Path, machine: str, uv: str) -> Path:
    """Writes what the plugin in `folder` needs on such a machine, each at one version and by hash; returns the file."""
    # In the daemon's order: what it would install is what is packed.
    source, more = folder / "pyproject.toml", []
    if (folder / "uv.lock").is_file() and source.is_file():
        locked = folder / "locked.txt"
        export = [uv, "export", "--frozen", "--no-dev", "--no-emit-project", "--quiet", "--project", str(folder)]
        run(*export, "--no-config", "--format", "requirements.txt", "--output-file", str(locked))
        source, more = locked, ["--no-deps"]
    elif not source.is_file():
        source = folder / "requirements.txt"
    if not source.is_file():
        raise PackageError("The plugin has neither pyproject.toml nor requirements.txt.\nRemedy: ask its author.")
    pins = folder / "pins.txt"
    target = f"{machine}-manylinux_{GLIBC[0]}_{GLIBC[1]}"
    run(
        *[uv, "pip", "compile", "--quiet", "--no-config", str(source), "--output-file", str(pins), *more],
        *["--python-version", ".".join(map(str, PYTHON)), "--python-platform", target],
        *["--generate-hashes", "--no-annotate", "--no-header"],
    )
    return pins


def platforms(machine: str) -> list[str]:
    """Platform tags of wheels that run on such a machine."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC[1], 4, -1)]
    return [*tags, *(f"{old}_{machine}" for old in ("manylinux2014", "manylinux2010", "manylinux1", "linux"))]


def download(pins: Path, machine: str, uv: str, wheels: Path) -> None:
    """Fetches a wheel of every pin for such a machine; builds those that there is only the source of.

    Raises:
        PackageError: one cannot be had, or was built for this machine alone.
    """
    run(
        *[sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"],
        *["--no-deps", "--require-hashes", "--requirement", str(pins), "--dest", str(wheels)],
        *["--implementation", "cp", "--python-version", ".".join(map(str, PYTHON))],
        *(f"--abi={abi}" for abi in (f"cp{PYTHON[0]}{PYTHON[1]}", "abi3", "none")),
        *(f"--platform={tag}" for tag in platforms(machine)),
    )
    for source in sorted(path for path in wheels.iterdir() if path.suffix != ".whl"):
        with tempfile.TemporaryDirectory() as built:
            run(uv, "build", "--quiet", "--no-config", "--wheel", str(source), "--out-dir", built)
            [wheel] = Path(built).glob("*.whl")
            if Tag("py3", "none", "any") not in parse_wheel_filename(wheel.name)[3]:
                raise PackageError(
                    f"{source.name} is published as source only, and what is built of it ({wheel.name}) runs on this "
                    "machine only.\nRemedy: build its wheel with Python 3.12 on a machine like the host, put it into a "
                    "package index of yours, and name that by UV_DEFAULT_INDEX and PIP_INDEX_URL."
                )
            (wheels / wheel.name).write_bytes(wheel.read_bytes())
        source.unlink()


def requirements(wheels: Path, machine: str) -> str:
    """The text of a requirements.txt that names the wheels beside it and nothing else."""
    lines = [
        f"# For Linux on {machine} with Python {PYTHON[0]}.{PYTHON[1]}, packed with its wheels: nothing else is asked.",
        "--no-index",
        "--find-links ./wheels/",
    ]
    for wheel in sorted(wheels.iterdir()):
        name, version = parse_wheel_filename(wheel.name)[:2]
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}")
    return "\n".join(lines) + "\n"


def packed(files: dict[str, bytes]) -> bytes:
    """A package of these files; the same files give the same package."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_STORED if name.endswith(".whl") else zipfile.ZIP_DEFLATED
            archive.writestr(member, content)
    return stream.getvalue()


def package(plugin: Path, machine: str, output: Path) -> tuple[Path, dict[str, bytes]]:
    """Writes the plugin's package with its wheels into the folder `output`; returns its path and its files.

    Raises:
        PackageError: with what to do.
    """
    uv = str(Path(sys.executable).with_name("uv"))
    files = files_of(plugin)
    name = identity(files["manifest.yaml"].decode())
    with tempfile.TemporaryDirectory(prefix="plugin-") as temporary:
        folder, wheels = Path(temporary, "plugin"), Path(temporary, "wheels")
        wheels.mkdir()
        for member in set(files) & REPLACED - {".verification.dify.json"}:
            (folder / member).parent.mkdir(parents=True, exist_ok=True)
            (folder / member).write_bytes(files[member])
        folder.mkdir(exist_ok=True)
        download(pin(folder, machine, uv), machine, uv, wheels)
        files = {name: content for name, content in files.items() if name not in REPLACED and name[:7] != "wheels/"}
        files["requirements.txt"] = requirements(wheels, machine).encode()
        files |= {f"wheels/{wheel.name}": wheel.read_bytes() for wheel in wheels.iterdir()}
    stem = re.sub(r"[^\w.-]", "-", name.replace(":", "_"))
    target = output / f"{stem}-linux-{machine}.difypkg"
    target.write_bytes(packed(files))
    return target, files


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Put a Dify plugin's Python packages into its package.")
    parser.add_argument("plugin", type=Path, help="a .difypkg, or a plugin's folder")
    parser.add_argument("--machine", choices=["x86_64", "aarch64"], default=platform.machine(), help="the host's")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the result (here)")
    options = parser.parse_args()
    # uv and pip are told the same index by different names.
    if index := os.environ.get("KIT_PYPI_INDEX") or os.environ.get("UV_DEFAULT_INDEX"):
        os.environ["UV_DEFAULT_INDEX"] = index
        os.environ.setdefault("PIP_INDEX_URL", index)
    try:
        target, files = package(options.plugin, options.machine, options.output)
    except PackageError as error:
        print(error, file=sys.stderr)
        return 2
    size = sum(map(len, files.values())) / 2**20
    count = sum(name.startswith("wheels/") for name in files)
    print(f"{target}: {count} wheels, {size:.0f} MiB unpacked.")
    print("In the site's settings.yml, then `make deploy`:")
    print(f"dify_plugins:\n  - file: {target.resolve()}")
    if size > 300:
        print(f"plugin_daemon_package_mb: {int(size) + 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
