"""Text and images together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import BatchFeature, ProcessorMixin


class KimiVLProcessor(ProcessorMixin):
    """Kimi-VL's processor: each image token of the text becomes as many as its image has."""

    image_token = "<|media_pad|>"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Token ids of texts and patches of images, in the order in which the texts name them.

        Args:
            images: one or several Pillow images.
            text: one or several texts.
            return_tensors: "pt" for PyTorch's tensors, "np" for numpy's.
            kwargs: passed on to the tokenizer.

        Raises:
            ValueError: the texts name another number of images, or an image cannot be used.
        """
        features = self.image_processor(images, return_tensors=return_tensors) if images is not None else {}
        texts = [text] if isinstance(text, str) else list(text or [])
        merged = math.prod(self.image_processor.merge_kernel_size)
        counts = [int(rows) * int(columns) // merged for rows, columns in features.get("image_grid_hws", [])]
        if texts and images is not None:
            named = sum(one.count(self.image_token) for one in texts)
            if named != len(counts):
                raise ValueError(f"The text has {named} {self.image_token}, but there are {len(counts)} images.")
            remaining = iter(counts)
            texts = [self._expand(one, remaining) for one in texts]
        tokens = self.tokenizer(texts, return_tensors=return_tensors, **kwargs) if texts else {}
        return BatchFeature({**tokens, **features})

    def _expand(self, text: str, counts: Iterator[int]) -> str:
        first, *rest = text.split(self.image_token)
        return first + "".join(self.image_token * next(counts) + part for part in rest)
