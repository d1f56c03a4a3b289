"""Choosing the engine's settings for a model, a card and a goal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from inference.catalog import Engine, Model
from inference.planner import cards
from inference.planner.architecture import Architecture, read
from inference.planner.cards import GIB, Card
from inference.planner.memory import Memory, Settings, cache_tokens, estimate
from inference.problem import Problem

GOALS = ("longest-context", "most-users")
VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
CACHE_BYTES = {"auto": 0, "fp8": 1}
# What runs on CUDA where a catalog entry names no version of its own.
ENGINE = "0.33.0"
# A conversation shorter than that is of little use; below it nothing "fits".
LEAST_CONTEXT = 4096
# What people's conversations hold on average, question and answer: what `most-users` counts with.
USUAL_TOKENS = 2048
# The longest that `most-users` offers: enough for a document, and a few of them do not push all others out.
MOST_USERS_CONTEXT = 32768
SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
FEW_SEQUENCES = (1, 2, 4, 8, 16, 32)
STEP = 1024  # context is chosen in steps of that many tokens
# Of the predicted KV cache, that much is not promised: by so much the engine's own measurement was off in the logs.
UNSURE = 0.5 * GIB
# Kept free of the engine: the driver's and other processes' part, fragmentation, what the start's measurement misses.
SPARE = 1.0 * GIB
SPARE_SHARE = 0.03
MOST_UTILISATION = 0.95


@dataclass(frozen=True)
class Wishes:
    """What a site fixes; zero, an empty text or None leaves it to the planner. Tokens, sequences, share of 0 to 1."""

    goal: str = "longest-context"
    dtype: str = ""
    kv_cache_dtype: str = "auto"
    tensor_parallel: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 0
    images_per_prompt: int | None = None
    gpu_memory_utilization: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What the kit passes to the engine, and why it fits.

    Attributes:
        gpus: cards of the host that were offered; one engine uses ``tensor_parallel`` of them.
        engine: vLLM's version.
        dtype: float16, bfloat16 or float32.
        kv_cache_dtype: auto (as ``dtype``) or fp8.
        max_model_len: tokens of the longest conversation.
        max_num_seqs: conversations answered at the same time.
        max_num_batched_tokens: tokens of one step.
        images_per_prompt: 0 for a model that does not see.
        image_tokens: of the largest image.
        gpu_memory_utilization: share of each card.
        kv_cache_tokens: what the KV cache will hold, all conversations together.
        memory: bytes on each card.
        notes: worth knowing, for people.
    """

    model: Model
    goal: str
    card: Card
    gpus: int
    engine: str
    dtype: str
    kv_cache_dtype: str
    tensor_parallel: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    images_per_prompt: int
    image_tokens: int
    gpu_memory_utilization: float
    kv_cache_tokens: int
    memory: Memory
    notes: tuple[str, ...] = ()

    @cached_property
    def architecture(self) -> Architecture:
        """The model, counted."""
        return read(self.model.config)

    @property
    def cache_bytes(self) -> float:
        """Bytes of a number in the KV cache."""
        return CACHE_BYTES[self.kv_cache_dtype] or VALUE_BYTES[self.dtype]

    @property
    def replicas(self) -> int:
        """Engines that the offered cards can run side by side."""
        return self.gpus // self.tensor_parallel

    @property
    def full_conversations(self) -> float:
        """Conversations of ``max_model_len`` tokens that the KV cache holds at the same time."""
        return self.kv_cache_tokens / self.max_model_len

    @property
    def least_seconds_a_token(self) -> float:
        """A lone answer cannot be faster: each token reads the active weights from memory once. 0 if unknown."""
        if not self.card.bandwidth:
            return 0.0
        read_bytes = self.architecture.active_parameters * VALUE_BYTES[self.dtype]
        return read_bytes / self.tensor_parallel / (self.card.bandwidth * 1e9)


