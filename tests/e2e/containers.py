"""Who deploys in compose mode, and what runs then."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.compose import images
from tests.compose.engine import Lacking, buildx, compose, docker, engine
from tests.e2e.harness import RELEASE, TIMINGS, WORK, Person, Timing, dify_reachable, say


@contextlib.contextmanager
def user_of_docker(name: str, **settings: Any) -> Iterator[Person]:
    """A throw-away user of the group docker, on an engine that has the images; its project is called as it is."""
    if not dify_reachable():
        pytest.skip("Dify's source cannot be had here, see above; its images are built from it")
    with contextlib.ExitStack() as stack:
        try:
            version = stack.enter_context(engine())
            for one in images.make(RELEASE, WORK / "cache"):
                took = "image was there already: " if one.cached else "image: "
                TIMINGS.append(Timing(name, took + one.name, one.seconds))
        except Lacking as lacking:
            pytest.skip(f"{lacking}")
        own = {"dify_mode": "compose", "dify_compose_project": name, "dify_compose_images": "build"}
        person = Person(name, settings=own | settings)
        stack.callback(remove, person)
        subprocess.run(["usermod", "--append", "--groups", "docker", name], check=True)
        say(f"engine {version}, Compose {compose(person.home)}, builds by {buildx(person.home)}")
        person.own(person.home)
        person.lend_cache()
        yield person


def remove(person: Person) -> None:
    """The containers, what their users have written, and then the person."""
    outcome = person.run('make uninstall ARGS="-e kit_delete_data=yes"', 300, "uninstall")
    left = (person.home / "dify-kit").exists()
    for container in containers(person.name).values():
        docker("rm", "--force", container)
    shutil.rmtree(person.home / "dify-kit", ignore_errors=True)
    person.remove()
    assert not outcome.status, outcome.tail()
    assert not left, "data is left"


def containers(project: str) -> dict[str, str]:
    """Service -> id of its container, running or not."""
    label = "com.docker.compose"
    form = f'{{{{.Label "{label}.service"}}}} {{{{.ID}}}}'
    lines = docker("ps", "--all", "--filter", f"label={label}.project={project}", "--format", form).splitlines()
    return dict(line.split() for line in lines)
