"""From a plan to the engine's arguments on NVIDIA GPUs. Decides only: nothing here looks at a machine.

What a GPU can do is read from vLLM 0.33: platforms/cuda.py (which backends an architecture has, in the engine's order),
v1/attention/backends (what each of them takes), vllm_flash_attn/flash_attn_interface.py (FlashAttention's versions),
and the architectures in the fat binaries of its wheels. What is passed here by name makes the engine refuse to start
where it cannot be had, instead of choosing something slower in silence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from inference import scale
from inference.catalog import Model
from inference.hardware import Gpus
from inference.planner import Plan, Wishes, plan
from inference.problem import Problem
from inference.scale import Node

# Oldest architecture with kernels in the wheels of vLLM 0.28 and 0.33; CUDA 13 itself has given up what is older.
LEAST_CAPABILITY = 7.5
FLASH_ATTENTION_CAPABILITY = 8.0
# Steps of up to so many tokens run as CUDA graphs. The engine's default is this for many sequences, and for a few twice
# their number: 64 with 32 of them. Then hardly a question is short enough; on an H100 (Kimi-VL, vLLM 0.33) its first
# token came after 95 ms instead of 33. It takes 20 s more at the start and 0.8 GiB, which the planner counts.
GRAPH_TOKENS = 512
# What vLLM 0.32's CPU build gets wrong of multi-head latent attention. AMX_MLA, its choice where there is AMX, is for
# bfloat16 alone (vllm#52616), but is taken with float16 too: NaN. Its kernel for rotary embeddings, which comes in with
# --enforce-eager, doesn't fit DeepSeek's: other tokens. Without both, log probabilities are at most 0.03 off float32's.
CPU_MLA = ("--attention-backend=CPU_MLA", '--compilation-config.custom_ops=["-rotary_embedding"]')


@dataclass(frozen=True)
class Backends:
    """The attention kernels that the engine is told to use.

    Attributes:
        attention: of the text; with MLA, of the answer's tokens.
        mla_prefill: with MLA, of the question's tokens; else empty.
        vision: of the image encoder; empty where the model has none that vLLM attends with.
        experts: not of attention, but chosen in the same way; empty for a dense model.
    """

    attention: str
    mla_prefill: str = ""
    vision: str = ""
    experts: str = ""

    def __str__(self) -> str:
        parts = {
            "attention": self.attention,
            "MLA prefill": self.mla_prefill,
            "vision attention": self.vision,
            "experts": self.experts,
        }
        return ", ".join(f"{name} {kernel}" for name, kernel in parts.items() if kernel)


def uses_mla(model: Model) -> bool:
    """Whether the model keeps compressed keys and values (multi-head latent attention)."""
    return bool(model.config.get("text_config", model.config).get("kv_lora_rank"))


def uses_experts(model: Model) -> bool:
    """Whether only a few of the model's feed-forward parts calculate for each token (mixture of experts)."""
    text = model.config.get("text_config", model.config)
    return bool(text.get("n_routed_experts") or text.get("num_experts"))


