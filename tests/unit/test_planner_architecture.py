"""Counting: parameters as published, what quantisation and tensor parallelism make of them, the KV cache's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference import catalog
from inference.planner.architecture import read
from inference.planner.cards import GIB
from inference.planner.fit import ENGINE
from inference.problem import Problem

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def kimi() -> dict[str, Any]:
    return catalog.load("kimi-vl-a3b-instruct").config


@pytest.mark.parametrize("model_id", catalog.ids())
def test_published_parameters(model_id: str) -> None:
    model = catalog.load(model_id)
    assert read(model.config).parameters / 1e9 == pytest.approx(model.parameters, rel=0.01)


@pytest.mark.parametrize(
    ("model_id", "parameters"),
    [
        # Half of the bytes that their indexes of safetensors name; of smolvlm-500m, its file without the header.
        ("qwen2.5-vl-7b", 8_292_166_656),
        ("qwen3-vl-4b", 4_437_815_808),
        ("qwen3-vl-8b", 8_767_123_696),
        ("smollm2-135m", 134_515_008),
        ("smolvlm-500m", 507_482_304),
    ],
)
def test_parameters_of_published_files(model_id: str, parameters: int) -> None:
    assert read(catalog.load(model_id).config).parameters == pytest.approx(parameters, abs=0)


def test_kimi_vl() -> None:
    """Published: 16 B parameters of which 2.8 B are active, and a tower of 400 M."""
    model = read(kimi())
    assert model.of("vision") / 1e6 == pytest.approx(417, abs=1)
    assert model.of("projector") / 1e6 == pytest.approx(30.7, abs=0.1)
    assert model.weight_bytes(2) / GIB == pytest.approx(30.56, abs=0.01)
    assert model.token_bytes(2) == 31104
    assert 2.24e9 < model.active_parameters < 2.91e9
    assert 131072 * model.token_bytes(2) / GIB == pytest.approx(3.80, abs=0.01)


def test_latent_cache_is_on_every_card_and_heads_are_shared_out() -> None:
    model = read(kimi())
    assert [model.token_bytes(2, cards) for cards in (1, 2, 8)] == [31104] * 3
    llama = read(LLAMA)
    assert [llama.token_bytes(2, cards) for cards in (1, 2, 8)] == [131072, 65536, 16384]
    assert llama.token_bytes(2, 16) == 16384  # a head is not cut in two
    assert llama.token_bytes(1) == 65536


def test_multi_head_attention() -> None:
    assert read(LLAMA | {"num_key_value_heads": None}).token_bytes(2) == 4 * 131072


def test_indexer() -> None:
    config = kimi()["text_config"] | {"q_lora_rank": 1536, "index_n_heads": 64, "index_head_dim": 128}
    assert read(config).token_bytes(2) == 27 * (1152 + 132)
    assert read(config).token_bytes(1) == 27 * (576 + 132)


def test_sliding_windows() -> None:
    """Gemma 3: five layers of six look back 1024 tokens."""
    config = LLAMA | {"num_hidden_layers": 30, "sliding_window": 1024, "sliding_window_pattern": 6}
    model = read(config)
    layer = 2 * 8 * 128 * 2
    assert model.token_bytes(2) == 5 * layer
    assert model.conversation_bytes(100, 2, 1, 2048) == 30 * 100 * layer
    assert model.conversation_bytes(100_000, 2, 1, 2048) == 5 * 100_000 * layer + 25 * (1023 + 2048) * layer


def test_a_window_that_is_not_used() -> None:
    assert (
        read(LLAMA | {"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": False}).caches[0].window == 0
    )


def test_cards_share_the_weights_but_for_what_each_needs_whole() -> None:
    model = read(kimi())
    whole, half = model.weight_bytes(2, 1), model.weight_bytes(2, 2)
    kept = sum(weight.parameters for weight in model.weights if weight.split == "none") * 2
    assert half == (whole - kept) / 2 + kept
    assert kept > model.of("projector") * 2


def test_a_quantised_checkpoint() -> None:
    """FP8: half the weights, but not the embedding, the head, and the vision tower."""
    plain = read(LLAMA)
    small = read(LLAMA | {"quantization_config": {"quant_method": "fp8"}})
    stays = (plain.of("embedding", "head", "norms")) * 2
    assert small.weight_bytes(2) == pytest.approx((plain.weight_bytes(2) - stays) / 2 + stays)


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(Problem, match=r"quantised as 'magic'.*Remedy"):
        read(LLAMA | {"quantization_config": {"quant_method": "magic"}})


def test_an_unknown_tower_is_refused() -> None:
    with pytest.raises(Problem, match=r"of the kind 'eye'; it knows .*moonvit.*Remedy"):
        read({"model_type": "x", "text_config": LLAMA, "vision_config": {"model_type": "eye"}})


def test_a_missing_number_is_named() -> None:
    config = dict(LLAMA)
    del config["vocab_size"]
    with pytest.raises(Problem, match=r"no 'vocab_size'.*Remedy"):
        read(config)


def test_the_plan_is_for_the_engine_that_the_kit_installs() -> None:
    lock = Path(catalog.__file__).parents[1] / "locks" / "cuda.txt"
    assert f"\nvllm=={ENGINE} " in lock.read_text()
