"""Choosing the engine's settings for a model, a card and a goal."""

from __future__ import annotations

from inference.catalog import Model
from inference.planner.cards import Card
from inference.planner.fit import Case, fit
from inference.planner.outcome import CACHE_BYTES, GOALS, Plan, Wishes
from inference.planner.refusal import refusal
from inference.problem import Problem

# What people's conversations hold on average, question and answer: what `most-users` counts with.
USUAL_TOKENS = 2048
SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
FEW_SEQUENCES = (1, 2, 4, 8, 16, 32)


def plan(model: Model, card: Card, gpus: int = 1, wishes: Wishes | None = None) -> Plan:
    """The best settings for a goal on a host with ``gpus`` cards of a kind.

    Raises:
        Problem: it does not fit; says what is missing and what would fit.
    """
    case = Case(model, card, gpus, wishes or Wishes())
    check(case)
    best: Plan | None = None
    for parallel in case.parallel():
        found = _best(case, parallel)
        if found and (best is None or _better(found, best)):
            best = found
        # More cards for one engine are worth it only for a longer context; otherwise they serve as replicas.
        enough = case.wishes.max_model_len or model.context_length
        if best and (case.wishes.goal == "most-users" or best.max_model_len >= enough):
            break
    if best is None:
        raise Problem(refusal(case))
    return best


def check(case: Case) -> None:
    """What a site asks for must be possible at all.

    Raises:
        Problem: every contradiction, in one message; or a card that is too old.
    """
    model, wishes, dtypes = case.model, case.wishes, case.engine.dtypes
    mistakes = []
    if wishes.goal not in GOALS:
        mistakes.append(f"the goal {wishes.goal!r} is not one of {', '.join(GOALS)}")
    if wishes.dtype and wishes.dtype not in dtypes:
        mistakes.append(f"{model.id} is not served in {wishes.dtype}, but in {' or '.join(dtypes)}")
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
    _ = case.dtype


def _best(case: Case, parallel: int) -> Plan | None:
    """The best plan with so many cards for one engine; None when nothing useful fits."""
    longest = case.wishes.goal == "longest-context"
    candidates = (case.wishes.max_num_seqs,) if case.wishes.max_num_seqs else FEW_SEQUENCES if longest else SEQUENCES
    found: Plan | None = None
    for sequences in candidates:
        fitting = (fit(case, parallel, sequences, images) for images in case.images())
        one = next(filter(None, fitting), None)
        # Of equals, the one that serves more people when the context is the goal, else the smaller one.
        if one and (found is None or _better(one, found) or (longest and one.max_model_len == found.max_model_len)):
            found = one
    return found


def _better(one: Plan, other: Plan) -> bool:
    if one.goal == "longest-context":
        return one.max_model_len > other.max_model_len
    return _users(one) > _users(other)


def _users(plan: Plan) -> float:
    """Conversations of usual length that are answered at the same time."""
    return min(plan.max_num_seqs, plan.kv_cache_tokens / USUAL_TOKENS)