def backends(model: Model, capability: float) -> Backends:
    """The attention kernels for a model on a GPU of a compute capability.

    Raises:
        Problem: the engine has none.
    """
    if capability < LEAST_CAPABILITY:
        raise Problem(
            f"The GPU has compute capability {capability}, vLLM's packages have kernels from {LEAST_CAPABILITY} on; "
            f"CUDA 13, for which they are built, has given up what is older. Remedy: a GPU of the Turing generation "
            "(T4) or newer, or inference_hardware: cpu with a small model."
        )
    major = int(capability)
    if major not in (7, 8, 9, 10, 12):
        raise Problem(
            f"vLLM's packages have no kernels for compute capability {capability}; they know 7.5, 8, 9, 10 and 12. "
            "Remedy: another GPU, or inference_hardware: cpu with a small model."
        )
    flash = capability >= FLASH_ATTENTION_CAPABILITY
    vision = ("FLASH_ATTN" if flash else "TORCH_SDPA") if "vision_config" in model.config else ""
    # FlashInfer's, which the engine likes better on some cards, would be compiled where the host has CUDA's compiler.
    experts = "triton" if uses_experts(model) else ""
    if not uses_mla(model):
        # On 10.x the engine itself would choose FlashInfer, whose kernels it fetches from the internet.
        if flash:
            return Backends("FLASH_ATTN", "", vision, experts)
        return Backends("TRITON_ATTN", "", vision, experts)
    if not flash:
        raise Problem(
            f"{model.id} has multi-head latent attention, whose prefill vLLM has in FlashAttention only; that needs "
            f"compute capability {FLASH_ATTENTION_CAPABILITY}; the GPU has {capability}. "
            "Remedy: a GPU of the Ampere generation (A10, A100) or newer, or another model."
        )
    # 9.0: FlashAttention 3. 10.x: CUTLASS is in vLLM's wheel, FlashInfer's kernels would have to be fetched. Others:
    # FlashAttention's and FlashMLA's decode kernels exist for 9.0 and 10.x alone.
    decode = {9: "FLASH_ATTN_MLA", 10: "CUTLASS_MLA"}.get(major, "TRITON_MLA")
    return Backends(decode, "FLASH_ATTN", vision, experts)


def settle(model: Model, gpus: Gpus, wishes: Wishes, replicas: int = 1, node: Node | None = None) -> Plan:
    """The plan for one engine: of ``replicas`` on a host, or of a model across hosts.

    Raises:
        Problem: the engine has no kernels for the model on these GPUs, or it does not fit; says what would.
    """
    backends(model, gpus.card.compute_capability)  # says more than a plan that finds nothing
    count = len(gpus.indices)
    if node:
        scale.check_gpus(node, count)
        # Its parts are cut differently, but each card has an equal share of the weights.
        count = node.tensor_parallel * node.pipeline_parallel
        wishes = replace(wishes, tensor_parallel=count)
    elif replicas > 1:
        count //= replicas
    if not count:
        raise Problem(
            f"{replicas} replicas need a GPU each, this host has {len(gpus.indices)}. "
            f"Remedy: inference_replicas: {len(gpus.indices)} or less."
        )
    return plan(model, gpus.card, count, wishes)


def arguments(plan: Plan) -> list[str]:
    """What a GPU's engine gets beside weights, name and address.

    Raises:
        Problem: the engine has no kernels for the model on this card.
    """
    model = plan.model
    chosen = backends(model, plan.card.compute_capability)
    limits = {"image": plan.images_per_prompt, "video": 0}  # videos would be encoded to measure the memory, too
    return [
        f"--dtype={plan.dtype}",
        f"--tensor-parallel-size={plan.tensor_parallel}",
        f"--max-model-len={plan.max_model_len}",
        f"--max-num-seqs={plan.max_num_seqs}",
        f"--max-num-batched-tokens={plan.max_num_batched_tokens}",
        f"--gpu-memory-utilization={plan.gpu_memory_utilization}",
        *([f"--max-cudagraph-capture-size={GRAPH_TOKENS}"] if plan.memory.graphs else []),
        f"--kv-cache-dtype={plan.kv_cache_dtype}",
        "--enable-prefix-caching",
        f"--attention-backend={chosen.attention}",
        *([f"--attention-config.mla_prefill_backend={chosen.mla_prefill}"] if chosen.mla_prefill else []),
        *([f"--mm-encoder-attn-backend={chosen.vision}"] if chosen.vision else []),
        *([f"--moe-backend={chosen.experts}"] if chosen.experts else []),
        *([f"--limit-mm-per-prompt={json.dumps(limits)}"] if model.images else []),
        *(model.images.size_arguments if model.images else []),
        *model.engine("cuda").arguments,
    ]


# FlashInfer's sampler would be compiled, or fetched, when the first question comes. Without the order, CUDA counts the
# GPUs from the fastest on, and nvidia-smi as they are plugged in.
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
