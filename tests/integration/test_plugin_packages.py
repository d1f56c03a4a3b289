"""Plugins without a network: packages with their wheels, installed by the kit's uv as the plugin daemon calls it.

The network is cut by a namespace of its own for each installation. That the daemon itself is content is for
tests/e2e/test_plugins.py, which has one.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import jinja2
import jinja2.nativetypes
import plugin_package
import pytest
import yaml
from module_utils import kit_network

from tests.integration.conftest import python312

REPO = Path(__file__).resolve().parents[2]
PLUGIN = REPO / "inference" / "provider_plugin"
UV = str(Path(sys.executable).with_name("uv"))
MANIFEST = "version: 0.0.1\ntype: plugin\nauthor: somebody\nname: small\n"
# A plugin of the common kind, with a lockfile that names PyPI's own addresses.
PROJECT = '[project]\nname = "small"\nversion = "0.1.0"\nrequires-python = ">=3.12"\ndependencies = ["idna>=3"]\n'
# The daemon's secrets, and what a plugin needs of its environment.
DAEMON = {"DB_PASSWORD": "p4ssw0rd", "SERVER_KEY": "k3y", "DIFY_INNER_API_KEY": "k3y", "REDIS_PASSWORD": "p4ssw0rd"}
NETWORK = {
    "https_proxy": "http://proxy:3128",
    "NO_PROXY": "127.0.0.1",
    "SSL_CERT_FILE": "/ca",
    "CURL_CA_BUNDLE": "/ca",
    "MAX_REQUEST_TIMEOUT": "900",
    "INSTALL_METHOD": "local",
}

Wrapper = Callable[..., Path]


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Wrapper:
    """Makes the role's script for uv, as it is on a host; each has a cache of its own, or the one that is given."""
    python = python312(UV)
    if not python:
        pytest.skip("no Python 3.12 on this machine: install one, or let uv fetch it (uv python install 3.12)")
    template = (REPO / "roles/plugin_daemon/templates/uv-for-plugins.j2").read_text()

    def make(cache: Path | None = None, index: str = "") -> Path:
        home = tmp_path_factory.mktemp("kit-home")
        script = home / "runtime/bin/uv-for-plugins"
        script.parent.mkdir(parents=True)
        (script.parent / "uv").symlink_to(UV)
        (script.parent / "python3.12").symlink_to(python)
        values = {
            "kit_home": str(home),
            "kit_user_home": str(home),
            "kit_cache": str(cache or home / "cache"),
            "kit_ca_bundle": os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"),
            "kit_network_env": {},
            "kit_mirror": {"pypi": index},
        }
        told = yaml.safe_load((REPO / "roles/plugin_daemon/vars/main.yml").read_text())["plugin_daemon_uv"]
        own = jinja2.nativetypes.NativeEnvironment()
        values["plugin_daemon_uv"] = {key: own.from_string(value).render(values) for key, value in told.items()}
        templates = jinja2.Environment(trim_blocks=True)
        templates.filters["kit_certificates_env"] = kit_network.certificates
        script.write_text(templates.from_string(template).render(values))
        script.chmod(0o755)
        return script

    return make


