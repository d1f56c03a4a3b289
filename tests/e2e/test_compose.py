"""Compose mode by a throw-away user of the group docker, on an engine without an image registry.

Dify's API and web server are built by the deploy, of upstream's Dockerfile and the builds of source mode; everything
else is made by tests/compose from package registries.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import go_programs
from tests.compose import images
from tests.compose.engine import REGISTRY, docker
from tests.e2e.containers import containers, user_of_docker
from tests.e2e.harness import RELEASE, TIMINGS, WORK, Person, Timing, expect_answer
from tests.e2e.machine import machine
from tests.e2e.picture import expect_picture
from tests.e2e.ssh import expect_as_before

HOUR = 3600
NAME = "kit-e2e-compose"
# Neither of them comes back: one has done its work, the other is run by nobody at a deploy's end.
ONE_SHOT = {"init_permissions"}


@pytest.fixture(scope="module")
def deployed() -> Iterator[tuple[Person, str]]:
    """The user after the first deploy, by `build`, and the answer that every later one must equal."""
    with user_of_docker(NAME) as person:
        person.make("deploy", HOUR, title="first deploy, images by build")
        answer = person.first_answer()
        yield person, answer


class Archive(NamedTuple):
    """All images of the site in one file, and its checksum."""

    path: Path
    sha256: str

    def settings(self, path: Path) -> dict[str, str]:
        """What a site says that has it at that path."""
        return {
            "dify_compose_images": "archive",
            "dify_compose_archive": str(path),
            "dify_compose_archive_sha256": self.sha256,
        }


@pytest.fixture(scope="module")
def archive(deployed: tuple[Person, str]) -> Iterator[Archive]:
    """What `make images-archive` makes of the site as it is now."""
    person, _ = deployed
    made = person.run(f"make images-archive ARGS='--output {person.home}/images.tar'", HOUR, "images-archive")
    assert made.status == 0, made.tail()
    path = WORK / "dify-images.tar"
    shutil.move(person.home / "images.tar", path)
    yield Archive(path, Path(f"{person.home}/images.tar.sha256").read_text().split()[0])
    path.unlink()


def process(container: str) -> int:
    """The pid of its first process, 0 when there is none."""
    return int(docker("inspect", "--format", "{{.State.Pid}}", container))


def test_second_deploy_changes_nothing(deployed: tuple[Person, str]) -> None:
    person, answer = deployed
    before = containers(NAME)
    outcome = person.make("deploy", 600, title="second deploy, nothing to do")
    assert outcome.changed == 0, f"the second deploy changed something:\n{outcome.tail()}"
    assert containers(NAME) == before
    assert person.answer() == answer


def test_checks_pass(deployed: tuple[Person, str]) -> None:
    person, _ = deployed
    assert " passed" in person.make("check", 600).output


@pytest.mark.long
def test_a_host_over_ssh_is_the_same(deployed: tuple[Person, str]) -> None:
    expect_as_before(*deployed)


def test_an_image_that_is_missing_is_named_with_its_remedies(deployed: tuple[Person, str]) -> None:
    person, answer = deployed
    before = containers(NAME)
    person.configure(dify_compose_image={"redis": "registry.invalid/no/such:1"})
    outcome = person.make("deploy", 600, title="an image that is missing", expect=2)
    for said in ("registry.invalid/no/such:1", "no such host", "mirror", "archive", "engine reach"):
        assert said in outcome.output, outcome.tail()
    assert containers(NAME) == before, "it changed something"
    assert person.answer() == answer
    person.configure()


@pytest.mark.long
def test_stopped_and_started_again_data_is_there(deployed: tuple[Person, str]) -> None:
    """Down, which removes containers and networks, and a deploy."""
    person, answer = deployed
    compose_program = f"{person.facts['kit_home']}/runtime/bin/kit-compose"
    assert person.run(f"{compose_program} down", 300, "down").status == 0
    assert not containers(NAME)
    assert person.answer().startswith("error: ")
    person.make("deploy", 900, title="deploy after down")
    # The app that answers is in the database, the model's plugin among the daemon's files.
    assert person.answer() == answer


@pytest.mark.long
def test_killed_containers_come_back(deployed: tuple[Person, str]) -> None:
    """All at once; that each is needed for the answer, only a workflow of everything shows."""
    person, answer = deployed
    killed = {name: (one, process(one)) for name, one in containers(NAME).items() if name not in ONE_SHOT}
    for _, pid in killed.values():
        os.kill(pid, 9)
    begun = time.monotonic()
    person.expect_answer(answer, within=600)
    for name, (one, pid) in killed.items():
        while process(one) in (0, pid):
            assert time.monotonic() - begun < 600, f"{name} did not come back"
            time.sleep(1)
    TIMINGS.append(Timing(NAME, "all containers killed: same answer", time.monotonic() - begun))


@pytest.mark.long
def test_an_api_that_is_made_anew_is_found(deployed: tuple[Person, str]) -> None:
    """Its address in the containers' network is another one then, and a gateway that asks the old one says 502."""
    person, answer = deployed
    before = containers(NAME)["api"]
    again = f"{person.facts['kit_home']}/runtime/bin/kit-compose up --detach --no-deps --force-recreate api"
    assert person.run(again, 300, "api made anew").status == 0
    assert containers(NAME)["api"] != before
    took = person.expect_answer(answer, within=300)
    TIMINGS.append(Timing(NAME, "api made anew: same answer", took))


