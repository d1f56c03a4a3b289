"""What people see: the command's table, its picture, and a drafted catalog entry."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from inference import catalog, planner
from inference.catalog import draft
from inference.cli import main
from inference.planner import show
from inference.problem import Problem


def config(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return path


def test_the_parts_are_the_whole_card() -> None:
    for card, cards in (("a100-40g", 1), ("rtx4090", 2)):
        plan = planner.plan(catalog.load("kimi-vl-a3b-instruct"), planner.card(card), cards)
        assert sum(size for _, size, _ in show.parts(plan)) == pytest.approx(plan.memory.total)


def test_plan_prints_what_goes_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "kimi-vl-a3b-instruct", "--gpu", "a100-40g"]) == 0
    text = capsys.readouterr().out
    for part in (
        "Kimi-VL A3B Instruct on NVIDIA A100 40 GB, for the longest context",
        "language model              29.73",
        "tokens of 31,104 bytes",
        "The kit passes to vLLM 0.33.0:",
        "--dtype=float16",
        "--gpu-memory-utilization=0.94",
    ):
        assert part in text


def test_what_does_not_fit_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "kimi-vl-a3b-instruct", "--gpu", "rtx4090", "--goal", "most-users"]) == 2
    assert "Remedy: 2 of these cards (GPUS=2)" in capsys.readouterr().err


def test_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "MODEL= one of chameleon-30b" in capsys.readouterr().err


def test_without_a_gpu_on_the_host(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["plan", "kimi-vl-a3b-instruct"]) == 2
    assert "This host has no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_id", "card", "goal"),
    [("kimi-vl-a3b-instruct", "l40s", "longest-context"), ("smollm2-135m", "t4", "most-users")],
)
def test_the_picture(tmp_path: Path, model_id: str, card: str, goal: str) -> None:
    target = tmp_path / "plan.png"
    assert main(["plan", model_id, "--gpu", card, "--goal", goal, "--plot", str(target)]) == 0
    data = target.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1500, 960)


@pytest.mark.parametrize("name", ["missing/plan.png", "plan.txt-no-format"])
def test_a_picture_that_cannot_be_written(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smollm2-135m", "--gpu", "t4", "--plot", str(tmp_path / name)]) == 2
    assert "The picture cannot be written" in capsys.readouterr().err


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-training", "qwen3-vl-8b", "--cards", "8", "--zero", "3", "--gpu", "a100-80g"]) == 0
    assert "fits on NVIDIA A100 80 GB" in capsys.readouterr().out
    assert main(["plan-training", "qwen3-vl-8b", "--gpu", "a100-80g"]) == 0
    assert "does not fit on NVIDIA A100 80 GB" in capsys.readouterr().out
    assert main(["plan-training", "qwen3-vl-8b", "--zero", "7"]) == 2


@pytest.mark.parametrize("model_id", ["kimi-vl-a3b-instruct", "qwen3-vl-30b-a3b", "chameleon-30b", "smolvlm-500m"])
def test_a_draft_counts_what_the_entry_counts(tmp_path: Path, model_id: str) -> None:
    known = catalog.load(model_id)
    noise = {"architectures": [known.architecture], "torch_dtype": "bfloat16", "bos_token_id": 1, "rope_theta": 1e6}
    text = draft.draft(config(tmp_path, known.config | noise))
    entry = yaml.safe_load(text)
    assert entry["config"] == known.config
    assert entry["architecture"] == known.architecture
    assert entry["parameters"] == pytest.approx(known.parameters, rel=0.01)
    assert entry["context_length"] == known.config.get("text_config", known.config)["max_position_embeddings"]
    assert entry["repositories"]["huggingface"] == {"name": "TODO/owner-and-model", "revision": None, "verified": False}
    assert "rope_theta" not in text


def test_a_finished_draft_is_an_entry(tmp_path: Path) -> None:
    text = draft.draft(config(tmp_path, catalog.load("smollm2-135m").config)).replace("TODO/owner-and-model", "a/b")
    model = catalog.parse("m", yaml.safe_load(text), "m.yml")
    assert model.engines["cuda"].dtypes == ["float16", "bfloat16"]
    assert planner.plan(model, planner.card("t4")).max_model_len == 8192


def test_a_model_that_is_not_as_its_entry_says() -> None:
    kimi = catalog.load("kimi-vl-a3b-instruct")
    assert draft.differences(kimi, kimi.config | {"torch_dtype": "bfloat16"}) == []
    other = kimi.config | {"text_config": kimi.config["text_config"] | {"num_hidden_layers": 28, "more": 1}}
    assert draft.differences(kimi, other) == ["text_config.num_hidden_layers is 28, not 27"]
    assert draft.differences(kimi, {"architectures": ["KimiVLForConditionalGeneration"]}) == []


def test_add_writes_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config(tmp_path, catalog.load("smollm2-135m").config))
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)
    assert main(["catalog", "add", path, "--id", "new-model"]) == 0
    assert (tmp_path / "new-model.yml").read_text().startswith("# TODO")
    assert main(["catalog", "add", path, "--id", "new-model"]) == 2
    assert "exists. Remedy" in capsys.readouterr().err
    with pytest.raises(Problem, match="is no id"):
        draft.add(Path(path), "../evil")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is no JSON"), ("[]", "has no model_type"), ('{"model_type": "llama"}', "has no 'hidden_size'")],
)
def test_files_that_are_no_config(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(Problem, match=message):
        draft.draft(path)
    with pytest.raises(Problem, match="cannot be read"):
        draft.draft(tmp_path / "missing.json")