@pytest.fixture(scope="module")
def cut() -> list[str]:
    """Put before a command, it runs without any network: loopback is down, too."""
    command = ["unshare", "--map-root-user", "--net"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no network namespaces here ({tried.stderr.strip()}): run as root, or allow user namespaces")
    return command


def install(
    folder: Path, wrapper: Path, cut: list[str], mirror: str = "", retries: int = 0
) -> subprocess.CompletedProcess[str]:
    """What plugin daemon 0.6.3 does with an unpacked plugin (internal/core/local_runtime), network or not."""
    venv = [str(wrapper), "venv", ".venv", "--python", "3.12"]
    subprocess.run([*cut, *venv], cwd=folder, env={}, check=True, capture_output=True)
    more = ["-i", mirror] if mirror else []
    if (folder / "pyproject.toml").is_file() and not (mirror and (folder / "requirements.txt").is_file()):
        # With a mirror the kit sets PLUGIN_IGNORE_UV_LOCK.
        frozen = ["--frozen"] if (folder / "uv.lock").is_file() and not mirror else []
        command = [str(wrapper), "sync", "--no-dev", *frozen, *more, "-v"]
    else:
        command = [str(wrapper), "pip", "install", *more, "-r", "requirements.txt", "-vvv"]
    environment = {
        "VIRTUAL_ENV": str(folder / ".venv"),
        "PATH": "/usr/bin:/bin",
        "UV_CACHE_DIR": str(folder / "unused"),
    }
    environment["UV_HTTP_RETRIES"] = str(retries)  # the tests' own: a cut network stays cut
    return subprocess.run([*cut, *command], cwd=folder, env=environment, capture_output=True, text=True)


def imports(folder: Path, module: str) -> bool:
    """Whether the plugin's own Python has a module."""
    return subprocess.run([folder / ".venv/bin/python", "-c", f"import {module}"], cwd=folder).returncode == 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small plugin's folder, locked."""
    folder = tmp_path_factory.mktemp("source") / "small"
    folder.mkdir()
    for name, text in {"manifest.yaml": MANIFEST, "pyproject.toml": PROJECT, "main.py": "import idna\n"}.items():
        (folder / name).write_text(text)
    subprocess.run([UV, "lock", "-q", "--no-config", "--python", python312(UV), "--project", str(folder)], check=True)
    assert "files.pythonhosted.org" in (folder / "uv.lock").read_text()
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """`make plugin-package`, and the daemon's unpacking of the result."""

    @functools.cache
    def package(source: Path) -> Path:
        output = tmp_path_factory.mktemp("packed")
        return plugin_package.package(source, os.uname().machine, output)[0]

    def pack(source: Path) -> Path:
        folder = tmp_path_factory.mktemp("unpacked")
        with zipfile.ZipFile(package(source)) as archive:
            archive.extractall(folder)
        return folder

    return pack


def test_without_a_network_a_lockfile_alone_is_not_enough(
    small: Path, tmp_path: Path, wrapper: Wrapper, cut: list[str]
) -> None:
    # The control: what follows would fail without the wheels.
    plain = shutil.copytree(small, tmp_path / "plain")
    done = install(plain, wrapper(), cut)
    assert done.returncode != 0
    assert "files.pythonhosted.org" in done.stderr


@pytest.mark.parametrize("mirror", ["", "http://127.0.0.1:9/simple"])
def test_a_packed_plugin_asks_nobody(
    small: Path, packed: Callable[[Path], Path], wrapper: Wrapper, cut: list[str], mirror: str
) -> None:
    folder = packed(small)
    assert not {"uv.lock", "pyproject.toml"} & {path.name for path in folder.iterdir()}
    done = install(folder, wrapper(index=mirror), cut, mirror)
    assert done.returncode == 0, done.stderr
    assert imports(folder, "idna")


def test_a_locked_plugin_takes_everything_from_the_sites_mirror(
    small: Path, packed: Callable[[Path], Path], wrapper: Wrapper, cut: list[str], tmp_path: Path
) -> None:
    # The mirror is all that there is in the namespace; what it lists is in reach, what uv.lock names is not.
    [wheel] = (packed(small) / "wheels").glob("idna-*.whl")
    page = tmp_path / "mirror/simple/idna/index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    shutil.copy(wheel, page.parent)
    serve = 'ip link set lo up; "$0" -m http.server -b 127.0.0.1 -d "$1" 8000 >&2 & shift; exec "$@"'
    inside = [*cut, "--pid", "--fork", "--kill-child", "sh", "-c", serve, sys.executable, str(tmp_path / "mirror")]
    mirror = "http://127.0.0.1:8000/simple"
    folder = shutil.copytree(small, tmp_path / "plugin")
    done = install(folder, wrapper(index=mirror), inside, mirror, retries=5)
    assert done.returncode == 0, done.stderr
    assert imports(folder, "idna")


def test_the_kits_own_plugin_packed(packed: Callable[[Path], Path], wrapper: Wrapper, cut: list[str]) -> None:
    folder = packed(PLUGIN)
    assert "requirements.in" not in {path.name for path in folder.iterdir()}
    done = install(folder, wrapper(), cut)
    assert done.returncode == 0, done.stderr
    assert imports(folder, "dify_plugin, imagesize")


def test_a_package_of_another_tool_that_kept_the_lockfile(
    small: Path, packed: Callable[[Path], Path], wrapper: Wrapper, cut: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(small, tmp_path / "other")
    shutil.copytree(packed(small) / "wheels", folder / "wheels")
    done = install(folder, wrapper(), cut)
    assert done.returncode == 0, done.stderr
    assert imports(folder, "idna")


@pytest.mark.parametrize("kind", ["uv.lock", "requirements.txt"])
def test_what_is_pinned_comes_from_the_cache(
    small: Path, tmp_path: Path, wrapper: Wrapper, cut: list[str], kind: str
) -> None:
    script = wrapper(cache=tmp_path / "cache")
    if kind == "requirements.txt":  # with hashes, as the kit's own plugin has it
        export = [UV, "export", "-q", "--no-config", "--frozen", "--no-emit-project", "--project", str(small)]
        small = shutil.copytree(small, tmp_path / "hashed")
        subprocess.run([*export, "-o", str(small / kind)], check=True)
        (small / "uv.lock").unlink()
        (small / "pyproject.toml").unlink()
    first = shutil.copytree(small, tmp_path / "first")
    assert install(first, script, []).returncode == 0
    again = shutil.copytree(small, tmp_path / "again")
    done = install(again, script, cut)
    assert done.returncode == 0, done.stderr
    assert imports(again, "idna")


def test_a_damaged_wheel_is_refused(
    small: Path, packed: Callable[[Path], Path], wrapper: Wrapper, cut: list[str]
) -> None:
    folder = packed(small)
    [wheel] = (folder / "wheels").glob("idna-*.whl")
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"!")
    done = install(folder, wrapper(), cut)
    assert done.returncode != 0
    assert "idna" in done.stderr


def test_a_plugin_gets_none_of_the_daemons_secrets(small: Path, tmp_path: Path, wrapper: Wrapper) -> None:
    folder = shutil.copytree(small, tmp_path / "plugin")
    assert install(folder, wrapper(), []).returncode == 0
    # In a process's environment as the kernel shows it, with a value over two lines.
    shown = "import os, sys; print(open('/proc/self/environ').read().replace('\\0', '\\n'), sys.prefix, sep='\\n')"
    environment = {**DAEMON, **NETWORK, "PATH": "/usr/bin:/bin", "HOME": "/x", "S3_SECRET": "p4ssw0rd\nk3y=k3y"}
    said = subprocess.run([folder / ".venv/bin/python", "-c", shown], env=environment, capture_output=True, text=True)
    *lines, prefix = said.stdout.split("\n")[:-1]
    assert prefix == str(folder / ".venv")
    got = dict(line.split("=", 1) for line in lines if line)
    got.pop("PWD", None)  # sh's own
    assert got == {**NETWORK, "PATH": "/usr/bin:/bin", "HOME": "/x"}
