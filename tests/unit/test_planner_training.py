"""Training: the textbook's numbers."""

from __future__ import annotations

import pytest

from inference import catalog
from inference.planner.architecture import read
from inference.planner.training import STATE, Recipe, activations, adapters, plan_training, states
from inference.problem import Problem

LLAMA_2_7B = read(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    }
)
GB = 1e9


def test_seven_billion_parameters_take_112_gigabytes() -> None:
    assert STATE == 16
    assert sum(states(7_000_000_000, 7_000_000_000)) == 112 * GB


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_paper(zero: int, gigabytes: float) -> None:
    """Figure 1 of arXiv:1910.02054: 7.5 B parameters on 64 cards."""
    assert sum(states(7_500_000_000, 7_500_000_000, 64, zero)) / GB == pytest.approx(gigabytes, abs=0.05)


def test_a_whole_plan() -> None:
    assert LLAMA_2_7B.parameters == 6_738_415_616
    plan = plan_training(LLAMA_2_7B, Recipe(cards=8, zero=3))
    assert (plan.weights + plan.gradients + plan.optimizer) == pytest.approx(6_738_415_616 * 16 / 8)
    assert plan.total > plan.weights + plan.gradients + plan.optimizer


def test_activations_with_and_without_checkpointing() -> None:
    """34 bytes x tokens x hidden a layer (arXiv:2205.05198), layers 4 x hidden wide; Llama's are 8/3, and gated."""
    tokens, logits = 4096, 4096 * 32000 * 10
    kept = activations(LLAMA_2_7B, Recipe(checkpointing=False)) - logits
    assert kept / (tokens * 4096 * 32) == pytest.approx(34, rel=0.07)
    again = activations(LLAMA_2_7B, Recipe()) - logits
    assert again / (tokens * 4096) == pytest.approx(2 * 32 + 34, rel=0.05)
    assert activations(LLAMA_2_7B, Recipe(batch=2)) == 2 * activations(LLAMA_2_7B, Recipe())


def test_lora() -> None:
    """Rank 16 on all matrices of Llama 2 7B: 40 M parameters, as PEFT prints for it."""
    assert adapters(LLAMA_2_7B, 16) == 39_976_960
    plan = plan_training(LLAMA_2_7B, Recipe(method="lora"))
    assert plan.trained == 39_976_960
    assert plan.gradients + plan.optimizer == 39_976_960 * 14
    assert plan.weights == (6_738_415_616 + 39_976_960) * 2


def test_experts_that_a_token_passes() -> None:
    """Kimi-VL's activations are those of 6 + 2 experts, not of 64."""
    kimi = read(catalog.load("kimi-vl-a3b-instruct").config)
    assert kimi.text.active_intermediate == 8 * 1408
    assert plan_training(kimi, Recipe()).gradients == kimi.parameters * 2


def test_all_mistakes_at_once() -> None:
    with pytest.raises(Problem) as caught:
        Recipe(method="half", zero=4, cards=0)
    for part in ("'half' is not one of full, lora", "not 4", "cards must be 1 or more", "Remedy"):
        assert part in str(caught.value)
