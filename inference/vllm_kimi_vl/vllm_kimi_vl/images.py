"""Images as MoonViT wants them: in their own size and shape, cut into patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

# MoonViT has positions for so many patches in each direction.
MAX_GRID = 512


class KimiVLImagesKwargs(ImagesKwargs):
    """What ``--mm-processor-kwargs`` may set: a smaller limit gives fewer tokens for a large image."""

    in_token_limit: int


class KimiVLImageProcessor(BaseImageProcessor):
    """Kimi-VL's image processor; arguments and defaults as in the published one (``preprocessor_config.json``).

    An image of more than ``in_token_limit`` patches is made smaller, keeping its shape (bicubic); black is added on the
    right and below until the sides are whole multiples of a merged patch; then ``(value / 255 - mean) / std``, cut into
    patches row by row. The language model sees one token for each ``merge_kernel_size`` group of patches.

    Args:
        patch_size: side of a patch in pixels.
        pad_input: add black; must be true, as it is in every published configuration: vLLM counts tokens that way.
        image_mean: per channel, of 0 to 1.
        image_std: per channel, of 0 to 1.
        in_token_limit: most patches of an image before padding.
        merge_kernel_size: patches that become one token, rows and columns.
    """

    valid_kwargs = KimiVLImagesKwargs
    model_input_names = ["pixel_values", "image_grid_hws"]  # noqa: RUF012  # transformers' own declaration

    def __init__(
        self,
        patch_size: int = 14,
        pad_input: bool = False,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        in_token_limit: int = 4096,
        merge_kernel_size: Sequence[int] = (2, 2),
        **kwargs: Any,
    ) -> None:
        if not pad_input:
            raise ValueError(
                "preprocessor_config.json: pad_input is not true, but vLLM counts image tokens as if it were. "
                "Remedy: use the configuration of the model's repository."
            )
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.pad_input = pad_input
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.in_token_limit = in_token_limit
        self.merge_kernel_size = list(merge_kernel_size)

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """Patches of one or several images.

        Returns:
            ``pixel_values``: float32, (patches of all images, 3, patch_size, patch_size);
            ``image_grid_hws``: int64, (images, 2), rows and columns of patches.

        Raises:
            ValueError: an image is too long in one direction.
        """
        patches = [self.patches(image) for image in make_flat_list_of_images(images)]
        return BatchFeature(
            {
                "pixel_values": np.concatenate([part.reshape(-1, *part.shape[2:]) for part in patches]),
                "image_grid_hws": np.array([part.shape[:2] for part in patches]),
            },
            tensor_type=return_tensors,
        )

    def grid(self, width: int, height: int) -> tuple[int, int, int, int]:
        """What becomes of an image's size, in pixels.

        Returns:
            Width and height in pixels before padding, then rows and columns of patches.

        Raises:
            ValueError: the image is too long in one direction.
        """
        size = self.patch_size
        shown = f"{width} x {height} pixels"
        if (count := (width // size) * (height // size)) > self.in_token_limit:
            scale = math.sqrt(self.in_token_limit / count)
            width, height = int(width * scale), int(height * scale)
        rows, columns = (
            math.ceil(side / (size * merge)) * merge
            for side, merge in zip((height, width), self.merge_kernel_size, strict=True)
        )
        if max(rows, columns) >= MAX_GRID:
            raise ValueError(
                f"The image of {shown} is too long for its width: Kimi-VL sees at most "
                f"{(MAX_GRID - max(self.merge_kernel_size)) * size} pixels in one direction. Remedy: cut it into parts."
            )
        return width, height, rows, columns

    def patches(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One image as float32 of (rows, columns, 3, patch_size, patch_size).

        Raises:
            ValueError: it is too long in one direction.
        """
        size = self.patch_size
        width, height, rows, columns = self.grid(*image.size)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        # Beyond its edges an image is cut out as zeros. Colours are converted last, as published.
        pixels = np.asarray(image.crop((0, 0, columns * size, rows * size)).convert("RGB"), np.float32)
        values = (pixels / np.float32(255) - np.array(self.image_mean, np.float32)) / np.array(
            self.image_std, np.float32
        )
        return values.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3)
