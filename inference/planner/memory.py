"""Where a card's memory goes when the engine runs, counted as vLLM itself measures it at the start.

vLLM takes `gpu_memory_utilization` of the card, loads the weights, runs the largest step there can be (images through
the vision tower, `max_num_batched_tokens` tokens through the layers, `max_num_seqs` rows through the sampler), and
gives what is left to the KV cache. So the parts below are bytes on one card, and the cache is the rest.

The constants are read from published logs of the engine (tests/data/engine_logs.yml); the forms from its source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from inference.planner.architecture import Architecture
from inference.planner.cards import GIB, Card

# The CUDA context's growth, cuBLAS' workspaces: what the process takes that PyTorch does not know of.
OUTSIDE_PYTORCH = 0.25 * GIB
# NCCL's and the custom all-reduce's buffers, a part of them for each other card.
GROUP = 0.15 * GIB
GROUP_A_CARD = 0.08 * GIB
# Since 0.17, on Hopper and later: the workspaces of FlashInfer's all-reduce that is fused with the norm after it.
FUSED_ALL_REDUCE = 1.4 * GIB
# The sampler works on all rows' logits in FP32 at once. With a sort, as before 0.17 (but 0.11.0, which had FlashInfer):
# logits twice, sorted, their indices in 64 bits, probabilities, sums, masks. Without: logits, probabilities, noise.
SORTING_SAMPLER = 9.7
SAMPLER = 4.0
# CUDA graphs: for each layer the graphs' nodes, and of MLA's decode kernels more. Logs: 0.55 to 0.95 GiB for 48 to 80
# layers, 1.6 to 2.3 for 61 with MLA, 0.97 for Kimi-VL's 27. All of steps of up to 512 tokens, as the launcher asks for.
GRAPHS = 0.2 * GIB
GRAPHS_A_LAYER = 0.011 * GIB
GRAPHS_A_LATENT_LAYER = 0.03 * GIB


def version(text: str) -> tuple[int, int, int]:
    """``"0.33.0"`` -> ``(0, 33, 0)``; what follows the numbers is left out."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text)
    if not found:
        raise ValueError(f"{text!r} is no version of vLLM")
    major, minor, patch = found.groups("0")
    return int(major), int(minor), int(patch)


@dataclass(frozen=True)
class Settings:
    """What decides on memory.

    Attributes:
        value_bytes: bytes a number of weights and activations: 2 for float16 and bfloat16.
        cache_bytes: bytes a number in the KV cache: 2, or 1 for fp8.
        image_tokens: of one image at its largest; 0 when no images are let in.
        images_per_prompt: allowed in one question.
        utilisation: share of the card that the engine may take, 0 to 1.
        eager: without CUDA graphs.
    """

    engine: str
    tensor_parallel: int
    max_num_seqs: int
    max_num_batched_tokens: int
    utilisation: float
    value_bytes: int = 2
    cache_bytes: float = 2
    image_tokens: int = 0
    images_per_prompt: int = 0
    eager: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one card.

    Attributes:
        total: what the card has.
        budget: what the engine may take; the parts below and the cache are in it, unless said otherwise.
        weights: language model, head and embeddings.
        vision_weights: tower and projector.
        outside: CUDA's and NCCL's own.
        images: image tokens kept until the language model has taken them.
        working: the largest of a step's activations, the sampler's rows and the vision tower's activations: they
            follow each other and use the same memory.
        workspace: buffers of the experts' kernels, kept between steps.
        graphs: CUDA graphs.
        graphs_in_budget: since 0.20 their estimate is taken from the budget; before, they came on top.
        cache: the KV cache; negative when the rest does not fit.
    """

    total: float
    budget: float
    weights: float
    vision_weights: float
    outside: float
    images: float
    working: float
    workspace: float
    graphs: float
    graphs_in_budget: bool
    cache: float

    @property
    def overhead(self) -> float:
        """What the budget loses beside weights and cache."""
        inside = self.graphs if self.graphs_in_budget else 0
        return self.outside + self.images + self.working + self.workspace + inside

    @property
    def free(self) -> float:
        """What is left to the driver and to other processes."""
        return self.total - self.budget - (0 if self.graphs_in_budget else self.graphs)


def estimate(model: Architecture, card: Card, settings: Settings) -> Memory:
    """What the engine will measure with these settings."""
    engine, parallel, size = version(settings.engine), settings.tensor_parallel, settings.value_bytes
    tower = frozenset({"vision", "projector"})
    vision_weights = model.weight_bytes(size, parallel, parts=tower) if model.vision else 0
    weights = model.weight_bytes(size, parallel) - vision_weights
    images, looking = _vision(model, settings)
    tokens = settings.max_num_batched_tokens
    workspace = _experts(model, card, settings)
    kept = engine >= (0, 14, 0)  # it stays between steps since then
    working = max(
        _step(model, settings) + (0 if kept else workspace),
        _sampler(engine) * settings.max_num_seqs * model.text.vocabulary * 4 + tokens * model.text.hidden * size,
        looking,
    )
    graphs = 0.0
    if not settings.eager:
        each = GRAPHS_A_LATENT_LAYER if model.text.latent else GRAPHS_A_LAYER
        graphs = GRAPHS + each * model.text.layers
    inside = engine >= (0, 20, 0)
    outside = OUTSIDE_PYTORCH
    if parallel > 1:
        outside += GROUP + GROUP_A_CARD * parallel
        outside += FUSED_ALL_REDUCE if engine >= (0, 17, 0) and card.compute_capability >= 9 else 0
    budget = card.memory * settings.utilisation
    taken = (
        weights + vision_weights + outside + images + working + (workspace if kept else 0) + (graphs if inside else 0)
    )
    return Memory(
        total=card.memory,
        budget=budget,
        weights=weights,
        vision_weights=vision_weights,
        outside=outside,
        images=images,
        working=working,
        workspace=workspace if kept else 0,
        graphs=graphs,
        graphs_in_budget=inside,
        cache=budget - taken,
    )


def _sampler(engine: tuple[int, int, int]) -> float:
    return SAMPLER if engine >= (0, 17, 0) or engine == (0, 11, 0) else SORTING_SAMPLER


def _step(model: Architecture, settings: Settings) -> float:
    """Activations of one layer with all of a step's tokens: the residual stream and the widest thing beside it."""
    text = model.text
    wide = 3 * text.intermediate / settings.tensor_parallel  # gate, up and their product
    return settings.max_num_batched_tokens * settings.value_bytes * (3 * text.hidden + wide)


