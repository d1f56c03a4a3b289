"""What training a model takes of a card's memory.

Mixed precision with Adam keeps 16 bytes a parameter: weights and gradients in 16 bits (2 + 2), and in FP32 the
optimizer's copy of the weights, its momentum and its variance (4 + 4 + 4): 7 B parameters are 112 GB before the first
token. ZeRO (arXiv:1910.02054) shares out among the cards the optimizer's state (1), the gradients too (2), the weights
too (3). LoRA (arXiv:2106.09685) trains narrow matrices beside frozen ones: they alone have gradients and an optimizer.

Activations as in arXiv:2205.05198, with FlashAttention, which keeps no score matrix: all that the backward pass reads
again, or with gradient checkpointing each layer's input alone and one layer's activations at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from inference.planner.architecture import Architecture
from inference.problem import Problem

WEIGHT, GRADIENT, OPTIMIZER = 2, 2, 12  # bytes a parameter
STATE = WEIGHT + GRADIENT + OPTIMIZER
METHODS = ("full", "lora")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        method: full, or lora.
        cards: data-parallel, each with a batch of its own.
        zero: 0 to 3.
        batch: sequences on a card at a time.
        length: tokens of a sequence.
        checkpointing: activations are calculated again instead of kept.
        rank: LoRA's, on all of a layer's matrices.
    """

    method: str = "full"
    cards: int = 1
    zero: int = 0
    batch: int = 1
    length: int = 4096
    checkpointing: bool = True
    rank: int = 16

    def __post_init__(self) -> None:
        wrong = []
        if self.method not in METHODS:
            wrong.append(f"the method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.zero not in range(4):
            wrong.append(f"ZeRO has the stages 1 to 3 (0: without), not {self.zero}")
        for name in ("cards", "batch", "length", "rank"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be 1 or more")
        if wrong:
            raise Problem(f"This cannot be planned: {'; '.join(wrong)}. Remedy: correct the setting.")


@dataclass(frozen=True)
class Training:
    """Bytes on one card."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    trained: int  # parameters

    @property
    def total(self) -> float:
        """All of it; the framework's own and the fragments between come on top, a tenth is wise."""
        return self.weights + self.gradients + self.optimizer + self.activations


def states(parameters: int, trained: int, cards: int = 1, zero: int = 0) -> tuple[float, float, float]:
    """Bytes on one card of weights, gradients and optimizer state."""
    return (
        parameters * WEIGHT / (cards if zero >= 3 else 1),
        trained * GRADIENT / (cards if zero >= 2 else 1),
        # Adam's copies of LoRA's matrices, too; frozen weights have none.
        trained * OPTIMIZER / (cards if zero >= 1 else 1),
    )


def adapters(model: Architecture, rank: int) -> int:
    """Parameters of LoRA's matrices: a matrix of a x b gets rank x (a + b).

    On all of attention's matrices and those of dense feed-forward layers; experts stay as they are.
    """
    text = model.text
    matrices = list(text.attention)
    if not text.experts_per_token:
        matrices += [(text.hidden, text.intermediate)] * 3
    return text.layers * rank * sum(a + b for a, b in matrices)


def plan_training(model: Architecture, recipe: Recipe) -> Training:
    """What each card keeps while it trains."""
    extra = adapters(model, recipe.rank) if recipe.method == "lora" else 0
    trained = extra or model.parameters
    weights, gradients, optimizer = states(model.parameters + extra, trained, recipe.cards, recipe.zero)
    return Training(weights, gradients, optimizer, activations(model, recipe), trained)


def activations(model: Architecture, recipe: Recipe) -> float:
    """Bytes of what the backward pass reads again, on one card."""
    text = model.text
    tokens = recipe.batch * recipe.length
    # What attention's matrices give (with them its queries, keys and values), and its output before the last of them.
    attention = sum(out for _, out in text.attention[:-1]) + text.attention[-1][0]
    # Inputs of both norms and of what follows them; attention; gate, up and their product.
    layer = 2 * tokens * (4 * text.hidden + attention + 3 * text.active_intermediate)
    kept = 2 * tokens * text.hidden * text.layers + layer if recipe.checkpointing else layer * text.layers
    # The loss is taken in FP32 from logits in 16 bits, and has a gradient of the same size.
    logits = tokens * text.vocabulary * (2 + 4 + 4)
    return kept + logits
