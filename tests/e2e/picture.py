"""A question about a picture, by every way that a person can ask it."""

from __future__ import annotations

from tests.e2e.harness import PICTURE_QUESTION, Person

MODEL = "tiny-kimi-vl"
# What its chat template makes of the question, without the picture's tokens.
PROMPT = (
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
    "<|im_user|>user<|im_middle|><|media_start|>image<|media_content|><|media_end|>"
    f"{PICTURE_QUESTION}<|im_end|><|im_assistant|>assistant<|im_middle|>"
)
# Kimi-VL has a token for each 28 x 28 pixels, and the picture has 280 x 224.
PICTURE_TOKENS = 80


def expect_picture(person: Person) -> None:
    """With a model that sees in place of the one before, the prompt has the tokens of its text and of its picture."""
    person.make(f"model MODEL={MODEL}", 900, title="make model: another engine, Dify follows")
    assert person.facts["model"] == MODEL
    expected = person.text_tokens(PROMPT) + PICTURE_TOKENS
    assert set(person.picture_tokens().values()) == {expected}
    person.make("check", 600, title="make check of a model that sees")
