"""The images of Dify's Compose file, under upstream's names, on a machine that reaches no image registry.

`python -m tests.compose.images` makes them; `--cache` names a `kit_cache` in which the kit has built the release.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.compose.engine import DOCKER, WORK, Lacking, docker, engine, say

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CA = Path("/etc/ssl/certs/ca-certificates.crt")
BASE = "kit-test/base:latest"
MACHINE = "kit-test/machine:latest"
# What the kit builds Dify's own images on (dify_compose_base_images): the names are the defaults'.
PYTHON, NODE = "python:3.12-slim-bookworm", "node:22-bookworm-slim"
# For Python, for the health checks, and what more than one image needs; small, as the sandbox copies its libraries.
PACKAGES = (
    *("ca-certificates", "curl", "libmagic1", "libseccomp2", "tini", "util-linux"),
    *("libbz2-1.0", "libexpat1", "libffi8", "liblzma5", "libncursesw6", "libreadline8", "libsqlite3-0", "libssl3"),
)
# Service -> the target in services/Dockerfile or parts.Dockerfile. API and web server are not here: the kit builds
# these images itself (dify_compose_images: build).
SERVICES = {
    "init_permissions": "busybox",
    "db_postgres": "postgres",
    "pgvector": "pgvector",
    "redis": "redis",
    "ssrf_proxy": "squid",
}
PARTS = {
    "plugin_daemon": "plugin-daemon",
    "sandbox": "sandbox",
    "agent_backend": "agent-backend",
    "local_sandbox": "agent-runtime",
}


class Made(NamedTuple):
    """An image: its name, the seconds it took (0 when it was there), whether it was there, and its size in bytes."""

    name: str
    seconds: float
    cached: bool
    size: int


def names(release: str) -> dict[str, str]:
    """Service -> the image that compose mode runs for it."""
    known = yaml.safe_load((ROOT / f"deploy/releases/{release}.yml").read_text())["compose"]["services"]
    pinned = yaml.safe_load((ROOT / "roles/dify_compose/vars/main.yml").read_text())["dify_compose_pinned"]
    return {**known, **pinned}


@functools.cache
def python_prefix() -> Path:
    """The folder of a Python 3.12 of this machine that can be copied.

    Raises:
        Lacking: there is none.
    """
    from tests.e2e import harness

    found = harness.readable_python() or shutil.which("python3.12") or ""
    ask = [found, "-c", "import sys; print(sys.base_prefix)"]
    prefix = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if found else ""
    if prefix in ("", "/usr"):
        raise Lacking("no Python 3.12 here that can be copied into an image: uv python install 3.12 brings one")
    return Path(prefix)


def part(cache: Path, name: str) -> str:
    """The folder of the newest build of a part in a kit_cache.

    Raises:
        Lacking: the kit has not built it there.
    """
    found = sorted((cache / "builds").glob(f"{name}-*{platform.machine()}-*"), key=os.path.getmtime)
    if not found:
        raise Lacking(f"{cache}/builds has no {name}: the end-to-end tests of source mode build it (make e2e)")
    return found[-1].name


def digest(*inputs: object) -> str:
    """What an image is known by: as long as this is the same, it need not be made again."""
    return hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()[:16]


def existing(name: str, key: str) -> Made | None:
    """The image of that name, if it was made from the same."""
    said = docker("image", "inspect", "--format", '{{index .Config.Labels "kit.key"}} {{.Size}}', name, check=False)
    return Made(name, 0, True, int(said.split()[1])) if said.split()[:1] == [key] else None


def made(name: str, begun: float) -> Made:
    """What has just been made."""
    size = int(docker("image", "inspect", "--format", "{{.Size}}", name))
    found = Made(name, time.monotonic() - begun, False, size)
    say(f"{name}: {found.seconds:.0f} s, {size / 1e6:.0f} MB")
    return found


def build(name: str, key: str, context: Path, dockerfile: Path, *options: str) -> Made:
    """Build an image unless it is there.

    It has this host's network: where that leads to a package registry, so it does for the build.
    """
    if not (found := existing(name, key)):
        begun = time.monotonic()
        argv = [DOCKER, "build", "--quiet", "--network", "host", "--label", f"kit.key={key}", "--tag", name]
        for variable in ("http_proxy", "https_proxy", "no_proxy"):
            if value := os.environ.get(variable) or os.environ.get(variable.upper()):
                argv += ["--build-arg", f"{variable}={value}"]
        argv += [*options, "--file", str(dockerfile), str(context)]
        done = subprocess.run(argv, env={**os.environ, "DOCKER_BUILDKIT": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}:\n{done.stderr[-6000:]}")
        found = made(name, begun)
    return found


def base() -> Made:
    """Debian of this machine's version with Python 3.12, and what this machine needs to reach package registries.

    Raises:
        Lacking: mmdebstrap or a Python is missing.
    """
    if not shutil.which("mmdebstrap"):
        raise Lacking("no mmdebstrap here, which makes the images' file system: apt-get install mmdebstrap")
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    prefix = python_prefix()
    key = digest(suite, PACKAGES, prefix, CA.read_text(), inspect.getsource(base))
    if found := existing(BASE, key):
        return found
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        overlay = Path(folder, "overlay")
        without = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a")
        shutil.copytree(prefix, overlay / "usr/local", symlinks=True, ignore=without)
        files = {
            "etc/pip.conf": f"[global]\ncert = {CA}\n",
            "etc/uv/uv.toml": "native-tls = true\n",
            str(CA).lstrip("/"): CA.read_text(),
        }
        for name, text in files.items():
            (overlay / name).parent.mkdir(parents=True, exist_ok=True)
            (overlay / name).write_text(text)
        for name, target in {"python": "python3.12", "python3": "python3.12", "pip": "pip3.12"}.items():
            link = overlay / "usr/local/bin" / name
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        subprocess.run(["chmod", "-R", "u=rwX,go=rX", str(overlay)], check=True)
        tar = Path(folder, "base.tar")
        argv = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        argv += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
        argv += [f"--customize-hook=sync-in {overlay} /"]
        argv += ['--customize-hook=chroot "$1" python3.12 -m ensurepip --default-pip', suite, str(tar)]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}:\n{done.stderr[-3000:]}")
        changes = ["--change", f"LABEL kit.key={key}", "--change", "ENV UV_HTTP_TIMEOUT=300", "--change", "CMD bash"]
        docker("import", *changes, str(tar), BASE)
    docker("tag", BASE, PYTHON)
    return made(BASE, begun)


def services(release: str) -> list[Made]:
    """PostgreSQL, Redis and their like."""
    folder = HERE / "services"
    image, identity = names(release), image_id(BASE)
    key = digest(identity, *(path.read_text() for path in sorted(folder.iterdir())))
    return [
        build(image[service], key, folder, folder / "Dockerfile", "--target", target, "--build-arg", f"BASE={BASE}")
        for service, target in SERVICES.items()
    ]


def parts(release: str, cache: Path) -> list[Made]:
    """Dify's programs but for API and web server, and what the latter is built on, out of a kit_cache."""
    image, identity, recipe = names(release), image_id(BASE), HERE / "parts.Dockerfile"
    nodes = sorted(path.name for path in (cache / "downloads").glob("node-22*.tgz"))
    wanted = [(image[service], target, {"PART": part(cache, target)}) for service, target in PARTS.items()]
    wanted.append((NODE, "node", {"NODE": nodes[-1]}))
    found = []
    for name, target, variables in wanted:
        options = {"BASE": BASE, **variables}
        arguments = [word for key, value in options.items() for word in ("--build-arg", f"{key}={value}")]
        key = digest(identity, recipe.read_text(), options)
        found.append(build(name, key, cache, recipe, "--target", target, *arguments))
    return found


