"""What a site wants of a plan, and the plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from inference.catalog import Model
from inference.planner.architecture import Architecture, read
from inference.planner.cards import Card
from inference.planner.memory import Memory

GOALS = ("longest-context", "most-users")
VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
CACHE_BYTES = {"auto": 0, "fp8": 1}  # auto: as the model's numbers


@dataclass(frozen=True)
class Wishes:
    """What a site fixes; zero, an empty text or None leaves it to the planner. Tokens, sequences, share of 0 to 1."""

    goal: str = "longest-context"
    dtype: str = ""
    kv_cache_dtype: str = "auto"
    tensor_parallel: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 0
    images_per_prompt: int | None = None
    gpu_memory_utilization: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What the kit passes to the engine, and why it fits.

    Attributes:
        gpus: cards of the host that were offered; one engine uses ``tensor_parallel`` of them.
        engine: vLLM's version.
        dtype: float16, bfloat16 or float32.
        kv_cache_dtype: auto (as ``dtype``) or fp8.
        max_model_len: tokens of the longest conversation.
        max_num_seqs: conversations answered at the same time.
        max_num_batched_tokens: tokens of one step.
        images_per_prompt: 0 for a model that does not see.
        image_tokens: of the largest image.
        gpu_memory_utilization: share of each card.
        kv_cache_tokens: what the KV cache will hold, all conversations together.
        memory: bytes on each card.
        notes: worth knowing, for people.
    """

    model: Model
    goal: str
    card: Card
    gpus: int
    engine: str
    dtype: str
    kv_cache_dtype: str
    tensor_parallel: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    images_per_prompt: int
    image_tokens: int
    gpu_memory_utilization: float
    kv_cache_tokens: int
    memory: Memory
    notes: tuple[str, ...] = ()

    @cached_property
    def architecture(self) -> Architecture:
        """The model, counted."""
        return read(self.model.config)

    @property
    def cache_bytes(self) -> float:
        """Bytes of a number in the KV cache."""
        return CACHE_BYTES[self.kv_cache_dtype] or VALUE_BYTES[self.dtype]

    @property
    def replicas(self) -> int:
        """Engines that the offered cards can run side by side."""
        return self.gpus // self.tensor_parallel

    @property
    def full_conversations(self) -> float:
        """Conversations of ``max_model_len`` tokens that the KV cache holds at the same time."""
        return self.kv_cache_tokens / self.max_model_len

    @property
    def least_seconds_a_token(self) -> float:
        """A lone answer cannot be faster: each token reads the active weights from memory once. 0 if unknown."""
        if not self.card.bandwidth:
            return 0.0
        read_bytes = self.architecture.active_parameters * VALUE_BYTES[self.dtype]
        return read_bytes / self.tensor_parallel / (self.card.bandwidth * 1e9)
