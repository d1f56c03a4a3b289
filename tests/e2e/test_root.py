"""Root, who gets a service user: first without Dify, then with it, then with a model that sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.harness import PICTURE_QUESTION, Person, say

HOUR = 3600
MODEL = "tiny-kimi-vl"
# What its chat template makes of the question, without the picture's tokens.
PROMPT = (
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
    "<|im_user|>user<|im_middle|><|media_start|>image<|media_content|><|media_end|>"
    f"{PICTURE_QUESTION}<|im_end|><|im_assistant|>assistant<|im_middle|>"
)
# Kimi-VL has a token for each 28 x 28 pixels, and the picture has 280 x 224.
PICTURE_TOKENS = 80


@pytest.fixture(scope="module")
def root() -> Iterator[Person]:
    person = Person("kit-e2e-svc", root=True)
    try:
        yield person
    finally:
        person.remove()


def test_without_dify_then_with_it(root: Person) -> None:
    root.make("deploy DIFY=skip", HOUR, title="root, DIFY=skip, empty caches")
    answer = root.answer()
    assert answer.strip(), "the model's answer is empty"
    assert not answer.startswith("error: "), answer
    root.make("check", 600, title="make check without Dify")
    if not root.dify:
        check_another_model(root)
        pytest.skip("Dify's source cannot be had here, see above; the rest was tested without it")
    root.lend_cache()
    root.make("deploy", 2 * HOUR, title="root, adding Dify, with cache")
    answer = root.answer()
    assert answer.strip(), "Dify's answer is empty"
    assert not answer.startswith("error: "), answer
    say(f"root: the answer is {answer!r}")
    outcome = root.make("deploy", 600, title="root, nothing to do")
    assert outcome.changed == 0, f"the second deploy changed something:\n{outcome.tail()}"
    assert root.answer() == answer
    check_another_model(root)


def check_another_model(root: Person) -> None:
    """Serve a model that sees: through Dify and directly, the prompt has the tokens of its text and of its picture."""
    root.make(f"model MODEL={MODEL}", 600, title="make model: another engine, Dify follows")
    assert root.facts["model"] == MODEL
    expected = root.text_tokens(PROMPT) + PICTURE_TOKENS
    assert set(root.picture_tokens().values()) == {expected}
    root.make("check", 600, title="make check of a model that sees")
