# ruff: noqa: RUF001  # Chinese text has its own commas
"""A tiny Kimi-VL: the real architecture and token layout, random weights. It proves the image path where no GPU is.

``python -m inference.tiny DIR`` in the engine's environment; a few seconds, 30 MB. What it answers means nothing, but
depends on the question and on the image. Everything that vLLM wants for the real model has to be right for this one:
latent attention with its 512 + 64 numbers a token, experts, a vision tower with heads of 72, 163,840 token ids.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 5
RANKS = 163_584
# Ids after the ranks that have names in the published tokenizer_config.json.
SPECIAL = {
    163584: "[BOS]",
    163585: "[EOS]",
    163586: "<|im_end|>",
    163587: "<|im_user|>",
    163588: "<|im_assistant|>",
    163590: "<|start_header_id|>",
    163591: "<|end_header_id|>",
    163593: "[EOT]",
    163594: "<|im_system|>",
    163601: "<|im_middle|>",
    163602: "<|media_start|>",
    163603: "<|media_content|>",
    163604: "<|media_end|>",
    163605: "<|media_pad|>",
    163838: "[UNK]",
    163839: "[PAD]",
}
# Byte pairs are learnt from this; it also gives the words that the model answers with.
TEXT = """
This is a tiny model with random weights. It reads questions and looks at images, but it knows nothing: its answers are
words without meaning. They show that the path works, from the question through the service to the answer and back.
What do you see in the picture? Describe the image in one sentence. Which colour has the square, where is the circle?
The service splits the image into patches, the vision tower turns patches into features, and the projector turns those
into tokens. Then the language model reads text and image tokens together and writes the answer, one token at a time.
这是一个很小的模型，权重是随机的。它读取问题，也看图片，但是它什么都不知道。回答只是说明整个路径可以工作。图片里有什么？请用一句话描述这张图片。
"""
CONFIG: dict[str, Any] = {
    "architectures": ["KimiVLForConditionalGeneration"],
    "model_type": "kimi_vl",
    # As published: if anything followed these, it would not find the files.
    "auto_map": {
        "AutoConfig": "configuration_kimi_vl.KimiVLConfig",
        "AutoModel": "modeling_kimi_vl.KimiVLForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_kimi_vl.KimiVLForConditionalGeneration",
    },
    "vision_config": {
        "model_type": "moonvit",
        "patch_size": 14,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "hidden_size": 144,
        "intermediate_size": 288,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
    },
    "text_config": {
        "model_type": "deepseek_v3",
        "vocab_size": RANKS + 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_shared_experts": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "routed_scaling_factor": 2.446,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 800000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "pad_token_id": 163839,
    },
    "media_placeholder_token_id": 163605,
    "ignore_index": -100,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "pad_token_id": 163839,
    "tie_word_embeddings": False,
    "vocab_size": RANKS + 256,
    "torch_dtype": "bfloat16",
}
PREPROCESSOR = {
    "auto_map": {
        "AutoImageProcessor": "image_processing_kimi_vl.KimiVLImageProcessor",
        "AutoProcessor": "processing_kimi_vl.KimiVLProcessor",
    },
    "in_token_limit": 4096,
    "patch_size": 14,
    "num_pooled_tokens": 1024,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "pad_input": True,
}
TOKENIZER = {
    "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
    "tokenizer_class": "TikTokenTokenizer",
    "added_tokens_decoder": {
        str(id_): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for id_, name in SPECIAL.items()
    },
    "additional_special_tokens": [name for name in SPECIAL.values() if name.startswith("<|")],
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 131072,
}


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Kimi-VL's tensors, as published checkpoints have them, from its ``config.json``."""
    vision, text = config["vision_config"], config["text_config"]
    width, hidden = vision["hidden_size"], text["hidden_size"]
    patch, merged = vision["patch_size"], vision["hidden_size"] * math.prod(vision["merge_kernel_size"])

    def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, inputs)
        yield f"{name}.bias", (outputs,)

    def norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (size,)
        yield f"{name}.bias", (size,)

    def feed_forward(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.gate_proj.weight", (size, hidden)
        yield f"{name}.up_proj.weight", (size, hidden)
        yield f"{name}.down_proj.weight", (hidden, size)

    yield "vision_tower.patch_embed.proj.weight", (width, 3, patch, patch)
    yield "vision_tower.patch_embed.proj.bias", (width,)
    grid = (vision["init_pos_emb_height"], vision["init_pos_emb_width"])
    yield "vision_tower.patch_embed.pos_emb.weight", (*grid, width)
    for layer in range(vision["num_hidden_layers"]):
        block = f"vision_tower.encoder.blocks.{layer}"
        yield from norm(f"{block}.norm0", width)
        yield from norm(f"{block}.norm1", width)
        yield from linear(f"{block}.wqkv", width, 3 * width)
        yield from linear(f"{block}.wo", width, width)
        yield from linear(f"{block}.mlp.fc0", width, vision["intermediate_size"])
        yield from linear(f"{block}.mlp.fc1", vision["intermediate_size"], width)
    yield from norm("vision_tower.encoder.final_layernorm", width)
    yield from norm("multi_modal_projector.pre_norm", width)
    yield from linear("multi_modal_projector.linear_1", merged, merged)
    yield from linear("multi_modal_projector.linear_2", merged, hidden)

    heads, nope, rope = text["num_attention_heads"], text["qk_nope_head_dim"], text["qk_rope_head_dim"]
    latent, value = text["kv_lora_rank"], text["v_head_dim"]
    yield "language_model.model.embed_tokens.weight", (text["vocab_size"], hidden)
    for layer in range(text["num_hidden_layers"]):
        block = f"language_model.model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.self_attn.q_proj.weight", (heads * (nope + rope), hidden)
        yield f"{block}.self_attn.kv_a_proj_with_mqa.weight", (latent + rope, hidden)
        yield f"{block}.self_attn.kv_a_layernorm.weight", (latent,)
        yield f"{block}.self_attn.kv_b_proj.weight", (heads * (nope + value), latent)
        yield f"{block}.self_attn.o_proj.weight", (hidden, heads * value)
        if layer < text["first_k_dense_replace"]:
            yield from feed_forward(f"{block}.mlp", text["intermediate_size"])
            continue
        yield f"{block}.mlp.gate.weight", (text["n_routed_experts"], hidden)
        yield f"{block}.mlp.gate.e_score_correction_bias", (text["n_routed_experts"],)
        for expert in range(text["n_routed_experts"]):
            yield from feed_forward(f"{block}.mlp.experts.{expert}", text["moe_intermediate_size"])
        yield from feed_forward(f"{block}.mlp.shared_experts", text["n_shared_experts"] * text["moe_intermediate_size"])
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.lm_head.weight", (text["vocab_size"], hidden)


def vocabulary() -> list[bytes]:
    """Tokens in the order of their ranks: the bytes, pairs learnt from TEXT, then some that no text contains."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    printable = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    learnt = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(printable[character] for character in token) for token, _ in learnt]
    # 0xFF is in no UTF-8 text.
    return tokens + [b"\xff" + number.to_bytes(3, "big") for number in range(RANKS - len(tokens))]


def build(folder: Path) -> None:
    """Write the model's files into an empty folder, always the same."""
    import torch
    from safetensors.torch import save_file

    tokens = vocabulary()
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    for name, content in (
        ("config.json", CONFIG),
        ("preprocessor_config.json", PREPROCESSOR),
        ("tokenizer_config.json", TOKENIZER),
        ("generation_config.json", {"bos_token_id": 163584, "eos_token_id": [163585, 163586], "pad_token_id": 163839}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, shape in shapes(CONFIG):
        if len(shape) == 1:
            tensor = torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
        else:
            # Neither growing nor fading from layer to layer, whatever the size.
            tensor = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        tensors[name] = tensor if "correction" in name else tensor.to(torch.bfloat16)
    # Answers are made of words: a row of zeros always loses against the best of many random ones.
    words = [rank for rank, token in enumerate(tokens[:1000]) if token.strip().isalpha() and len(token) > 2]
    head = tensors["language_model.lm_head.weight"]
    kept = head[words].clone()
    head.zero_()
    head[words] = kept * 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    build(target)
