"""A plan as text: where the memory goes, and what the kit passes to the engine."""

from __future__ import annotations

from collections.abc import Sequence

from inference.planner.architecture import Architecture
from inference.planner.cards import GIB, Card
from inference.planner.outcome import Plan
from inference.planner.training import Recipe, Training

BAR = 40  # characters for the whole card
TITLES = {"longest-context": "the longest context", "most-users": "the most users"}


def parts(plan: Plan) -> list[tuple[str, float, str]]:
    """Name, bytes on a card, remark: all that is on the card, in the order in which the engine takes it."""
    memory, architecture = plan.memory, plan.architecture
    head = architecture.of("vision", "projector") / 1e9
    text = architecture.parameters / 1e9 - head
    share = f" / {plan.tensor_parallel} cards" if plan.tensor_parallel > 1 else ""
    token = architecture.token_bytes(plan.cache_bytes, plan.tensor_parallel)
    graphs = ("CUDA graphs", memory.graphs, "")
    rows = [
        ("language model", memory.weights, f"{text:.2f} B parameters in {plan.dtype}{share}"),
        ("vision tower, projector", memory.vision_weights, f"{head:.2f} B parameters"),
        ("CUDA, NCCL", memory.outside, "outside PyTorch"),
        ("largest step", memory.working, working(plan)),
        ("experts' workspace", memory.workspace, ""),
        ("image tokens", memory.images, "kept until the language model has taken them"),
        *([graphs] if memory.graphs_in_budget else []),
        ("KV cache", memory.cache, f"{plan.kv_cache_tokens:,} tokens of {token:,.0f} bytes"),
        *([] if memory.graphs_in_budget else [graphs]),
        ("left free", memory.free, "driver, fragments, what the engine does not measure"),
    ]
    return [row for row in rows if row[1] > 0]


def working(plan: Plan) -> str:
    """What the largest step consists of."""
    images = f", {plan.images_per_prompt} images" if plan.memory.images else ""
    return f"{plan.max_num_batched_tokens} tokens, {plan.max_num_seqs} rows to sample{images}"


def table(plan: Plan, arguments: Sequence[str]) -> str:
    """The plan for people, about 30 lines; ``arguments`` are the engine's, one for each line."""
    cards = f"{plan.tensor_parallel} x {plan.card.title}" if plan.tensor_parallel > 1 else plan.card.title
    lines = [f"{plan.model.title} on {cards}, for {TITLES[plan.goal]}", ""]
    lines.append(f"  {'on each card' if plan.tensor_parallel > 1 else 'on the card':26}{'GiB':>7}")
    for name, size, remark in parts(plan):
        bar = "█" * round(size / plan.memory.total * BAR) or "▏"
        lines.append(f"  {name:26}{size / GIB:7.2f}  {bar:{BAR}}  {remark}".rstrip())
    lines.append(f"  {'in all':26}{plan.memory.total / GIB:7.2f}  of which the engine may take {budget(plan)}")
    lines += ["", *(f"  {line}" for line in meaning(plan)), *(f"  {note}" for note in plan.notes)]
    lines += ["", f"  The kit passes to vLLM {plan.engine}:", *(f"    {argument}" for argument in arguments)]
    if problems := plan.model.known_problems:
        lines += ["", "  Known of this model:", *(f"    {problem}" for problem in problems)]
    return "\n".join(lines)


def budget(plan: Plan) -> str:
    """The engine's share."""
    return f"{plan.memory.budget / GIB:.2f} ({plan.gpu_memory_utilization:.2f})"


def meaning(plan: Plan) -> list[str]:
    """What the plan means for those who ask questions."""
    full = plan.full_conversations
    lines = [
        f"Conversations of up to {plan.max_model_len:,} tokens; {full:.1f} as long as that fit at the same time, "
        f"or {plan.max_num_seqs} of {min(plan.kv_cache_tokens // plan.max_num_seqs, plan.max_model_len):,} tokens."
    ]
    if plan.images_per_prompt:
        lines.append(f"Up to {plan.images_per_prompt} images a question, of at most {plan.image_tokens:,} tokens each.")
    if seconds := plan.least_seconds_a_token:
        lines.append(
            f"A lone answer cannot come faster than {1 / seconds:,.0f} tokens a second: each token reads "
            f"{plan.architecture.active_parameters / 1e9:.1f} B parameters at {plan.card.bandwidth:,.0f} GB/s."
        )
    return lines


def training_table(title: str, model: Architecture, recipe: Recipe, training: Training, card: Card | None) -> str:
    """The training side, for people."""
    where = f"{recipe.cards} cards" if recipe.cards > 1 else "one card"
    zero = f", ZeRO {recipe.zero}" if recipe.zero else ""
    method = f"LoRA of rank {recipe.rank}" if recipe.method == "lora" else "all parameters"
    lines = [f"{title}: training {method} on {where}{zero}", "", f"  {'on each card':26}{'GiB':>7}"]
    for name, size, remark in (
        ("weights", training.weights, f"{model.parameters / 1e9:.2f} B in 16 bits"),
        ("gradients", training.gradients, f"{training.trained / 1e9:.3g} B in 16 bits"),
        ("Adam's state", training.optimizer, "FP32 copy, momentum, variance"),
        (
            "activations",
            training.activations,
            f"{recipe.batch} x {recipe.length:,} tokens, {'with' if recipe.checkpointing else 'no'} checkpointing",
        ),
        ("in all", training.total, "and a tenth more for the framework" + (fits(training, card) if card else "")),
    ):
        lines.append(f"  {name:26}{size / GIB:7.2f}  {remark}")
    return "\n".join(lines)


def fits(training: Training, card: Card) -> str:
    """Whether it fits on a card."""
    verdict = "fits" if training.total * 1.1 <= card.memory else "does not fit"
    return f": {verdict} on {card.title} ({card.memory_gib:.1f} GiB)"
