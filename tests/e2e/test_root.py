"""Root, who gets a service user: first without Dify, then with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.harness import Person

HOUR = 3600


@pytest.fixture(scope="module")
def root() -> Iterator[Person]:
    # What an administrator must prepare for code in workflows, root's deploy does itself when told to.
    person = Person("kit-e2e-svc", root=True, settings={"sandbox_mode": "root"})
    try:
        yield person
    finally:
        person.remove()


@pytest.mark.long
def test_without_dify_then_with_it(root: Person) -> None:
    root.make("deploy DIFY=skip", HOUR, title="root, DIFY=skip, empty caches")
    root.first_answer()
    root.make("check", 600, title="make check without Dify")
    if not root.dify:
        pytest.skip("Dify's source cannot be had here, see above; the rest was tested without it")
    root.lend_cache()
    root.make("deploy", 2 * HOUR, title="root, adding Dify, with cache")
    answer = root.first_answer()
    outcome = root.make("deploy", 600, title="root, nothing to do")
    assert outcome.changed == 0, f"the second deploy changed something:\n{outcome.tail()}"
    assert root.answer() == answer
    root.make("check", 600)
