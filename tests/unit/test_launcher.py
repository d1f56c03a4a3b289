"""What each card's engine is told, and which cards are refused."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from inference import catalog, launcher
from inference.catalog import Model
from inference.hardware import Gpus
from inference.planner import Plan, Wishes, card, plan
from inference.problem import Problem
from inference.scale import Node

KIMI = catalog.load("kimi-vl-a3b-instruct")
TEXT = catalog.load("smollm2-135m")
CARDS = ("t4", "v100-32g", "a10", "a100-40g", "a100-80g", "rtx4090", "l40s", "h100", "h200", "b200", "rtx5090")


def gpus(name: str, count: int = 1) -> Gpus:
    return Gpus(card(name), tuple(range(count)), "580.65.06")


def options(argv: list[str]) -> dict[str, str]:
    words = [word for argument in argv for word in argument.split("=", 1)]
    return {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}


FA2 = {"--attention-backend": "FLASH_ATTN"}
MLA_8 = {"--attention-backend": "TRITON_MLA", "--attention-config.mla_prefill_backend": "FLASH_ATTN"}
MLA_9 = {**MLA_8, "--attention-backend": "FLASH_ATTN_MLA"}
MLA_10 = {**MLA_8, "--attention-backend": "CUTLASS_MLA"}


@pytest.mark.parametrize(
    ("name", "count", "text", "kimi"),
    [
        ("t4", 1, {"--attention-backend": "TRITON_ATTN"}, None),
        ("v100-32g", 1, None, None),
        ("a10", 2, FA2, MLA_8),
        ("a100-40g", 1, FA2, MLA_8),
        ("a100-80g", 1, FA2, MLA_8),
        ("rtx4090", 2, FA2, MLA_8),
        ("l40s", 1, FA2, MLA_8),
        ("h100", 1, FA2, MLA_9),
        ("h200", 1, FA2, MLA_9),
        ("b200", 1, FA2, MLA_10),
        ("rtx5090", 2, FA2, MLA_8),
    ],
)
def test_attention_by_card(name: str, count: int, text: dict[str, str] | None, kimi: dict[str, str] | None) -> None:
    for model, expected in ((TEXT, text), (KIMI, kimi)):
        if expected is None:
            with pytest.raises(Problem, match="Remedy"):
                launcher.settle(model, gpus(name, count), Wishes())
            continue
        told = options(launcher.arguments(launcher.settle(model, gpus(name, count), Wishes())))
        attention = {key: value for key, value in told.items() if "attention" in key}
        assert attention == expected
        assert told["--dtype"] == "float16"
        assert "--enable-prefix-caching" in told
        if model is KIMI:
            assert told["--mm-encoder-attn-backend"] == "FLASH_ATTN"
            assert told["--moe-backend"] == "triton"
            assert told["--tensor-parallel-size"] == str(count)


def settled_or_refused(model: Model, cards: Gpus) -> Plan | None:
    try:
        return launcher.settle(model, cards, Wishes())
    except Problem as problem:
        if "Remedy" not in str(problem):
            raise
        return None


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_planned_for_or_refused_with_its_reason(name: str) -> None:
    for model in map(catalog.load, catalog.ids()):
        if "cuda" not in model.engines:
            continue
        for count in (1, 8):
            settled = settled_or_refused(model, gpus(name, count))
            if settled is None:
                continue
            told = options(launcher.arguments(settled))
            assert told["--dtype"] in model.engine("cuda").dtypes
            assert card(name).compute_capability >= 8 or told["--dtype"] != "bfloat16"
            assert ("--limit-mm-per-prompt" in told) == bool(model.images)


def test_numbers_are_the_plans() -> None:
    settled = launcher.settle(KIMI, gpus("h100"), Wishes())
    told = options(launcher.arguments(settled))
    assert told["--max-model-len"] == str(settled.max_model_len)
    assert told["--max-num-seqs"] == str(settled.max_num_seqs)
    assert told["--max-num-batched-tokens"] == str(settled.max_num_batched_tokens)
    assert float(told["--gpu-memory-utilization"]) == settled.gpu_memory_utilization
    assert told["--max-cudagraph-capture-size"] == "512"
    assert json.loads(told["--limit-mm-per-prompt"]) == {"image": settled.images_per_prompt, "video": 0}


def test_a_card_older_than_the_engine() -> None:
    with pytest.raises(Problem, match=r"compute capability 7\.0.*from 7\.5 on.*CUDA 13.*Remedy"):
        launcher.backends(TEXT, 7.0)


def test_mla_needs_flash_attention() -> None:
    with pytest.raises(Problem, match=r"multi-head latent attention.*FlashAttention only.*8\.0.*has 7\.5.*Remedy"):
        launcher.backends(KIMI, 7.5)


def test_an_architecture_without_kernels() -> None:
    with pytest.raises(Problem, match=r"no kernels for compute capability 11\.0"):
        launcher.backends(TEXT, 11.0)


@pytest.mark.parametrize(("capability", "vision"), [(7.5, "TORCH_SDPA"), (8.0, "FLASH_ATTN"), (9.0, "FLASH_ATTN")])
def test_vision_attention(capability: float, vision: str) -> None:
    seeing = dataclasses.replace(TEXT, config={"text_config": TEXT.config, "vision_config": {}})
    assert launcher.backends(seeing, capability).vision == vision


def test_only_experts_get_a_backend_for_experts() -> None:
    assert launcher.backends(TEXT, 9.0).experts == ""
    assert launcher.backends(catalog.load("qwen3-vl-30b-a3b"), 9.0).experts == "triton"


def test_a_model_without_vision_tower_gets_no_vision_attention() -> None:
    assert launcher.backends(TEXT, 8.0).vision == ""


def test_a_wish_for_bfloat16() -> None:
    told = options(launcher.arguments(launcher.settle(KIMI, gpus("a100-80g"), Wishes(dtype="bfloat16"))))
    assert told["--dtype"] == "bfloat16"
    with pytest.raises(Problem, match=r"bfloat16.*Remedy"):
        launcher.settle(TEXT, gpus("t4"), Wishes(dtype="bfloat16"))


def test_bfloat16_only_models_say_so() -> None:
    bound = [
        model
        for model in map(catalog.load, catalog.ids())
        if "cuda" in model.engines and "float16" not in model.engine("cuda").dtypes
    ]
    for model in bound:
        with pytest.raises(Problem, match=r"float16.*Remedy"):
            launcher.settle(model, gpus("a100-80g", 8), Wishes(dtype="float16"))


def test_replicas_share_the_cards() -> None:
    assert launcher.settle(KIMI, gpus("rtx4090", 4), Wishes(), replicas=2).tensor_parallel == 2
    with pytest.raises(Problem, match=r"3 replicas need a GPU each, this host has 2.*inference_replicas: 2"):
        launcher.settle(TEXT, gpus("rtx4090", 2), Wishes(), replicas=3)


def test_a_model_across_hosts_has_all_their_cards() -> None:
    node = Node("a", 0, 2, "10.0.0.1", "eth0", "10.0.0.1", 17810, tensor_parallel=1, pipeline_parallel=2, gpus=1)
    assert launcher.settle(KIMI, gpus("rtx4090"), Wishes(), node=node).tensor_parallel == 2


def test_the_models_own_arguments_come_last() -> None:
    def own(model: Model) -> Plan:
        return plan(model, card("a100-80g"))

    argv = launcher.arguments(own(TEXT))
    assert argv[-len(TEXT.engine("cuda").arguments) :] == TEXT.engine("cuda").arguments
