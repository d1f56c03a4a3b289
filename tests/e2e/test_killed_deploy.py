"""A deploy that is killed goes on from there when it is run again."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.e2e.harness import Person, say

HOUR = 3600
PLACES = 10


def places(steps: dict[str, float]) -> list[tuple[str | None, str, float]]:
    """Ten places spread over the steps: the step before, the step, and the seconds to let pass in it."""
    names = list(steps)
    chosen = [names[index * len(names) // PLACES] for index in range(PLACES)]
    found = []
    for index, name in enumerate(chosen):
        # The n-th of m kills in one step comes after n/(m+1) of its time.
        share = (chosen[:index].count(name) + 1) / (chosen.count(name) + 1)
        position = names.index(name)
        found.append((names[position - 1] if position else None, name, steps[name] * share))
    return found


def at(before: str | None, seconds: float) -> Callable[[str], float | None]:
    """A watcher that asks for the kill so many seconds after the step `before` has ended."""

    def watch(line: str) -> float | None:
        ended = re.match(r"(\w+) +[\d.]+ (?:min|s)\b", line)
        # Before the first step ends nothing is printed but what make itself says.
        return seconds if before is None or (ended and ended[1] == before) else None

    return watch


def test_killed_at_ten_places() -> None:
    person = Person("kit-e2e-kill")
    try:
        person.lend_cache()
        whole = person.make("deploy", 2 * HOUR, title="deploy with cache")
        answer = person.answer()
        assert not answer.startswith("error: "), answer
        person.make('uninstall ARGS="-e kit_delete_data=yes"', 300, title="uninstall")
        assert not person.processes(), f"uninstall left {person.processes()}"

        hit = 0
        for before, step, seconds in places(whole.steps):
            outcome = person.run(
                f"make {person.spelled('deploy')}", HOUR, f"killed-in-{step}", watch=at(before, seconds)
            )
            say(f"{person.name}: killed {seconds:.1f} s into {step} (status {outcome.status}, {outcome.seconds:.0f} s)")
            assert outcome.status <= 0, f"a deploy failed before it was killed:\n{outcome.tail()}"
            hit += outcome.status < 0
        assert hit >= PLACES - 2, f"only {hit} of {PLACES} deploys were still running when they were to be killed"

        person.make("deploy", HOUR, title="deploy after ten kills")
        assert person.answer() == answer
        again = person.make("deploy", 600, title="nothing to do after ten kills")
        assert again.changed == 0, f"it changed something:\n{again.tail()}"
        person.make("check", 600)
    finally:
        person.remove()
