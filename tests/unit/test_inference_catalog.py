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
    assert model.engines.keys() <= {"cpu", "cuda"}
    assert model.weights is None or len(model.weights.sha256) == 64
    assert all(engine.dtype == engine.dtypes[0] for engine in model.engines.values())


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
    with pytest.raises(Problem, match=r"does not run on cpu.*knows cuda"):
        catalog.load("kimi-vl-a3b-instruct").engine("cpu")


def test_what_nobody_has_seen_is_not_verified() -> None:
    raw = entry()
    raw["repositories"]["huggingface"] = {"name": "a/b", "revision": None, "verified": True}
    raw["repositories"]["modelscope"] = {"name": "a/b", "revision": "main", "verified": False}
    raw["repositories"]["elsewhere"] = {"name": "a/b", "verified": False}
    with pytest.raises(Problem) as caught:
        catalog.parse("m", raw, "m.yml")
    for part in (
        "huggingface.verified is true, but there is no revision",
        "modelscope.revision must be a commit of 40 hex digits, not 'main'",
        "elsewhere is not one of huggingface, modelscope",
    ):
        assert part in str(caught.value)


def test_images_belong_to_models_that_see() -> None:
    raw = entry()
    raw["modalities"].append("image")
    with pytest.raises(Problem, match="images must be there if, and only if, modalities has image"):
        catalog.parse("m", raw, "m.yml")
