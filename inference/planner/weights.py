"""One group of a model's weights, and how much of it lies on one card."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Weight:
    """Weights that are split and stored alike.

    Attributes:
        part: embedding, head, norms (and all that is small), attention, latent (MLA's up-projection), mlp, experts,
            vision, projector.
        parameters: how many numbers.
        split: how tensor parallelism divides it: evenly; by KV heads, of which a card keeps at least one; or none, when
            every card keeps all.
        count: KV heads or experts in it, where that matters.
        linear: a matrix that a quantised checkpoint may store in fewer bits.
    """

    part: str
    parameters: int
    split: str = "even"
    count: int = 1
    linear: bool = True

    def times(self, number: int) -> Weight:
        """The same in so many layers."""
        return replace(self, parameters=self.parameters * number)

    def on_card(self, tensor_parallel: int) -> float:
        """Parameters on one card of so many."""
        match self.split:
            case "none":
                return self.parameters
            case "heads":
                return self.parameters / self.count * math.ceil(self.count / tensor_parallel)
            case _:
                return self.parameters / tensor_parallel
