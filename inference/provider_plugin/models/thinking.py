"""Reasoning marks that Dify doesn't know, turned into those it does."""

# Kimi-VL-Thinking prints its marks as plain text; Dify folds away what stands between <think> and </think>.
MARKS = {"◁think▷": "<think>", "◁/think▷": "</think>"}


class ThinkingMarks:
    """Translates a text that arrives in pieces; a mark may be cut anywhere.

    >>> marks = ThinkingMarks()
    >>> marks.feed("◁thi") + marks.feed("nk▷Hm.◁/think▷Yes.") + marks.flush()
    '<think>Hm.</think>Yes.'
    """

    def __init__(self) -> None:
        self._held = ""

    def feed(self, piece: str) -> str:
        """The part of all text so far, not given out yet, that cannot be the beginning of a mark."""
        text = self._held + piece
        for mark, known in MARKS.items():
            text = text.replace(mark, known)
        start = max(text.rfind(mark[0]) for mark in MARKS)
        self._held = text[start:] if start >= 0 and any(mark.startswith(text[start:]) for mark in MARKS) else ""
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        """What was held back: the text is over."""
        held, self._held = self._held, ""
        return held