def machine() -> Made:
    """A machine rather than a program: systemd, an SSH server, a Docker engine."""
    recipe = HERE / "machine.Dockerfile"
    key = digest(image_id(BASE), recipe.read_text())
    return build(MACHINE, key, HERE, recipe, "--build-arg", f"BASE={BASE}")


def image_id(name: str) -> str:
    """The content's id."""
    return docker("image", "inspect", "--format", "{{.Id}}", name)


def make(release: str, cache: Path) -> list[Made]:
    """All of them, but those that the kit builds.

    Raises:
        Lacking: this machine lacks something for them.
    """
    found = [base(), *services(release), *parts(release, cache)]
    if any(not one.cached for one in found):
        # The stages: as large as the images, and no longer needed.
        docker("builder", "prune", "--all", "--force")
        docker("image", "prune", "--force")
    else:
        say("all images were there already")
    return found


def main() -> None:
    """Make the images and say what each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", default="1.16.0")
    parser.add_argument("--cache", type=Path, required=True)
    options = parser.parse_args()
    with engine():
        for one in make(options.release, options.cache):
            print(
                f"{one.name:<45} {one.size / 1e6:8.0f} MB {'there already' if one.cached else f'{one.seconds:6.0f} s'}"
            )


if __name__ == "__main__":
    main()
