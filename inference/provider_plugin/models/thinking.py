"""Reasoning: marks that Dify doesn't know turned into those it does, and what earlier answers thought left out."""

import re

# Kimi-VL-Thinking prints its marks as plain text; Dify folds away what stands between <think> and </think>.
BEGIN, END = "◁think▷", "◁/think▷"
MARKS = {BEGIN: "<think>", END: "</think>"}
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def without_thoughts(answer: str) -> str:
    """An answer for the model to read again: no model was trained to see what it thought before.

    >>> without_thoughts("<think>Hm.</think>Yes.")
    'Yes.'
    """
    return _THOUGHT.sub("", answer)


class ThinkingMarks:
    """Translates a text that arrives in pieces; a mark may be cut anywhere.

    >>> marks = ThinkingMarks()
    >>> marks.feed("◁thi") + marks.feed("nk▷Hm.◁/think▷Yes.") + marks.flush()
    '<think>Hm.</think>Yes.'
    """

    def __init__(self) -> None:
        self._held = ""
        self._thinks = False

    def feed(self, piece: str) -> str:
        """The part of all text so far, not given out yet, that cannot be the beginning of a mark."""
        text = self._held + piece
        if BEGIN in text or END in text:
            self._thinks = text.rfind(BEGIN) > text.rfind(END)
        for mark, known in MARKS.items():
            text = text.replace(mark, known)
        start = text.rfind("◁")
        self._held = text[start:] if start >= 0 and any(mark.startswith(text[start:]) for mark in MARKS) else ""
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        """What was held back: the text is over. A thought that was cut off is ended, or Dify would show it open."""
        held, self._held = self._held, ""
        return f"{held}</think>" if self._thinks else held
