"""The catalog: every entry is whole, and a mistake in one is named with all others."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from inference import catalog
from inference.problem import Problem


def entry() -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((catalog.FOLDER / "smollm2-135m.yml").read_text())
    return raw


@pytest.mark.parametrize("model_id", catalog.ids())
def test_entries_are_whole(model_id: str) -> None:
    model = catalog.load(model_id)
    assert model.id == model_id
    assert model.engines
    assert len(model.weights.sha256) == 64


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(Problem, match=r"no model 'gpt-9'.*inference_model to one of: .*smollm2-135m"):
        catalog.load("gpt-9")


def test_a_name_with_a_path_in_it_is_unknown() -> None:
    with pytest.raises(Problem, match="no model"):
        catalog.load("../catalog/smollm2-135m")


def test_all_mistakes_at_once() -> None:
    raw = entry()
    del raw["licence"]
    raw["contxt"] = 1
    raw["context_length"] = "8k"
    raw["modalities"] = ["text", "smell"]
    raw["weights"].pop("sha256")
    raw["engines"]["cpu"]["dtype"] = "int3"
    with pytest.raises(Problem) as caught:
        catalog.parse("m", raw, "m.yml")
    for part in (
        "m.yml",
        "licence is missing",
        "contxt is not known",
        "context_length must be int, not '8k'",
        "smell",
        "weights.sha256 is missing",
        "engines.cpu.dtype must be one of bfloat16, float16, float32",
        "Remedy",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_not_a_mapping(raw: object) -> None:
    with pytest.raises(Problem, match="must be a mapping"):
        catalog.parse("m", raw, "m.yml")


def test_hardware_it_does_not_run_on() -> None:
    with pytest.raises(Problem, match=r"does not run on cuda.*knows cpu"):
        catalog.load("smollm2-135m").engine("cuda")