def plan(model: Model, card: Card, gpus: int = 1, wishes: Wishes | None = None) -> Plan:
    """The best settings for a goal on a host with ``gpus`` cards of a kind.

    Raises:
        Problem: it does not fit; says what is missing and what would fit.
    """
    wishes = wishes or Wishes()
    engine = model.engine("cuda")
    _check(model, engine, wishes)
    architecture = read(model.config)
    dtype = _dtype(model, engine, card, wishes)
    best: Plan | None = None
    for parallel in _parallel(architecture, gpus, wishes):
        found = _best(model, engine, architecture, card, gpus, parallel, dtype, wishes)
        if found and (best is None or _better(found, best, wishes.goal)):
            best = found
        # More cards for one engine are worth it only for a longer context; otherwise they serve as replicas.
        if best and (
            wishes.goal == "most-users" or best.max_model_len >= (wishes.max_model_len or model.context_length)
        ):
            break
    if best is None:
        raise Problem(_refusal(model, engine, architecture, card, gpus, dtype, wishes))
    return best


def _check(model: Model, engine: Engine, wishes: Wishes) -> None:
    """What a site asks for must be possible at all."""
    mistakes = []
    if wishes.goal not in GOALS:
        mistakes.append(f"the goal {wishes.goal!r} is not one of {', '.join(GOALS)}")
    if wishes.dtype and wishes.dtype not in engine.dtypes:
        mistakes.append(f"{model.id} is not served in {wishes.dtype}, but in {' or '.join(engine.dtypes)}")
    if wishes.kv_cache_dtype not in CACHE_BYTES:
        mistakes.append(f"a KV cache in {wishes.kv_cache_dtype!r} is not one of {', '.join(CACHE_BYTES)}")
    if wishes.max_model_len > model.context_length:
        mistakes.append(f"{model.id} was trained for {model.context_length} tokens, not for {wishes.max_model_len}")
    if wishes.images_per_prompt and not model.images:
        mistakes.append(f"{model.id} does not see images")
    if not 0 <= wishes.gpu_memory_utilization < 1:
        mistakes.append(f"a GPU memory share of {wishes.gpu_memory_utilization} is not between 0 and 1")
    if mistakes:
        raise Problem(f"This cannot be planned: {'; '.join(mistakes)}. Remedy: correct the setting.")


def _dtype(model: Model, engine: Engine, card: Card, wishes: Wishes) -> str:
    """The first of the model's dtypes that the card can calculate in.

    Raises:
        Problem: the card is too old for the model.
    """
    able = [name for name in engine.dtypes if name != "bfloat16" or card.compute_capability >= 8]
    if card.compute_capability < engine.compute_capability or not able or (wishes.dtype and wishes.dtype not in able):
        needed = max(engine.compute_capability, 8.0 if not able or wishes.dtype == "bfloat16" else 0.0)
        others = [other.id for other in cards.known() if other.compute_capability >= needed]
        raise Problem(
            f"{model.id} in {wishes.dtype or ' or '.join(engine.dtypes)} needs compute capability {needed} or more; "
            f"{card.title} has {card.compute_capability}. Remedy: one of {', '.join(sorted(others))}, or another model."
        )
    return wishes.dtype or able[0]


def _parallel(model: Architecture, gpus: int, wishes: Wishes) -> Iterator[int]:
    """Numbers of cards that one engine can use: attention heads must be divisible by it."""
    for number in (1, 2, 4, 8, 16):
        heads = model.text.heads % number == 0 and (
            not model.vision or model.vision.codebook or model.vision.heads % number == 0
        )
        if number <= gpus and heads and wishes.tensor_parallel in (0, number):
            yield number


def _better(one: Plan, other: Plan, goal: str) -> bool:
    return one.max_model_len > other.max_model_len if goal == "longest-context" else _users(one) > _users(other)


def _users(plan: Plan) -> float:
    return min(plan.max_num_seqs, plan.kv_cache_tokens / USUAL_TOKENS)


def _best(
    model: Model,
    engine: Engine,
    architecture: Architecture,
    card: Card,
    gpus: int,
    parallel: int,
    dtype: str,
    wishes: Wishes,
) -> Plan | None:
    """The best plan with so many cards for one engine; None when nothing useful fits."""
    longest = wishes.goal == "longest-context"
    candidates = (wishes.max_num_seqs,) if wishes.max_num_seqs else FEW_SEQUENCES if longest else SEQUENCES
    found: Plan | None = None
    for sequences in candidates:
        for images in _images(model, wishes):
            one = _fit(model, engine, architecture, card, gpus, parallel, dtype, wishes, sequences, images)
            if one is None:
                continue
            # Of equals, the one that serves more people when the context is the goal, else the smaller one.
            if (
                found is None
                or _better(one, found, wishes.goal)
                or (longest and one.max_model_len == found.max_model_len)
            ):
                found = one
            break
    return found


