"""Vision towers: their weights, and what they need while they look at images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inference.planner.weights import Weight
from inference.problem import Problem


@dataclass(frozen=True)
class Vision:
    """A vision tower.

    Attributes:
        hidden, intermediate, heads, layers: of its blocks.
        merge: patches that become one token.
        output: numbers of one image token as it is kept until the language model takes it.
        weights: tower and projector.
        codebook: the image is turned into tokens of the vocabulary (Chameleon); nothing is kept.
        flash_since: vLLM's version since which FlashAttention does the tower's attention.
    """

    hidden: int
    intermediate: int
    heads: int
    layers: int
    merge: int
    output: int
    weights: tuple[Weight, ...]
    codebook: bool = False
    flash_since: tuple[int, int, int] = (0, 0, 0)


def read_vision(config: Mapping[str, Any], text_hidden: int) -> Vision | None:
    """The tower of a config.json; None for a model that does not see.

    Raises:
        KeyError: a number is missing.
        Problem: a kind of tower that the planner cannot count.
    """
    if "vq_config" in config:
        return _chameleon(config["vq_config"])
    vision = config.get("vision_config")
    if vision is None:
        return None
    kind = vision.get("model_type") or config.get("model_type")
    if config.get("model_type") in ("smolvlm", "idefics3"):
        kind = "smolvlm"
    if kind in ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"):
        kind = "qwen3_vl"
    try:
        reader = _TOWERS[str(kind)]
    except KeyError:
        raise Problem(
            f"The planner cannot count a vision tower of the kind {kind!r}; it knows {', '.join(sorted(_TOWERS))}. "
            "Remedy: choose a model with one of these, or teach it in inference/planner/vision.py."
        ) from None
    return reader({**vision, "_config": config, "_text_hidden": text_hidden})


def _block(
    hidden: int, intermediate: int, *, gated: bool = False, bias: bool = True, norms: int = 4
) -> tuple[int, int]:
    """Parameters of a transformer block: (those that tensor parallelism splits, those that it doesn't)."""
    matrices = 4 * hidden**2 + (3 if gated else 2) * hidden * intermediate
    biases = (5 * hidden + (2 if gated else 1) * intermediate) if bias else 0
    return matrices, biases + norms * hidden


def _tower(layers: int, block: tuple[int, int], embedding: int, split: str = "even") -> Iterator[Weight]:
    # Not quantised in any checkpoint that the kit knows: `linear` is false.
    yield Weight("vision", layers * block[0], split=split, linear=False)
    yield Weight("vision", layers * block[1] + embedding, split="none", linear=False)


def _moonvit(c: Mapping[str, Any]) -> Vision:
    """MoonViT of Kimi-VL (vllm/model_executor/models/moonvit.py, kimi_vl.py): the projector is whole on every card."""
    hidden, intermediate, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    merge = math.prod(c["merge_kernel_size"])
    embedding = hidden * (3 * c["patch_size"] ** 2 + 1) + c["init_pos_emb_height"] * c["init_pos_emb_width"] * hidden
    wide, text = merge * hidden, c["_text_hidden"]
    projector = 2 * hidden + wide * wide + wide + wide * text + text
    return Vision(
        hidden,
        intermediate,
        c["num_attention_heads"],
        layers,
        merge,
        text,
        (
            *_tower(layers, _block(hidden, intermediate), embedding + 2 * hidden),
            Weight("projector", projector, split="none", linear=False),
        ),
        flash_since=(0, 14, 0),  # vllm#31738: heads of 72 numbers
    )


def _qwen3_vl(c: Mapping[str, Any]) -> Vision:
    """Qwen3-VL: three of its layers' outputs go into the language model beside the last one (deepstack)."""
    hidden, intermediate, layers = c["hidden_size"], c["intermediate_size"], c["depth"]
    merge, out = c["spatial_merge_size"] ** 2, c["out_hidden_size"]
    embedding = (
        hidden * (3 * c["temporal_patch_size"] * c["patch_size"] ** 2 + 1) + c["num_position_embeddings"] * hidden
    )
    wide, taps = merge * hidden, len(c["deepstack_visual_indexes"])
    projector = (1 + taps) * (wide * wide + wide + wide * out + out) + 2 * hidden + taps * 2 * wide
    return Vision(
        hidden,
        intermediate,
        c["num_heads"],
        layers,
        merge,
        out * (1 + taps),
        (
            *_tower(layers, _block(hidden, intermediate), embedding),
            Weight("projector", projector, linear=False),
        ),
    )


def _qwen2_5_vl(c: Mapping[str, Any]) -> Vision:
    hidden, intermediate, layers = c["hidden_size"], c["intermediate_size"], c["depth"]
    merge, out = c["spatial_merge_size"] ** 2, c["out_hidden_size"]
    embedding = hidden * 3 * c["temporal_patch_size"] * c["patch_size"] ** 2
    wide = merge * hidden
    return Vision(
        hidden,
        intermediate,
        c["num_heads"],
        layers,
        merge,
        out,
        (
            *_tower(layers, _block(hidden, intermediate, gated=True, norms=2), embedding),
            Weight("projector", hidden + wide * wide + wide + wide * out + out, linear=False),
        ),
    )


def _pixtral(c: Mapping[str, Any]) -> Vision:
    """Pixtral's tower with Mistral 3's patch merger; every card keeps all of it."""
    hidden, intermediate, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    text, merge = c["_text_hidden"], c["_config"].get("spatial_merge_size", 1) ** 2
    embedding = hidden * 3 * c["patch_size"] ** 2 + hidden
    block = _block(hidden, intermediate, gated=True, bias=False, norms=2)
    projector = hidden + (merge * hidden * hidden if merge > 1 else 0) + hidden * text + text * text
    return Vision(
        hidden,
        intermediate,
        c["num_attention_heads"],
        layers,
        merge,
        text,
        (*_tower(layers, block, embedding, "none"), Weight("projector", projector, split="none", linear=False)),
    )


def _llama4(c: Mapping[str, Any]) -> Vision:
    hidden, intermediate, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    merge = round(1 / c["pixel_shuffle_ratio"] ** 2)
    patches = (c["image_size"] // c["patch_size"]) ** 2 + 1
    embedding = hidden * 3 * c["patch_size"] ** 2 + (patches + 1) * hidden + 4 * hidden
    out = c["projector_output_dim"]
    projector = c["projector_input_dim"] * intermediate + out * c["projector_output_dim"] + out * c["_text_hidden"]
    return Vision(
        hidden,
        intermediate,
        c["num_attention_heads"],
        layers,
        merge,
        c["_text_hidden"],
        (*_tower(layers, _block(hidden, intermediate), embedding), Weight("projector", projector, linear=False)),
    )


def _smolvlm(c: Mapping[str, Any]) -> Vision:
    """SigLIP's tower and Idefics 3's connector, which makes one token of 16 patches."""
    hidden, layers = c["hidden_size"], c.get("num_hidden_layers", 12)
    intermediate, scale = c["intermediate_size"], c["_config"]["scale_factor"]
    patches = (c["image_size"] // c["patch_size"]) ** 2
    embedding = hidden * (3 * c["patch_size"] ** 2 + 1) + patches * hidden + 2 * hidden
    return Vision(
        hidden,
        intermediate,
        c["num_attention_heads"],
        layers,
        scale**2,
        c["_text_hidden"],
        (
            *_tower(layers, _block(hidden, intermediate), embedding),
            Weight("projector", hidden * scale**2 * c["_text_hidden"], split="none", linear=False),
        ),
    )


def _chameleon(c: Mapping[str, Any]) -> Vision:
    """Chameleon's VQ encoder: a convolutional network whose code words are tokens of the vocabulary."""

    def residual(a: int, b: int) -> int:
        return 2 * a + 2 * b + 9 * a * b + b + 9 * b * b + b + (a * b + b if a != b else 0)

    base, widths = c["base_channels"], [1, *c["channel_multiplier"]]
    total = 9 * c["in_channels"] * base + base
    for level, (a, b) in enumerate(itertools.pairwise(widths)):
        total += residual(a * base, b * base) + (c["num_res_blocks"] - 1) * residual(b * base, b * base)
        if level < len(widths) - 2:
            total += 9 * (b * base) ** 2 + b * base  # half the size
    last = widths[-1] * base
    total += 2 * residual(last, last) + 2 * last + 4 * (last * last + last)  # with attention in the middle
    total += 2 * last + 9 * last * c["latent_channels"] + c["latent_channels"]
    total += (c["latent_channels"] + 1) * c["embed_dim"] + c["num_embeddings"] * c["embed_dim"]
    return Vision(last, last, 1, 1, 1, 0, (Weight("vision", total, split="none", linear=False),), codebook=True)


_TOWERS: dict[str, Callable[[Mapping[str, Any]], Vision]] = {
    "llama4_vision_model": _llama4,
    "moonvit": _moonvit,
    "pixtral": _pixtral,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
}
