"""From a model's config.json to what it weighs and what it remembers: parameters by part, and the KV cache's shape.

Counted the way the engine stores them, so that both a card's share under tensor parallelism and a quantised checkpoint
follow from the same list. Names are those of config.json; each rule's source is the model's class in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inference.planner.vision import Vision, read_vision
from inference.planner.weights import Weight
from inference.problem import Problem


@dataclass(frozen=True)
class Cache:
    """The KV cache of a number of like layers.

    Attributes:
        layers: how many.
        heads: KV heads; 0 for MLA, whose latent vector all heads share and every card of a tensor-parallel group keeps.
        values: numbers a token and head, keys and values together.
        window: tokens that a layer looks back; 0 for all.
        fixed_bytes: bytes a token and layer in a format of their own (DeepSeek-V3.2's indexer: 128 in FP8, 4 of scale).
    """

    layers: int
    heads: int
    values: int
    window: int = 0
    fixed_bytes: int = 0

    def token_bytes(self, tensor_parallel: int, value_bytes: float) -> float:
        """Bytes a token on one card. With fewer heads than cards a head is kept more than once."""
        heads = math.ceil(self.heads / tensor_parallel) if self.heads else 1
        return self.layers * (heads * self.values * value_bytes + self.fixed_bytes)


@dataclass(frozen=True)
class Text:
    """What of the language model decides on memory at run time.

    Attributes:
        attention: a layer's matrices, inputs x outputs; the last gives attention's output.
        intermediate: columns of a dense feed-forward layer.
        active_intermediate: columns that one token passes in a layer, those of its experts together.
        experts_per_token: 0 for a dense model.
        latent: multi-head latent attention, MLA.
        recurrent_layers: layers that keep a state a conversation instead of a cache a token.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    attention: tuple[tuple[int, int], ...]
    intermediate: int
    active_intermediate: int
    vocabulary: int
    experts_per_token: int
    latent: bool
    recurrent_layers: int


@dataclass(frozen=True)
class Architecture:
    """A model, counted."""

    text: Text
    vision: Vision | None
    weights: tuple[Weight, ...]
    caches: tuple[Cache, ...]
    quantised_bytes: float  # bytes a parameter of the weights that a quantised checkpoint stores smaller; 0: none
    quantised_parts: frozenset[str] = frozenset()

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(weight.parameters for weight in self.weights)

    def of(self, *parts: str) -> int:
        """Parameters of some parts."""
        return sum(weight.parameters for weight in self.weights if weight.part in parts)

    @property
    def active_parameters(self) -> int:
        """Those that one token passes through; the embedding is looked up, not multiplied with."""
        idle = 0
        if self.text.experts_per_token:
            routed = [weight for weight in self.weights if weight.part == "experts"]
            idle = sum(round(w.parameters * (1 - self.text.experts_per_token / w.count)) for w in routed)
        return self.parameters - idle - self.of("embedding", "vision", "projector")

    def weight_bytes(self, value_bytes: float, tensor_parallel: int = 1, *, parts: frozenset[str] | None = None) -> int:
        """Bytes on one card of a tensor-parallel group; of all parts, or of some."""
        total = 0.0
        for weight in self.weights:
            if parts is not None and weight.part not in parts:
                continue
            small = self.quantised_bytes and weight.linear and weight.part in self.quantised_parts
            total += weight.on_card(tensor_parallel) * (self.quantised_bytes if small else value_bytes)
            if small and weight.part == "latent":
                # The engine multiplies MLA's up-projection into the query and keeps a copy that isn't quantised.
                total += weight.on_card(tensor_parallel) * value_bytes
        return round(total)

    def token_bytes(self, value_bytes: float, tensor_parallel: int = 1) -> float:
        """Bytes of KV cache that one more token of a long conversation costs on one card."""
        return sum(cache.token_bytes(tensor_parallel, value_bytes) for cache in self.caches if not cache.window)

    def conversation_bytes(self, tokens: int, value_bytes: float, tensor_parallel: int, batched_tokens: int) -> float:
        """Bytes of KV cache of a conversation on one card.

        A layer with a window keeps no more than the window and what one step adds (vLLM's SlidingWindowSpec).
        """
        kept = 0.0
        for cache in self.caches:
            length = min(tokens, cache.window - 1 + batched_tokens) if cache.window else tokens
            kept += length * cache.token_bytes(tensor_parallel, value_bytes)
        return kept


def read(config: Mapping[str, Any]) -> Architecture:
    """Count a model by its config.json (or the part of it that a catalog entry keeps).

    Raises:
        Problem: a number is missing, or the kit does not know how to count this kind of model.
    """
    text_config = {**config, **config.get("text_config", {}), **config.get("llm_config", {})}
    text_config.pop("vision_config", None)
    try:
        text, weights, caches = _text(text_config)
        vision = read_vision(config, text.hidden)
    except KeyError as error:
        raise Problem(
            f"The model's config.json has no {error}, which the planner counts with. Remedy: add it to the entry."
        ) from None
    how = config.get("quantization_config") or text_config.get("quantization_config") or {}
    size, parts = _quantisation(how, text.hidden, text_config.get("moe_intermediate_size") or text.intermediate)
    return Architecture(text, vision, (*weights, *(vision.weights if vision else ())), caches, size, parts)


def _text(config: Mapping[str, Any]) -> tuple[Text, tuple[Weight, ...], tuple[Cache, ...]]:
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    latent = bool(config.get("kv_lora_rank"))
    recurrent = sum(1 for kind in _layer_kinds(config) if kind == "linear_attention")
    weights = [Weight("embedding", config["vocab_size"] * hidden)]
    if not config.get("tie_word_embeddings"):
        weights.append(Weight("head", config["vocab_size"] * hidden))
    weights.append(Weight("norms", hidden * (2 * layers + 1), split="none", linear=False))
    weights += _scaled(_latent_attention(config) if latent else _attention(config, kv_heads), layers - recurrent)
    if recurrent:
        weights += _scaled(_linear_attention(config), recurrent)
    weights += _feed_forward(config)
    text = Text(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        attention=_attention_matrices(config, kv_heads),
        intermediate=config.get("intermediate_size_mlp") or config.get("intermediate_size") or 0,
        active_intermediate=_active_intermediate(config),
        vocabulary=config["vocab_size"],
        experts_per_token=config.get("num_experts_per_tok") or 0 if _experts(config) else 0,
        latent=latent,
        recurrent_layers=recurrent,
    )
    return text, tuple(weights), tuple(_caches(config, kv_heads))


def _scaled(weights: Iterator[Weight], layers: int) -> list[Weight]:
    return [weight.times(layers) for weight in weights]


def _latent_attention(config: Mapping[str, Any]) -> Iterator[Weight]:
    """DeepSeek's MLA: queries and keys go through narrow projections, which are not split among cards."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    if narrow := config.get("q_lora_rank"):
        yield Weight("attention", hidden * narrow, split="none")
        yield Weight("norms", narrow, split="none", linear=False)
        yield Weight("attention", narrow * heads * (nope + rope))
    else:
        yield Weight("attention", hidden * heads * (nope + rope))
    yield Weight("attention", hidden * (rank + rope), split="none")
    yield Weight("norms", rank, split="none", linear=False)
    yield Weight("latent", rank * heads * (nope + value))
    yield Weight("attention", heads * value * hidden)
    if index_heads := config.get("index_n_heads"):  # DeepSeek-V3.2's indexer, whole on every card
        width = config["index_head_dim"]
        yield Weight("attention", config["q_lora_rank"] * index_heads * width + hidden * width, split="none")
        yield Weight("norms", hidden * index_heads + 2 * width, split="none", linear=False)


def _attention(config: Mapping[str, Any], kv_heads: int) -> Iterator[Weight]:
    """Multi-head and grouped-query attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = _width(config)
    gated = 2 if config.get("attn_output_gate") or config.get("model_type") == "qwen3_next" else 1
    yield Weight("attention", hidden * heads * width * gated)
    yield Weight("attention", 2 * hidden * kv_heads * width, split="heads", count=kv_heads)
    yield Weight("attention", heads * width * hidden)
    family = str(config.get("model_type", ""))
    if config.get("attention_bias") or family.startswith("qwen2"):
        yield Weight("norms", (heads + 2 * kv_heads) * width, split="none", linear=False)
    if family.startswith(("qwen3", "gemma3")):
        yield Weight("norms", 2 * width, split="none", linear=False)
    if family == "chameleon":  # a layer norm a head, weight and bias
        yield Weight("norms", 2 * (heads + kv_heads) * width, split="none", linear=False)


def _linear_attention(config: Mapping[str, Any]) -> Iterator[Weight]:
    """Qwen3-Next's gated delta network."""
    hidden = config["hidden_size"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    value_heads = config["linear_num_value_heads"]
    values = value_heads * config["linear_value_head_dim"]
    yield Weight("attention", hidden * (2 * keys + 2 * values + 2 * value_heads))
    yield Weight("attention", values * hidden)
    yield Weight("norms", (2 * keys + values) * config["linear_conv_kernel_dim"] + 2 * value_heads, linear=False)


def _attention_matrices(config: Mapping[str, Any], kv_heads: int) -> tuple[tuple[int, int], ...]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if rank := config.get("kv_lora_rank"):
        rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
        query, narrow = heads * (nope + rope), config.get("q_lora_rank")
        queries = ((hidden, narrow), (narrow, query)) if narrow else ((hidden, query),)
        return (*queries, (hidden, rank + rope), (rank, heads * (nope + value)), (heads * value, hidden))
    query, key = heads * _width(config), kv_heads * _width(config)
    return (hidden, query), (hidden, key), (hidden, key), (query, hidden)


def _width(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _active_intermediate(config: Mapping[str, Any]) -> int:
    if not _experts(config):
        return int(config["intermediate_size"])
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    return int(width * config["num_experts_per_tok"] + _shared(config))


def _shared(config: Mapping[str, Any]) -> int:
    """Columns of the experts that every token passes."""
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    if str(config.get("model_type")).startswith("llama4"):
        return int(width)
    return int(config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * width)


def _experts(config: Mapping[str, Any]) -> int:
    return int(config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts") or 0)


def _feed_forward(config: Mapping[str, Any]) -> Iterator[Weight]:
    """Dense layers, routed and shared experts, routers."""
    hidden, layers, experts = config["hidden_size"], config["num_hidden_layers"], _experts(config)
    sparse = [layer for layer in range(layers) if experts and _is_sparse(config, layer)]
    dense = config.get("intermediate_size_mlp") or config.get("intermediate_size") or 0
    if len(sparse) < layers:
        yield Weight("mlp", 3 * hidden * dense * (layers - len(sparse)))
    if not sparse:
        return
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    yield Weight("experts", 3 * hidden * width * experts * len(sparse), count=experts)
    if shared := _shared(config):
        yield Weight("mlp", 3 * hidden * shared * len(sparse))
    # DeepSeek-V3 corrects its router with a bias that is no part of the loss.
    router = hidden + (1 if str(config.get("model_type")).startswith("deepseek_v3") else 0)
    yield Weight("norms", router * experts * len(sparse), split="none", linear=False)


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    if "first_k_dense_replace" in config:  # DeepSeek, Kimi
        return bool(layer >= config["first_k_dense_replace"] and layer % config.get("moe_layer_freq", 1) == 0)
    if "interleave_moe_layer_step" in config:  # Llama 4
        return bool((layer + 1) % config["interleave_moe_layer_step"] == 0)
    step = int(config.get("decoder_sparse_step", 1))
    return layer not in config.get("mlp_only_layers", ()) and (layer + 1) % step == 0


def _layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """For each layer full_attention, sliding_attention or linear_attention."""
    layers = config["num_hidden_layers"]
    if kinds := config.get("layer_types"):
        return list(kinds)
    if period := config.get("full_attention_interval"):  # Qwen3-Next
        return ["full_attention" if (layer + 1) % period == 0 else "linear_attention" for layer in range(layers)]
    if (period := config.get("sliding_window_pattern")) and config.get("sliding_window"):  # Gemma 3
        return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]
    # Qwen2 has a window in its config that it does not use; Mistral 7B 0.1 uses its own in every layer.
    everywhere = config.get("sliding_window") and config.get(
        "use_sliding_window", "mistral" in str(config.get("model_type"))
    )
    return ["sliding_attention" if everywhere else "full_attention"] * layers


def _caches(config: Mapping[str, Any], kv_heads: int) -> Iterator[Cache]:
    if rank := config.get("kv_lora_rank"):
        indexer = config["index_head_dim"] + 4 if config.get("index_n_heads") else 0
        yield Cache(config["num_hidden_layers"], 0, rank + config["qk_rope_head_dim"], fixed_bytes=indexer)
        return
    width = _width(config)
    kinds = _layer_kinds(config)
    if full := kinds.count("full_attention"):
        yield Cache(full, kv_heads, 2 * width)
    if sliding := kinds.count("sliding_attention"):
        yield Cache(sliding, kv_heads, 2 * width, window=config["sliding_window"])


def _quantisation(config: Mapping[str, Any], hidden: int, intermediate: int) -> tuple[float, frozenset[str]]:
    """Bytes a parameter and the parts that a checkpoint stores so, from its ``quantization_config``.

    Args:
        config: of the checkpoint; empty for one that isn't quantised.
        hidden, intermediate: an expert's rows and columns, which some kernels round up.

    Raises:
        Problem: a method that the planner does not know.
    """
    if not config:
        return 0.0, frozenset()
    parts = {"attention", "latent", "mlp", "experts"}
    method = config.get("quant_method")
    ignored = " ".join(
        map(str, config.get("ignore") or config.get("exclude_modules") or config.get("modules_to_not_convert") or ())
    )
    if "self_attn" in ignored:
        parts -= {"attention", "latent"}
    if "shared_expert" in ignored:
        parts -= {"mlp"}
    if method == "fp8":
        block = math.prod(config.get("weight_block_size") or (1, 0)) or math.inf
        return 1 + 4 / block, frozenset(parts)  # a scale in FP32 a block
    if method == "compressed-tensors":
        groups = [group["weights"] for group in config["config_groups"].values()]
        widest = max(groups, key=lambda weights: weights["num_bits"])
        return widest["num_bits"] / 8 + 2 / (widest.get("group_size") or math.inf), frozenset(parts)
    if method == "modelopt":
        if "FP4" in str(config.get("quant_algo")):
            return 0.5 + 1 / 16, frozenset(parts)  # a scale in FP8 for 16 values
        return 1.0, frozenset(parts)
    if method == "mxfp4":
        # gpt-oss' experts: a scale in 8 bits for 32 values; rounded up for the kernels (Marlin).
        padded = math.ceil(hidden / 256) * 256 / hidden * math.ceil(intermediate / 128) * 128 / intermediate
        return (0.5 + 1 / 32) * padded, frozenset({"experts"})
    if method in ("awq", "gptq"):
        return config["bits"] / 8 + 2.5 / config["group_size"], frozenset(parts)  # scale in FP16, zero in 4 bits
    raise Problem(
        f"The planner cannot count weights quantised as {method!r}. Remedy: a checkpoint in bfloat16 or float16, fp8, "
        "compressed-tensors, modelopt, mxfp4, awq or gptq."
    )