def _images(model: Model, wishes: Wishes) -> list[int]:
    """Images per prompt to try, the most first."""
    if not model.images:
        return [0]
    if wishes.images_per_prompt is not None:
        return [wishes.images_per_prompt]
    return [number for number in (model.images.per_prompt, 8, 4, 2, 1) if number <= model.images.per_prompt]


def _batched_tokens(card: Card, image_tokens: int) -> int:
    """Tokens of one step: more answer long questions sooner, and take memory. As vLLM's own default for big cards."""
    own = 8192 if card.memory_gib >= 70 else 4096 if card.memory_gib >= 36 else 2048
    return max(own, image_tokens)


def _utilisation(card: Card, graphs_outside: float) -> float:
    """The largest share of the card that leaves room for what the engine does not count."""
    spare = SPARE + SPARE_SHARE * card.memory + graphs_outside
    return min(MOST_UTILISATION, int((1 - spare / card.memory) * 100) / 100)


def _fit(
    model: Model,
    engine: Engine,
    architecture: Architecture,
    card: Card,
    gpus: int,
    parallel: int,
    dtype: str,
    wishes: Wishes,
    sequences: int,
    images: int,
) -> Plan | None:
    """The plan with these numbers, as long a context as fits; None when less than useful does."""
    image_tokens = model.images.max_tokens if model.images else 0
    value, cache = VALUE_BYTES[dtype], CACHE_BYTES[wishes.kv_cache_dtype] or VALUE_BYTES[dtype]
    settings = Settings(
        engine=engine.version or ENGINE,
        tensor_parallel=parallel,
        max_num_seqs=sequences,
        max_num_batched_tokens=_batched_tokens(card, image_tokens if images else 0),
        utilisation=wishes.gpu_memory_utilization or 1,
        value_bytes=value,
        cache_bytes=cache,
        image_tokens=image_tokens,
        images_per_prompt=images,
        eager="--enforce-eager" in engine.arguments,
    )
    if not wishes.gpu_memory_utilization:
        first = estimate(architecture, card, settings)
        outside = 0 if first.graphs_in_budget else first.graphs
        settings = replace(settings, utilisation=_utilisation(card, outside))
    memory = estimate(architecture, card, settings)
    tokens = cache_tokens(architecture, replace(memory, cache=memory.cache - UNSURE), settings)
    # Every image of a question, and room for the question and its answer.
    least = wishes.max_model_len or min(
        model.context_length, max(LEAST_CONTEXT, images * image_tokens + LEAST_CONTEXT // 2)
    )
    if tokens < least:
        return None
    length = wishes.max_model_len
    if not length:
        most = model.context_length
        if wishes.goal == "most-users":
            most = max(least, min(most, MOST_USERS_CONTEXT, tokens // 4))
        length = min(most, tokens)
        length = length if length in (least, model.context_length) else max(least, length // STEP * STEP)
    return Plan(
        model=model,
        goal=wishes.goal,
        card=card,
        gpus=gpus,
        engine=settings.engine,
        dtype=dtype,
        kv_cache_dtype=wishes.kv_cache_dtype,
        tensor_parallel=parallel,
        max_model_len=length,
        max_num_seqs=sequences,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        images_per_prompt=images,
        image_tokens=image_tokens,
        gpu_memory_utilization=settings.utilisation,
        kv_cache_tokens=cache_tokens(architecture, memory, settings),
        memory=memory,
        notes=tuple(_notes(model, engine, card, gpus, parallel, dtype)),
    )


def _notes(model: Model, engine: Engine, card: Card, gpus: int, parallel: int, dtype: str) -> Iterator[str]:
    if dtype != engine.dtype:
        yield f"{dtype} because {card.title} cannot calculate in {engine.dtype}."
    if gpus > parallel:
        count = gpus // parallel
        yield f"One engine uses {parallel} of {gpus} cards: inference_replicas: {count} runs {count} engines."
    if card.compute_capability < 8 and model.images:
        yield "No FlashAttention on this card: images go through PyTorch's attention, not measured there yet."


def _refusal(
    model: Model, engine: Engine, architecture: Architecture, card: Card, gpus: int, dtype: str, wishes: Wishes
) -> str:
    """What is missing on the most cards that one engine could use, and what would fit."""
    parallel = max(_parallel(architecture, gpus, wishes), default=0)
    value = VALUE_BYTES[dtype]
    whole = architecture.weight_bytes(value) / GIB
    asked = f"{gpus} x {card.title}" if gpus > 1 else f"one {card.title}"
    if not parallel:
        return (
            f"{model.id} cannot be split over {wishes.tensor_parallel} of {asked}: that many must be there, and "
            f"divide {architecture.text.heads} attention heads. Remedy: tensor parallel 1, 2, 4 or 8."
        )
    images = min(_images(model, wishes))
    settings = Settings(
        engine=engine.version or ENGINE,
        tensor_parallel=parallel,
        max_num_seqs=wishes.max_num_seqs or 1,
        max_num_batched_tokens=_batched_tokens(card, model.images.max_tokens if model.images and images else 0),
        utilisation=wishes.gpu_memory_utilization or _utilisation(card, 0),
        value_bytes=value,
        cache_bytes=CACHE_BYTES[wishes.kv_cache_dtype] or value,
        image_tokens=model.images.max_tokens if model.images else 0,
        images_per_prompt=images,
    )
    memory = estimate(architecture, card, settings)
    weights = (memory.weights + memory.vision_weights) / GIB
    tokens = wishes.max_model_len or LEAST_CONTEXT
    cache = (
        architecture.conversation_bytes(tokens, settings.cache_bytes, parallel, settings.max_num_batched_tokens) / GIB
    )
    needed = weights + memory.overhead / GIB + cache
    return (
        f"{model.id} does not fit on {asked}: in {dtype} it needs {needed:.1f} GiB a card ({weights:.1f} of weights"
        f"{'' if parallel == 1 else f', a share of {whole:.1f}'}, {memory.overhead / GIB:.1f} beside them, {cache:.1f} "
        f"for one conversation of {tokens} tokens), and the engine can have {memory.budget / GIB:.1f} of "
        f"{card.memory_gib:.1f} GiB. Remedy: {', '.join(_remedies(model, card, gpus, wishes))}."
    )


def _remedies(model: Model, card: Card, gpus: int, wishes: Wishes) -> Iterator[str]:
    """More of the same cards, bigger cards, smaller wishes: each tried, not guessed."""
    yield from _more_cards(model, card, gpus, wishes)
    bigger = [other for other in cards.known() if other.memory_gib > card.memory_gib and _fits(model, other, 1, wishes)]
    if bigger:
        yield f"a bigger card ({', '.join(f'GPU={other.id}' for other in bigger[:3])})"
    for name, smaller in (
        ("inference_max_model_len: 0", replace(wishes, max_model_len=0)),
        ("inference_max_num_seqs: 0", replace(wishes, max_num_seqs=0)),
        ("inference_images_per_prompt: -1", replace(wishes, images_per_prompt=None)),
        ("inference_gpu_memory_utilization: 0", replace(wishes, gpu_memory_utilization=0.0)),
    ):
        if smaller != wishes and _fits(model, card, gpus, smaller):
            yield f"{name}, which leaves it to the planner"
    yield "a smaller model (python -m inference models)"


def _more_cards(model: Model, card: Card, gpus: int, wishes: Wishes) -> Iterator[str]:
    for number in (2, 4, 8, 16):
        if number > gpus and _fits(model, card, number, replace(wishes, tensor_parallel=0)):
            yield f"{number} of these cards (GPUS={number})"
            return


def _fits(model: Model, card: Card, gpus: int, wishes: Wishes) -> bool:
    engine = model.engine("cuda")
    architecture = read(model.config)
    try:
        dtype = _dtype(model, engine, card, wishes)
    except Problem:
        return False
    # The least that can be asked for: if that does not fit, nothing does.
    sequences, images = wishes.max_num_seqs or 1, min(_images(model, wishes))
    return any(
        _fit(model, engine, architecture, card, gpus, parallel, dtype, wishes, sequences, images)
        for parallel in _parallel(architecture, gpus, wishes)
    )
