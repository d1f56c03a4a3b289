"""A fresh ordinary user with empty caches: from the clone to an answered question, and what must not break it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.e2e.harness import TIMINGS, Person, Timing, say

HOUR = 3600


@pytest.fixture(scope="module")
def deployed() -> Iterator[tuple[Person, str]]:
    """The user after the first `make deploy`, and the answer that every later one must equal."""
    person = Person("kit-e2e")
    try:
        person.make("deploy", 2 * HOUR, title="first deploy, empty caches")
        answer = person.answer()
        assert answer.strip(), "the answer is empty"
        assert not answer.startswith("error: "), answer
        say(f"{person.name}: the answer is {answer!r}")
        yield person, answer
    finally:
        person.remove()


def test_second_deploy_changes_nothing(deployed: tuple[Person, str]) -> None:
    person, answer = deployed
    outcome = person.make("deploy", 600, title="second deploy, nothing to do")
    assert outcome.changed == 0, f"the second deploy changed something:\n{outcome.tail()}"
    assert person.answer() == answer


def test_checks_pass(deployed: tuple[Person, str]) -> None:
    person, _ = deployed
    outcome = person.make("check", 600)
    assert " passed" in outcome.output


def test_killed_services_come_back(deployed: tuple[Person, str]) -> None:
    person, answer = deployed
    services = person.facts["services"]
    assert set(services) <= set(person.supervised()), "not every service runs before the test"
    for service in services:
        pid = person.supervised()[service]
        os.kill(pid, signal.SIGKILL)
        seconds = person.expect_answer(answer, within=180)
        # An answer alone proves nothing where the question doesn't need this service.
        back = person.wait_for(service, other_than=pid, within=180)
        TIMINGS.append(Timing(person.name, f"{service} killed: same answer again", seconds))
        say(f"{person.name}: {service} killed; same answer after {seconds:.0f} s, running after {back:.0f} s")


def test_stop_and_boot(deployed: tuple[Person, str]) -> None:
    person, answer = deployed
    person.make("stop", 120)
    left = person.processes()
    assert not left, f"`make stop` left {left}"
    assert person.answer().startswith("error: "), "the question is answered although everything is stopped"
    hook = person.run(person.boot_command(), 300, "boot")
    assert hook.status == 0, hook.tail()
    seconds = person.expect_answer(answer, within=300)
    TIMINGS.append(Timing(person.name, "boot hook after make stop: same answer", hook.seconds + seconds))
    outcome = person.make("deploy", 600, title="deploy after boot, nothing to do")
    assert outcome.changed == 0, f"a deploy after the boot hook changed something:\n{outcome.tail()}"
