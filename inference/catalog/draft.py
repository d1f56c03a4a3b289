"""Catalog entries and models' own config.json: an entry drafted from one, and one held against its entry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inference import catalog
from inference.planner.architecture import read
from inference.problem import Problem

# What the planner reads of a config.json; the rest of it is no use in an entry.
TEXT = """
attention_bias attn_output_gate decoder_sparse_step first_k_dense_replace full_attention_interval head_dim hidden_size
index_head_dim index_n_heads interleave_moe_layer_step intermediate_size intermediate_size_mlp kv_lora_rank layer_types
linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim
max_position_embeddings mlp_only_layers model_type moe_intermediate_size moe_layer_freq n_routed_experts
n_shared_experts num_attention_heads num_experts
num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts q_lora_rank
qk_nope_head_dim qk_rope_head_dim quantization_config scale_factor shared_expert_intermediate_size sliding_window
sliding_window_pattern spatial_merge_size tie_word_embeddings use_sliding_window v_head_dim vocab_size
""".split()  # noqa: SIM905 a name a line would fill a page
VISION = """
deepstack_visual_indexes depth hidden_size image_size init_pos_emb_height init_pos_emb_width intermediate_size
merge_kernel_size model_type num_attention_heads num_heads num_hidden_layers num_position_embeddings out_hidden_size
patch_size pixel_shuffle_ratio projector_input_dim projector_output_dim spatial_merge_size temporal_patch_size
base_channels channel_multiplier embed_dim in_channels latent_channels num_embeddings num_res_blocks
""".split()  # noqa: SIM905
# Refused by vLLM itself (config/model.py).
NOT_IN_FLOAT16 = {"gemma2", "gemma3", "gemma3_text", "glm4"}


def draft(path: Path) -> str:
    """The text of an entry for the model whose config.json that is. ``TODO`` marks what a person has to fill in.

    Raises:
        Problem: the file is no config.json, or the planner cannot count such a model.
    """
    import yaml

    config = _read(path)
    kept = _kept(config)
    model = read(kept)
    text = {**config, **config.get("text_config", {})}
    bfloat16 = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype")) == "bfloat16"
    dtypes = ["bfloat16", "float16"] if bfloat16 else ["float16", "bfloat16"]
    if text.get("model_type") in NOT_IN_FLOAT16:
        dtypes = ["bfloat16"]
    name = config.get("_name_or_path") or "TODO/owner-and-model"
    entry: dict[str, Any] = {
        "title": name.rpartition("/")[2],
        "repositories": {"huggingface": {"name": name, "revision": None, "verified": False}},
        "licence": "TODO",
        "architecture": (config.get("architectures") or ["TODO"])[0],
        "modalities": ["text", "image"] if model.vision else ["text"],
        "context_length": text.get("max_position_embeddings") or "TODO",
        "parameters": round(model.parameters / 1e9, 2 if model.parameters > 1e9 else 4),
        "config": kept,
        "engines": {
            "cuda": {
                "dtypes": dtypes,
                "compute_capability": 7.5 if "float16" in dtypes and not model.text.latent else 8.0,
                "arguments": [],
            }
        },
        "known_problems": ["TODO, or remove this"],
    }
    if model.vision:
        entry["images"] = {"max_tokens": "TODO", "per_prompt": "TODO"}
    head = (
        "# TODO: what this model is good for.\n"
        f"# Drafted from a config.json: {model.parameters / 1e9:.2f} B parameters counted, "
        f"{model.token_bytes(2):,.0f} bytes of KV cache a token in 16 bits.\n"
        "# Hold `parameters` against the published number. As inference/catalog/<id>.yml: make plan MODEL=<id>\n"
        "---\n"
    )
    return head + str(yaml.safe_dump(entry, sort_keys=False, allow_unicode=True, width=110))


def add(path: Path, model_id: str) -> Path:
    """Write the draft into the catalog; the new file.

    Raises:
        Problem: there is an entry of that name, or no draft can be made.
    """
    entry = catalog.FOLDER / f"{model_id}.yml"
    if model_id in catalog.ids():
        raise Problem(f"{entry} exists. Remedy: another --id, or edit it.")
    if model_id.strip(".-_") != model_id or not all(sign.isalnum() or sign in ".-_" for sign in model_id):
        raise Problem(f"{model_id!r} is no id. Remedy: letters, digits, dots and dashes, as kimi-vl-a3b-instruct.")
    text = draft(path)
    try:
        entry.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Problem(f"{entry} cannot be written: {error.strerror}. Remedy: run it in a checkout of yours.") from None
    return entry


def differences(model: catalog.Model, config: Mapping[str, Any]) -> list[str]:
    """Where a model's own config.json says other numbers than its entry, perhaps written without seeing it."""
    return list(_differences("", model.config, config))


def _differences(where: str, entry: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    for key in filter(config.__contains__, entry):
        ours, theirs = entry[key], config[key]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(f"{key}.", ours, theirs)
        elif ours != theirs:
            yield f"{where}{key} is {theirs!r}, not {ours!r}"


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}. Remedy: the path of a model's config.json.") from None
    except ValueError as error:
        raise Problem(f"{path} is no JSON: {error}. Remedy: the path of a model's config.json.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise Problem(f"{path} has no model_type: it is no model's config.json. Remedy: the path of one.")
    return config


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: config[key] for key in TEXT if key in config}
    kept = {"model_type": config["model_type"], **kept}
    if "text_config" in config:
        kept["text_config"] = {key: config["text_config"][key] for key in TEXT if key in config["text_config"]}
    for tower in ("vision_config", "vq_config"):
        if tower in config:
            kept[tower] = {key: config[tower][key] for key in VISION if key in config[tower]}
    return kept
