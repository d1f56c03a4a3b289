"""GPU cards: a file of known ones, and what nvidia-smi says of one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from inference.problem import Problem

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Attributes:
        memory_gib: GiB in all, as the engine sees them.
        compute_capability: as 8.0.
        bandwidth: of its memory, GB/s; 0 if unknown.
    """

    id: str
    title: str
    memory_gib: float
    compute_capability: float
    bandwidth: float = 0

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.memory_gib * GIB


@cache
def _file() -> dict[str, tuple[Card, tuple[str, ...]]]:
    import yaml

    entries = yaml.safe_load((Path(__file__).parent / "cards.yml").read_text(encoding="utf-8"))
    return {
        name: (Card(name, **{key: value for key, value in entry.items() if key != "reports"}), tuple(entry["reports"]))
        for name, entry in entries.items()
    }


def known() -> list[Card]:
    """All cards of the file, the smallest first."""
    return sorted((card for card, _ in _file().values()), key=lambda card: (card.memory_gib, card.id))


def card(name: str) -> Card:
    """A card of the file.

    Raises:
        Problem: there is none of that name; lists those there are.
    """
    try:
        return _file()[name.lower()][0]
    except KeyError:
        raise Problem(
            f"There is no GPU {name!r} in the planner's file. Remedy: GPU= one of {', '.join(sorted(_file()))}."
        ) from None


def reported(line: str) -> Card:
    """The card behind what nvidia-smi says of a GPU: ``name, memory.total, memory.reserved, compute_cap`` (in MiB).

    Raises:
        ValueError: the line is something else.
    """
    name, total, reserved, capability = (part.strip() for part in line.rsplit(",", 3))
    kept = float(reserved) if reserved.replace(".", "").isdigit() else 0.0  # old drivers say [N/A]
    # Whole words: an A100 is no A10.
    same = next(
        (
            card
            for card, parts in _file().values()
            if any(re.search(rf"{re.escape(part)}(?!\w)", f" {name.upper()}") for part in parts)
        ),
        None,
    )
    return Card(
        same.id if same else name,
        name,
        round((float(total) - kept) / 1024, 2),
        float(capability),
        same.bandwidth if same else 0,
    )
