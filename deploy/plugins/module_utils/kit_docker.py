"""Docker's engine and Compose on a host: are they there, recent enough, and the service user's to use?"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence

from .kit_compose import parse_version
from .kit_report import Problem

# Compose before 2.24.4 reads `!override` as if it were not there, and upstream's ports would stay open.
ENGINE, COMPOSE = (20, 10), (2, 24, 4)
INSTALL = (
    "install Docker's packages: https://docs.docker.com/engine/install/ (docker-ce, docker-compose-plugin); "
    "distributions' own are often too old, or have no Compose"
)


def check_engine(
    run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]], user: str, builds: bool = False
) -> list[Problem]:
    """Whether a usable Engine and Compose are there, asked as the service user; ``run`` runs a command as it.

    ``builds``: whether images are built there.
    """
    try:
        engine = run(["docker", "version", "--format", "{{.Server.Version}}"])
    except OSError:
        return [Problem("Docker is not installed.", "docker on the PATH", INSTALL + ".")]
    problems = []
    if engine.returncode:
        said = (engine.stderr.strip() or engine.stdout.strip()).splitlines()[-1:] or ["(nothing)"]
        if "permission denied" in engine.stderr.lower():
            remedy = f"as root: usermod --append --groups docker {user} (who may use Docker is root there)."
            problems.append(Problem(f"The user {user} may not use Docker.", "/var/run/docker.sock", remedy))
        else:
            remedy = "start it: systemctl enable --now docker; then `docker info` as that user must answer."
            problems.append(Problem(f"Docker's engine does not answer: {said[0]}", "the engine", remedy))
    elif parse_version(engine.stdout)[:2] < ENGINE:
        what = f"Docker Engine is {engine.stdout.strip()}; Dify's Compose file needs 20.10 or later."
        problems.append(Problem(what, "docker version", INSTALL + "."))
    compose = run(["docker", "compose", "version", "--short"])
    if compose.returncode:
        problems.append(Problem("Docker has no Compose plugin.", "docker compose version", INSTALL + "."))
    elif parse_version(compose.stdout) < COMPOSE:
        what = f"Docker Compose is {compose.stdout.strip()}; the kit's override needs 2.24.4 or later."
        problems.append(Problem(what, "docker compose version", INSTALL + "."))
    if builds:
        client = run(["docker", "version", "--format", "{{.Client.Version}}"]).stdout.strip()
        # Older clients have BuildKit in them.
        if parse_version(client)[:1] >= (23,) and run(["docker", "buildx", "version"]).returncode:
            what = f"Docker's client {client} has no buildx plugin, without which it cannot build Dify's images."
            remedy = (
                "install docker-buildx-plugin (Debian, Ubuntu: docker-buildx), or have the images otherwise: "
                "dify_compose_images: pull, mirror or archive."
            )
            problems.append(Problem(what, "docker buildx version", remedy))
    return problems
