"""The tiny Kimi-VL's tensors are those of a Kimi-VL, and the catalog describes it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from inference import catalog, tiny
from inference.problem import Problem
from inference.weights import Wish, origins

TINY = catalog.load("tiny-kimi-vl")


def parameters(config: dict[str, Any]) -> int:
    return sum(math.prod(shape) for _, shape in tiny.shapes(config))


def test_the_real_models_shapes_have_the_published_number_of_parameters() -> None:
    """Text 15.960, vision 0.417, projector 0.031 billion: the sum of the published checkpoint."""
    assert parameters(catalog.load("kimi-vl-a3b-instruct").config) == pytest.approx(16.408e9, rel=1e-4)


def test_the_catalog_knows_the_tiny_model() -> None:
    def within(part: dict[str, Any], whole: dict[str, Any]) -> None:
        for name, value in part.items():
            within(value, whole[name]) if isinstance(value, dict) else None
            assert isinstance(value, dict) or value == whole[name], name

    within(TINY.config, tiny.CONFIG)
    assert TINY.architecture in tiny.CONFIG["architectures"]
    assert parameters(tiny.CONFIG) == pytest.approx(TINY.parameters * 1e9, rel=0.01)


def test_it_comes_from_this_host_or_a_folder_and_from_no_hub() -> None:
    assert list(origins(TINY, Wish(mirror="https://hub.example"))) == ["built"]
    with pytest.raises(Problem, match="huggingface, which does not have tiny-kimi-vl"):
        origins(TINY, Wish(source="huggingface"))
