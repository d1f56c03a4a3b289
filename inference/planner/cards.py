"""GPU cards: a file of known ones, and those of this host as nvidia-smi tells them."""

from __future__ import annotations

import re
import subprocess
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


def on_host(smi: str = "nvidia-smi") -> tuple[Card, int]:
    """The GPUs of this host that an engine can use: the kind, and how many of it.

    Raises:
        Problem: no GPU, no driver, or GPUs of several kinds.
    """
    fields = "name,memory.total,memory.reserved,compute_cap"
    try:
        done = subprocess.run(
            [smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Problem(
            f"No GPU can be seen on this host: {smi} cannot be run ({error}). Remedy: install the NVIDIA driver, or "
            "plan for another machine's card with GPU=, as GPU=a100-40g."
        ) from None
    if done.returncode:
        raise Problem(
            f"No GPU can be seen on this host: {smi} says {(done.stdout + done.stderr).strip()!r}. Remedy: repair the "
            "NVIDIA driver, or plan for another machine's card with GPU=, as GPU=a100-40g."
        )
    return parse_smi(done.stdout)


def parse_smi(text: str) -> tuple[Card, int]:
    """The kind and number of cards out of ``nvidia-smi --query-gpu=name,memory.total,memory.reserved,compute_cap``.

    Raises:
        Problem: no GPU, or several kinds.
    """
    found: list[Card] = []
    for line in filter(str.strip, text.splitlines()):
        name, total, reserved, capability = (field.strip() for field in line.rsplit(",", 3))
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
        found.append(
            Card(
                same.id if same else name,
                name,
                round((float(total) - kept) / 1024, 2),
                float(capability),
                same.bandwidth if same else 0,
            )
        )
    if not found:
        raise Problem(
            "This host has no GPU, says nvidia-smi. Remedy: plan for another machine's card with GPU=, as GPU=a100-40g."
        )
    if len({card.title for card in found}) > 1:
        raise Problem(
            f"This host has GPUs of several kinds: {', '.join(card.title for card in found)}. Remedy: choose "
            "those that the engine may use with CUDA_VISIBLE_DEVICES, and plan with GPU= and GPUS=."
        )
    return min(found, key=lambda card: card.memory_gib), len(found)