@pytest.mark.long
def test_from_a_mirror_then_from_an_archive_without_it(
    deployed: tuple[Person, str], request: pytest.FixtureRequest
) -> None:
    person, answer = deployed
    release = images.names(RELEASE)
    used = {release[name] for name in containers(NAME) if name in release}
    with registry() as address:
        for image in sorted(used):
            copy = f"{address}/dify/{image if '/' in image else f'library/{image}'}"
            docker("tag", image, copy)
            docker("push", "--quiet", copy)
            docker("rmi", copy)
        person.configure(dify_compose_images="mirror", dify_compose_mirror=f"{address}/dify")
        person.make("deploy", 900, title="deploy from a mirror")
        running = docker("ps", "--filter", f"label=com.docker.compose.project={NAME}", "--format", "{{.Image}}")
        assert all(image.startswith(f"{address}/dify/") for image in running.splitlines()), running
        assert person.answer() == answer

    archive: Archive = request.getfixturevalue("archive")
    docker("rmi", *sorted(used))
    person.configure(**archive.settings(archive.path))
    person.make("deploy", 900, title="deploy from an archive, no registry")
    assert person.answer() == answer


MOVE = 'deploy ARGS="-e dify_move_data=yes"'


@pytest.mark.long
def test_a_move_that_is_killed_leaves_what_was(deployed: tuple[Person, str]) -> None:
    """While it copies: the containers are the site's as before, and the next move begins again."""
    person, answer = deployed
    home = Path(person.facts["kit_home"])
    person.configure(dify_mode="source")
    # The copying is the first that comes after Redis.
    outcome = person.run(f"make {MOVE}", HOUR, "move-killed", lambda line: 6 if line.startswith("redis ") else None)
    assert outcome.status < 0, outcome.tail()
    assert not (home / "current").exists(), "killed too late: the copy was complete"
    assert person.answer() != answer, "the containers were not stopped yet"
    person.configure()
    person.make("deploy", 900, title="after a killed move, as before")
    assert person.answer() == answer
    assert person.make("deploy", 600, title="after a killed move, nothing to do").changed == 0


@pytest.mark.long
def test_moved_to_source_mode_and_back_with_its_data(deployed: tuple[Person, str]) -> None:
    person, answer = deployed
    home = Path(person.facts["kit_home"])

    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    kept = files(home / "var/compose/storage")
    assert any("privkeys" in name for name in kept)
    person.configure(dify_mode="source")
    refused = person.make("deploy", 600, title="another mode, refused", expect=2)
    assert "dify_move_data=yes" in refused.output, refused.tail()
    assert "One problem." in refused.output, refused.tail()  # its own containers' ports are none
    assert person.answer() == answer

    person.make(MOVE, HOUR, title="moved to source mode")
    assert not containers(NAME)
    assert person.answer() == answer
    assert files(home / "var/storage") >= kept
    [aside] = home.glob("var/moved/compose-*")
    assert files(aside / "compose/storage") == kept
    assert person.make("deploy", 600, title="source mode, nothing to do").changed == 0
    assert " passed" in person.make("check", 600).output

    person.configure()
    person.make(MOVE, HOUR, title="moved into containers")
    assert person.answer() == answer
    assert files(home / "var/compose/storage") >= kept
    assert not (home / "var/postgres").exists()
    assert person.make("deploy", 600, title="containers, nothing to do").changed == 0
    assert " passed" in person.make("check", 600).output


def test_a_model_that_sees_is_asked_from_containers(deployed: tuple[Person, str]) -> None:
    """Late, for its answer is another than that of the tests before."""
    expect_picture(deployed[0])


@pytest.mark.long
def test_a_machine_of_its_own_with_systemd(deployed: tuple[Person, str], archive: Archive) -> None:
    """Deployed over SSH, by a user of its group docker; what runs there comes back with it when it boots."""
    person, answer = deployed
    person.make("stop", 300)  # memory for two there is not everywhere
    settings = {"dify_mode": "compose", **archive.settings(Path("/mnt", archive.path.name))}
    if verify := person.settings.get("dify_source_verify"):
        settings["dify_source_verify"] = verify
    with machine(person, settings, archive.path) as host:
        host.make("deploy", HOUR)
        assert host.answer() == answer
        outcome = host.make("deploy", 600, title="another machine: second deploy, nothing to do")
        assert outcome.changed == 0, f"the second deploy changed something:\n{outcome.tail()}"
        assert " passed" in host.make("check", 600).output
        host.boot()
        TIMINGS.append(
            Timing(NAME, "another machine boots: same answer", expect_answer(host.answer, answer, within=900))
        )
        assert host.make("deploy", 600, title="another machine: after its boot, nothing to do").changed == 0


@contextlib.contextmanager
def registry() -> Iterator[str]:
    """An image registry on loopback, where Docker needs no certificate; its address."""
    program = go_programs.build(*REGISTRY, "cmd/registry")
    address, folder = "127.0.0.1:21899", WORK / "registry"
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "config.yml"
    settings.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}}}}}\nhttp: {{addr: '{address}'}}\n"
    )
    with (WORK / "registry.log").open("w") as log:
        server = subprocess.Popen([str(program), "serve", str(settings)], stdout=log, stderr=log)
        try:
            while server.poll() is None:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", 21899)).close()
                    break
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            server.wait()
            shutil.rmtree(folder)
