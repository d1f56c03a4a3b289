"""What to say when nothing fits: what is missing, and what would fit, each tried and not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from inference.planner import cards
from inference.planner.cards import GIB
from inference.planner.fit import LEAST_CONTEXT, Case, fits
from inference.planner.memory import estimate
from inference.planner.outcome import VALUE_BYTES


def refusal(case: Case) -> str:
    """One line for people, for the most cards that one engine could use."""
    model, card, architecture = case.model, case.card, case.architecture
    asked = f"{case.gpus} x {card.title}" if case.gpus > 1 else f"one {card.title}"
    parallel = max(case.parallel(), default=0)
    if not parallel:
        return (
            f"{model.id} cannot be split over {case.wishes.tensor_parallel} of {asked}: that many must be there, and "
            f"divide {architecture.text.heads} attention heads. Remedy: tensor parallel 1, 2, 4 or 8."
        )
    settings = case.settings(parallel, case.wishes.max_num_seqs or 1, min(case.images()))
    memory = estimate(architecture, card, settings)
    weights = (memory.weights + memory.vision_weights) / GIB
    whole = architecture.weight_bytes(VALUE_BYTES[case.dtype]) / GIB
    tokens = case.wishes.max_model_len or LEAST_CONTEXT
    batch = settings.max_num_batched_tokens
    cache = architecture.conversation_bytes(tokens, settings.cache_bytes, parallel, batch)
    needed = weights + (memory.overhead + cache) / GIB
    share = "" if parallel == 1 else f", a share of {whole:.1f}"
    return (
        f"{model.id} does not fit on {asked}: in {case.dtype} it needs {needed:.1f} GiB a card "
        f"({weights:.1f} of weights{share}, {memory.overhead / GIB:.1f} beside them, {cache / GIB:.1f} for one "
        f"conversation of {tokens} tokens), and the engine can have {memory.budget / GIB:.1f} of {card.memory_gib:.1f} "
        f"GiB. Remedy: {', '.join(_remedies(case))}."
    )


def _remedies(case: Case) -> Iterator[str]:
    """More of the same cards, bigger cards, smaller wishes."""
    free = replace(case.wishes, tensor_parallel=0)
    for number in (2, 4, 8, 16):
        if number > case.gpus and fits(replace(case, gpus=number, wishes=free)):
            yield f"{number} of these cards (GPUS={number})"
            break
    bigger = (other for other in cards.known() if other.memory_gib > case.card.memory_gib)
    if able := [other for other in bigger if fits(replace(case, card=other, gpus=1))][:3]:
        yield f"a bigger card ({', '.join(f'GPU={other.id}' for other in able)})"
    for name, smaller in (
        ("inference_max_model_len: 0", replace(case.wishes, max_model_len=0)),
        ("inference_max_num_seqs: 0", replace(case.wishes, max_num_seqs=0)),
        ("inference_images_per_prompt: -1", replace(case.wishes, images_per_prompt=None)),
        ("inference_gpu_memory_utilization: 0", replace(case.wishes, gpu_memory_utilization=0.0)),
    ):
        if smaller != case.wishes and fits(replace(case, wishes=smaller)):
            yield f"{name}, which leaves it to the planner"
    yield "a smaller model (python -m inference models)"
