"""One list of everything that is wrong, each entry with its place and its remedy."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 100


@dataclass(frozen=True)
class Problem:
    """What is wrong, where (a file, variable or host thing), and what to do about it.

    A remedy of several lines is a list of ways out: its first line introduces them.
    """

    what: str
    where: str
    remedy: str


def _field(label: str, text: str) -> list[str]:
    """``label: text``, wrapped, with later lines under the text's first word."""
    indent = "   " + " " * 8
    lines: list[str] = []
    for number, line in enumerate(text.splitlines()):
        first = f"   {label + ':':<8}" if number == 0 else indent
        # A line that is indented is a command: breaking it would spoil copying it.
        if line.startswith(" "):
            lines.append(indent + line)
            continue
        lines += textwrap.wrap(
            line,
            WIDTH,
            initial_indent=first,
            subsequent_indent=indent + ("  " if line.startswith("- ") else ""),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def render(problems: Sequence[Problem], assurance: str) -> str:
    """The list as a person reads it; ``assurance`` says what the run has (not) done so far."""
    count = "One problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{count}. {assurance}"]
    for number, problem in enumerate(problems, start=1):
        head = f"{number}. "
        lines.append("")
        lines += textwrap.wrap(
            problem.what,
            WIDTH,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_long_words=False,
            break_on_hyphens=False,
        )
        if problem.where:
            lines += _field("Where", problem.where)
        lines += _field("Remedy", problem.remedy)
    return "\n".join(lines)
