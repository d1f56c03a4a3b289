"""A Docker engine with Compose, on a machine where neither runs yet."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests import go_programs

# Everything large lies here and outlives a run: the engine's images.
WORK = Path(os.environ.get("KIT_COMPOSE_DIR") or "/var/tmp/kit-compose")
# A newer client may lack its buildx plugin, without which it builds nothing; Debian's own has no need of it.
DOCKER = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else shutil.which("docker") or "docker"
COMPOSE = ("github.com/docker/compose/v5", "v5.5.1")
# 2.24.4 is the oldest that will do, but not every module proxy has it.
OLDEST_COMPOSE = ("github.com/docker/compose/v2", "v2.24.5")
BUILDX = ("github.com/docker/buildx", "v0.38.2")
REGISTRY = ("github.com/distribution/distribution/v3", "v3.1.2")


class Lacking(Exception):
    """This machine lacks something; the message says what, and what would give it."""


def say(text: str) -> None:
    """One line for whoever watches, with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def docker(*arguments: str, check: bool = True, timeout: float = 1800) -> str:
    """A command's output; with ``check``, what it complained of is in the error.

    Raises:
        Lacking: there is no client.
        RuntimeError: it failed.
    """
    if not shutil.which(DOCKER):
        raise Lacking("no Docker client here: apt-get install docker.io")
    done = subprocess.run([DOCKER, *arguments], capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def answers() -> str:
    """The engine's version, blank where none answers at the default socket."""
    return docker("version", "--format", "{{.Server.Version}}", check=False)


@contextlib.contextmanager
def engine() -> Iterator[str]:
    """An engine at the default socket, started where none answers there; its version.

    What was started ends with the context; its images stay for the next run.

    Raises:
        Lacking: there is no engine, and none can be started.
    """
    if version := answers():
        yield version
        return
    if os.geteuid() != 0:
        raise Lacking("no Docker engine answers here, and only root can start one")
    if not shutil.which("dockerd"):
        raise Lacking("no Docker engine here: apt-get install docker.io iptables")
    WORK.mkdir(parents=True, exist_ok=True)
    log = (WORK / "dockerd.log").open("w")
    argv = ["dockerd", "--data-root", str(WORK / "engine"), "--exec-root", "/run/kit-docker"]
    argv += ["--pidfile", "/run/kit-docker.pid", "--group", "docker"]
    process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            if version := answers():
                break
            if process.poll() is not None:
                said = (WORK / "dockerd.log").read_text().splitlines()[-1:]
                raise Lacking(f"dockerd ended {process.returncode}: {said}; it needs a machine that is not a container")
            time.sleep(0.1)
        else:
            raise Lacking(f"dockerd did not answer within a minute, see {log.name}")
        say(f"engine {version} started, its images are in {WORK}/engine")
        yield version
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        log.close()


def compose(home: Path) -> str:
    """Compose for the user of that home, unless the client has it already; its version."""
    # Root may have one of its own, which nobody else has.
    ask = [DOCKER, "--config", str(home / ".docker"), "compose", "version", "--short"]
    installed = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    if not installed:
        install_compose(home)
        installed = COMPOSE[1]
    return installed


def buildx(home: Path) -> str:
    """What builds images for the user of that home, a plugin unless the client needs none or has one; its version."""
    client = shutil.which("docker") or DOCKER
    version = subprocess.run([client, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    if int(version.split(".")[0]) < 23:
        return f"Docker {version} itself"
    ask = [client, "--config", str(home / ".docker"), "buildx", "version"]
    if found := subprocess.run(ask, capture_output=True, text=True).stdout.strip():
        return found
    install_plugin(home, "docker-buildx", BUILDX, "cmd/buildx", "version.Version")
    return f"buildx {BUILDX[1]}"


def install_compose(home: Path, module: tuple[str, str] = COMPOSE) -> None:
    """Compose for the user of that home, built from its Go module of that version."""
    install_plugin(home, "docker-compose", module, "cmd", "internal.Version")


def install_plugin(home: Path, name: str, module: tuple[str, str], package: str, variable: str) -> None:
    """A plugin of Docker's client, built from a package of its Go module; the variable there is its version."""
    path, version = module
    program = go_programs.build(path, version, package, f"-X {path}/{variable}={version}")
    target = home / ".docker/cli-plugins" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(program, target)