def _experts(model: Architecture, card: Card, settings: Settings) -> float:
    """Buffers of the experts' kernels: each token's row for each of its experts, before and after.

    Quantised experts run in kernels that need none: those for 4 bits (Marlin), and on Blackwell TensorRT-LLM's.
    """
    small = model.quantised_bytes if "experts" in model.quantised_parts else 0
    if small and (small < 1 or card.compute_capability >= 10):
        return 0
    rows = settings.max_num_batched_tokens * model.text.experts_per_token
    return 2 * rows * model.text.hidden * settings.value_bytes


def cache_tokens(model: Architecture, memory: Memory, settings: Settings) -> int:
    """Tokens of one conversation as long as the KV cache can hold."""
    growth = model.token_bytes(settings.cache_bytes, settings.tensor_parallel)
    kept = model.conversation_bytes(
        1 << 40, settings.cache_bytes, settings.tensor_parallel, settings.max_num_batched_tokens
    )
    windows = kept - growth * (1 << 40)  # what layers with a window keep of it, however long it is
    if model.text.recurrent_layers or not growth or memory.cache <= windows:
        return log_tokens(model, memory, settings)
    return int((memory.cache - windows) / growth)


def log_tokens(model: Architecture, memory: Memory, settings: Settings) -> int:
    """What the engine's log calls the size of its KV cache: as if every layer kept every token.

    So it is too low for models that have layers with a window or a state (vLLM pages them alike, and divides by all).
    """
    layers = sum(cache.layers for cache in model.caches)
    each = sum(cache.token_bytes(settings.tensor_parallel, settings.cache_bytes) for cache in model.caches)
    return max(0, int(memory.cache / (each * (layers + model.text.recurrent_layers) / layers)))


def _vision(model: Architecture, settings: Settings) -> tuple[float, float]:
    """Bytes of kept image tokens, and of the tower's activations, at the most images that one step takes."""
    vision, each = model.vision, settings.image_tokens
    if vision is None or vision.codebook or not each or not settings.images_per_prompt:
        return 0, 0
    budget = max(settings.max_num_batched_tokens, each)
    number = max(1, min(budget // each, settings.images_per_prompt * settings.max_num_seqs))
    patches, parallel = each * vision.merge, settings.tensor_parallel
    row = 3 * vision.hidden + max(4 * vision.hidden, 2 * vision.intermediate) / parallel
    activations = number * patches * row * settings.value_bytes
    if version(settings.engine) < vision.flash_since:
        # PyTorch's attention with a mask, over all images at once, on every card alike: scores, and their softmax.
        activations += 2 * vision.heads * (number * patches) ** 2 * settings.value_bytes
    return number * each * vision.output * settings.value_bytes, activations
