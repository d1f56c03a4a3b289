"""Reasoning of Kimi-VL's Thinking models, which stands in plain text before the answer: ``◁think▷ ... ◁/think▷``.

The marks are no single tokens, so a stream can cut them anywhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser

BEGIN, END = "◁think▷", "◁/think▷"
# A byte-level token is at least one byte.
END_TOKENS = len(END.encode())
TURN = "<|im_middle|>"


class _Part(Enum):
    START = auto()  # not enough text yet to know
    REASONING = auto()
    ANSWER = auto()


class Splitter:
    """Takes text in pieces and gives (reasoning, answer) as soon as no mark can hide in it."""

    def __init__(self) -> None:
        self.part = _Part.START
        self.held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """What the next piece makes certain."""
        reasoning = answer = ""
        self.held += text
        if self.part is _Part.START:
            # Reasoning comes first or not at all: a mark in the middle of an answer is part of it.
            begun = self.held.lstrip()
            if len(begun) < len(BEGIN) and BEGIN.startswith(begun):
                return "", ""
            thinks = begun.startswith(BEGIN)
            self.part = _Part.REASONING if thinks else _Part.ANSWER
            self.held = begun.removeprefix(BEGIN) if thinks else self.held
        if self.part is _Part.REASONING:
            reasoning, end, self.held = self.held.partition(END)
            if end:
                self.part = _Part.ANSWER
            else:
                certain = len(reasoning) - _overlap(reasoning, END)
                reasoning, self.held = reasoning[:certain], reasoning[certain:]
        if self.part is _Part.ANSWER:
            answer, self.held = self.held, ""
        return reasoning, answer

    def finish(self) -> tuple[str, str]:
        """What was held back, when no more text comes."""
        rest, self.held = self.held, ""
        return (rest, "") if self.part is _Part.REASONING else ("", rest)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of a text that begins a mark."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)


class KimiVLReasoningParser(ReasoningParser):
    """``--reasoning-parser kimi_vl``. One is made for each request."""

    # vLLM's name for parsers that hold text back and are asked for it at the end (finish_streaming).
    engine_based_streaming = True

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._stream = Splitter()
        self._turn = tokenizer.convert_tokens_to_ids(TURN)

    @property
    def reasoning_start_str(self) -> str:
        """The mark before the reasoning."""
        return BEGIN

    @property
    def reasoning_end_str(self) -> str:
        """The mark after the reasoning."""
        return END

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Reasoning and answer of a whole text."""
        splitter = Splitter()
        parts = [splitter.feed(model_output), splitter.finish()]
        reasoning, answer = ("".join(part) for part in zip(*parts, strict=True))
        return reasoning or None, answer or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """What a piece of a stream adds to reasoning and answer."""
        return _delta(*self._stream.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        """What a stream that ended still owes."""
        return _delta(*self._stream.finish())

    def has_engine_confirmed_reasoning_end(self) -> bool:
        """Whether the stream has come to the answer."""
        return self._stream.part is _Part.ANSWER

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether the last turn's reasoning has ended; earlier turns may have had their own."""
        ids = list(input_ids)
        last = len(ids) - ids[::-1].index(self._turn) if self._turn in ids else 0
        return END in self.model_tokenizer.decode(ids[last:])

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether the newest tokens end the reasoning; called for each token, so only these are looked at."""
        newest = len(list(delta_ids)) + END_TOKENS
        return END in self.model_tokenizer.decode(list(input_ids[-newest:]))

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens after the reasoning; none before it has ended."""
        return input_ids[self._until_end(input_ids) :]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of an answer's reasoning, its marks included: what the usage tells."""
        thinks = self.model_tokenizer.decode(list(token_ids)).lstrip().startswith(BEGIN)
        return self._until_end(token_ids) if thinks else 0

    def _until_end(self, ids: Sequence[int]) -> int:
        """How many tokens it takes to the end of the reasoning; all of them where it has not ended."""
        sizes = range(len(ids))
        return bisect_left(sizes, True, key=lambda size: END in self.model_tokenizer.decode(list(ids[:size])))


def _delta(reasoning: str, answer: str) -> DeltaMessage | None:
    return DeltaMessage(reasoning=reasoning or None, content=answer or None) if reasoning or answer else None
