"""A fresh ordinary user with empty caches: from the clone to an answered question, and what must not break it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator

import plugin_package
import pytest
import yaml

from tests.e2e import workflow
from tests.e2e.harness import PICTURE, PICTURE_QUESTION, STEP, TIMINGS, WORK, Person, Timing, say
from tests.e2e.picture import PICTURE_TOKENS, PROMPT, expect_picture
from tests.e2e.ssh import expect_as_before

HOUR = 3600
PLACES = 10
# No kill comes later than that into its step: a first deploy's builds take minutes, the same ones cached do not.
LATEST_KILL = 10.0


@pytest.fixture(scope="module")
def deployed() -> Iterator[tuple[Person, str]]:
    """The user after the first `make deploy`, and the answer that every later one must equal."""
    # The page that the workflow's HTTP node reads is at an address of this machine, where nothing else of it may go.
    person = Person("kit-e2e", settings={"egress_allow": [workflow.address()]} if workflow.address() else {})
    try:
        person.first = person.make("deploy", 2 * HOUR, title="first deploy, empty caches")
        answer = person.first_answer()
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


def test_a_host_over_ssh_is_the_same(deployed: tuple[Person, str]) -> None:
    expect_as_before(*deployed)


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
    # What is deployed needs nobody else: it boots, answers and is deployed again on an island.
    person.cut_network()
    hook = person.run(person.boot_command(), 300, "boot")
    assert hook.status == 0, hook.tail()
    seconds = person.expect_answer(answer, within=300)
    TIMINGS.append(Timing(person.name, "boot hook after make stop: same answer", hook.seconds + seconds))
    outcome = person.make("deploy", 600, title="deploy after boot, nothing to do")
    assert outcome.changed == 0, f"a deploy after the boot hook changed something:\n{outcome.tail()}"


@pytest.mark.long
def test_plugins_without_a_network(deployed: tuple[Person, str]) -> None:
    person, answer = deployed
    if not person.dify:
        pytest.skip("Dify's source cannot be had here, see above; plugins need it")
    home = person.facts["kit_home"]
    steps = [
        "cp -r tests/data/plugin ~/words",
        f".venv/bin/uv lock -q --no-config --python {home}/runtime/bin/python3.12 --project ~/words",
        "make plugin-package PLUGIN=~/words ARGS='--output ..'",
    ]
    packing = person.run(" && ".join(steps), 300, "plugin-package", network=True)
    assert packing.status == 0, packing.tail()
    plain = person.home / "words.difypkg"
    plain.write_bytes(plugin_package.packed(plugin_package.files_of(person.home / "words")))
    [packed] = person.home.glob("dify-kit-kit_words_*.difypkg")
    if not person.island:
        person.make("stop", 120)
        person.cut_network()
        assert person.run(person.boot_command(), 300, "boot").status == 0

    person.configure(dify_plugins=[{"file": str(plain)}])
    refused = person.make("deploy", 900, title="a plugin with a lockfile, no network", expect=2)
    assert "dify-kit/kit_words" in refused.output, refused.tail()
    assert "make plugin-package" in refused.output, refused.tail()

    person.configure(dify_plugins=[{"file": str(packed)}])
    person.make("deploy", 900, title="the same plugin packed, no network")
    assert any("/kit_words-" in process for process in person.processes()), "the plugin does not run"
    again = person.make("deploy", 600, title="nothing to do, no network")
    assert again.changed == 0, f"it changed something:\n{again.tail()}"
    assert person.answer() == answer

    person.configure()
    person.leave_island()


def test_no_secret_in_what_was_said(deployed: tuple[Person, str]) -> None:
    person, _ = deployed
    file = person.checkout / "deploy/inventories/local/group_vars/kit/secrets.yml"
    secrets = {name: str(value) for name, value in yaml.safe_load(file.read_text()).items()}
    logs = list((WORK / "log").glob(f"*-{person.name}-*.log"))
    assert len(secrets) >= 8
    assert logs
    found = [f"{name} in {log}" for log in logs for name, value in secrets.items() if value in log.read_text()]
    assert not found, f"printed: {found}"


def places(ended: list[tuple[str, float]]) -> list[tuple[int, str, float]]:
    """Ten places spread over the steps: how many end before, the step, and the seconds to let pass in it."""
    found = []
    worth = [position for position, (_, seconds) in enumerate(ended) if seconds >= 0.5]
    for index in range(PLACES):
        position = worth[index * len(worth) // PLACES]
        step, seconds = ended[position]
        found.append((position, step, min(seconds / 2, LATEST_KILL)))
    return found


def after(steps: int, seconds: float) -> Callable[[str], float | None]:
    """A watcher that asks for the kill so many seconds after so many steps have ended."""
    left = steps

    def watch(line: str) -> float | None:
        nonlocal left
        left -= bool(STEP.match(line))
        return seconds if left <= 0 else None

    return watch


@pytest.mark.long
def test_deploy_killed_at_ten_places_converges(deployed: tuple[Person, str]) -> None:
    person, answer = deployed
    person.restore_network()
    person.make('uninstall ARGS="-e kit_delete_data=yes"', 300, title="uninstall")
    assert not person.processes(), f"uninstall left {person.processes()}"

    assert person.first is not None
    hit = 0
    for before, step, seconds in places(person.first.ended):
        watch = after(before, seconds)
        outcome = person.run(f"make {person.spelled('deploy')}", HOUR, f"killed-in-{step}", watch=watch)
        say(f"{person.name}: killed {seconds:.1f} s into {step} (status {outcome.status}, {outcome.seconds:.0f} s)")
        assert outcome.status <= 0, f"a deploy failed before it was killed:\n{outcome.tail()}"
        hit += outcome.status < 0
    assert hit >= PLACES - 2, f"only {hit} of {PLACES} deploys were still running when they were to be killed"

    person.make("deploy", HOUR, title="deploy with cache, after ten kills")
    assert person.answer() == answer
    again = person.make("deploy", 600, title="nothing to do after ten kills")
    assert again.changed == 0, f"it changed something:\n{again.tail()}"
    person.make("check", 600)


def test_another_model_that_sees(deployed: tuple[Person, str]) -> None:
    """By every way the prompt has the tokens of its text and of its picture. It stays for the tests after it."""
    person, _ = deployed
    person.leave_island()
    expect_picture(person)


def test_the_benchmark_asks_the_engine_and_dify(deployed: tuple[Person, str]) -> None:
    person, _ = deployed
    outcome = person.make(
        'bench-inference ARGS="--plain-port=0 --questions=2"', 600, title="make bench-inference, small"
    )
    ways = [line for line in outcome.output.splitlines() if re.match(r"\| (engine|Dify) \| [1-9]", line)]
    assert len(ways) == 1 + person.dify, outcome.tail()
    assert all(line.endswith("| 0 |") for line in ways), f"questions were not answered:\n{outcome.tail()}"


def test_a_workflow_of_everything(deployed: tuple[Person, str]) -> None:
    """Knowledge, a page, Python, JavaScript, a template and a picture in a workflow, again after everything died."""
    person, _ = deployed
    if not person.dify:
        pytest.skip("Dify's source cannot be had here, see above; workflows need it")
    host, facts = workflow.address(), person.facts
    assert host, "this machine has no IPv4 address but loopback; the HTTP node needs one"
    services = set(facts["services"])
    assert {"sandbox", "egress", "workflow-worker"} <= services, f"of everything, there is only {services}"
    made = person.workflow()
    with workflow.greeting(host) as url:
        wanted = made.run(url, PICTURE)
        assert workflow.SEEN in wanted["text"]
        assert "HELLO FROM BESIDE" in wanted["text"]
        assert wanted["status"] == 200
        assert wanted["answer"].strip()
        system = PROMPT.split(PICTURE_QUESTION)[0]
        text = f"{wanted['text']} {workflow.QUESTION}"
        prompt = PROMPT.replace(system, "").replace(PICTURE_QUESTION, system + text)
        assert wanted["usage"] == person.text_tokens(prompt) + PICTURE_TOKENS
        refused = made.run(f"http://127.0.0.1:{facts['ports']['redis']}/", PICTURE)
        assert refused["status"] == 407, f"the HTTP node reached this host's Redis: {refused}"

        for service, pid in person.supervised().items():
            # It is killed by a test of its own, and takes longer than all others together.
            if service != "inference":
                os.kill(pid, signal.SIGKILL)
        seconds = made.expect(wanted, url, PICTURE, within=300)
    TIMINGS.append(Timing(person.name, "all services but the model's killed at once: same workflow again", seconds))
    say(f"{person.name}: everything killed; the workflow has the same outputs after {seconds:.0f} s")
