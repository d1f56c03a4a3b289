"""Whether a model fits on cards with given numbers of conversations and images, and with how long a context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from inference.catalog import Engine, Model
from inference.planner import cards
from inference.planner.architecture import Architecture, read
from inference.planner.cards import GIB, Card
from inference.planner.memory import Settings, cache_tokens, estimate
from inference.planner.outcome import CACHE_BYTES, VALUE_BYTES, Plan, Wishes
from inference.problem import Problem

# What runs on CUDA where a catalog entry names no version of its own.
ENGINE = "0.33.0"
# A conversation shorter than that is of little use; below it nothing "fits".
LEAST_CONTEXT = 4096
# The longest that `most-users` offers: enough for a document, and a few of them do not push all others out.
MOST_USERS_CONTEXT = 32768
STEP = 1024  # context is chosen in steps of that many tokens
# Of the predicted KV cache, that much is not promised: by so much the engine's own measurement was off in the logs.
UNSURE = 0.5 * GIB
# Kept free of the engine: the driver's and other processes' part, fragmentation, what the start's measurement misses.
SPARE = 1.0 * GIB
SPARE_SHARE = 0.03
MOST_UTILISATION = 0.95


@dataclass(frozen=True)
class Case:
    """A model, a host's cards, and what the site wants."""

    model: Model
    card: Card
    gpus: int
    wishes: Wishes

    @property
    def engine(self) -> Engine:
        """The model's settings on CUDA."""
        return self.model.engine("cuda")

    @cached_property
    def architecture(self) -> Architecture:
        """The model, counted."""
        return read(self.model.config)

    @cached_property
    def dtype(self) -> str:
        """The first of the model's dtypes that the card can calculate in.

        Raises:
            Problem: the card is too old for the model.
        """
        model, card, wish, least = self.model, self.card, self.wishes.dtype, self.engine.compute_capability
        able = [name for name in self.engine.dtypes if name != "bfloat16" or card.compute_capability >= 8]
        if card.compute_capability < least or not able or (wish and wish not in able):
            needed = max(least, 8.0 if not able or wish == "bfloat16" else 0.0)
            others = [other.id for other in cards.known() if other.compute_capability >= needed]
            raise Problem(
                f"{model.id} in {wish or ' or '.join(self.engine.dtypes)} needs compute capability {needed} or more; "
                f"{card.title} has {card.compute_capability}. Remedy: one of {', '.join(sorted(others))}, "
                "or another model."
            )
        return wish or able[0]

    def parallel(self) -> Iterator[int]:
        """Numbers of cards that one engine can use: attention heads must be divisible by them."""
        text, vision = self.architecture.text, self.architecture.vision
        for number in (1, 2, 4, 8, 16):
            sees = vision is None or vision.codebook or vision.heads % number == 0
            if number <= self.gpus and text.heads % number == 0 and sees and self.wishes.tensor_parallel in (0, number):
                yield number

    def images(self) -> list[int]:
        """Images per prompt to try, the most first."""
        if not self.model.images:
            return [0]
        if self.wishes.images_per_prompt is not None:
            return [self.wishes.images_per_prompt]
        most = self.model.images.per_prompt
        return [number for number in (most, 8, 4, 2, 1) if number <= most]

    def settings(self, parallel: int, sequences: int, images: int) -> Settings:
        """What the engine's memory follows from."""
        image_tokens = self.model.images.max_tokens if self.model.images else 0
        value = VALUE_BYTES[self.dtype]
        settings = Settings(
            engine=self.engine.version or ENGINE,
            tensor_parallel=parallel,
            max_num_seqs=sequences,
            max_num_batched_tokens=_batched_tokens(self.card, image_tokens if images else 0),
            utilisation=self.wishes.gpu_memory_utilization or 1,
            value_bytes=value,
            cache_bytes=CACHE_BYTES[self.wishes.kv_cache_dtype] or value,
            image_tokens=image_tokens,
            images_per_prompt=images,
            eager="--enforce-eager" in self.engine.arguments,
        )
        if self.wishes.gpu_memory_utilization:
            return settings
        first = estimate(self.architecture, self.card, settings)
        return replace(settings, utilisation=_utilisation(self.card, 0 if first.graphs_in_budget else first.graphs))


def _batched_tokens(card: Card, image_tokens: int) -> int:
    """Tokens of one step: more answer long questions sooner, and take memory. As vLLM's own default for big cards."""
    own = 8192 if card.memory_gib >= 70 else 4096 if card.memory_gib >= 36 else 2048
    return max(own, image_tokens)


def _utilisation(card: Card, graphs_outside: float) -> float:
    """The largest share of the card that leaves room for what the engine does not count."""
    spare = SPARE + SPARE_SHARE * card.memory + graphs_outside
    return min(MOST_UTILISATION, int((1 - spare / card.memory) * 100) / 100)


def fit(case: Case, parallel: int, sequences: int, images: int) -> Plan | None:
    """The plan with these numbers and as long a context as fits; None when less than useful does."""
    model, wishes = case.model, case.wishes
    settings = case.settings(parallel, sequences, images)
    memory = estimate(case.architecture, case.card, settings)
    sure = cache_tokens(case.architecture, replace(memory, cache=memory.cache - UNSURE), settings)
    # Every image of a question, and room for the question and its answer.
    useful = max(LEAST_CONTEXT, images * settings.image_tokens + LEAST_CONTEXT // 2)
    least = wishes.max_model_len or min(model.context_length, useful)
    if sure < least:
        return None
    length = wishes.max_model_len
    if not length:
        most = model.context_length
        if wishes.goal == "most-users":
            most = max(least, min(most, MOST_USERS_CONTEXT, sure // 4))
        length = min(most, sure)
        length = length if length in (least, model.context_length) else max(least, length // STEP * STEP)
    return Plan(
        model=model,
        goal=wishes.goal,
        card=case.card,
        gpus=case.gpus,
        engine=settings.engine,
        dtype=case.dtype,
        kv_cache_dtype=wishes.kv_cache_dtype,
        tensor_parallel=parallel,
        max_model_len=length,
        max_num_seqs=sequences,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        images_per_prompt=images,
        image_tokens=settings.image_tokens,
        gpu_memory_utilization=settings.utilisation,
        kv_cache_tokens=cache_tokens(case.architecture, memory, settings),
        memory=memory,
        notes=tuple(_notes(case, parallel)),
    )


def _notes(case: Case, parallel: int) -> Iterator[str]:
    if case.dtype != case.engine.dtype and not case.wishes.dtype:
        yield f"{case.dtype} because {case.card.title} cannot calculate in {case.engine.dtype}."
    if (count := case.gpus // parallel) > 1:
        yield f"One engine uses {parallel} of {case.gpus} cards: inference_replicas: {count} runs {count} engines."
    if case.card.compute_capability < 8 and case.model.images:
        yield "No FlashAttention on this card: images go through PyTorch's attention, not measured there yet."


def fits(case: Case) -> bool:
    """Whether any plan fits: the least that can be asked for does, or nothing does."""
    try:
        _ = case.dtype
    except Problem:
        return False
    sequences, images = case.wishes.max_num_seqs or 1, min(case.images())
    return any(fit(case, parallel, sequences, images) for parallel in case.parallel())
