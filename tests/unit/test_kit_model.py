"""`make model`: the site's model changes when the new one has answered, and not before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy import kit


def deploys(monkeypatch: pytest.MonkeyPatch, status: int) -> list[list[str]]:
    seen: list[list[str]] = []

    def deploy(folder: Path, arguments: list[str]) -> int:
        seen.append(arguments)
        return status

    monkeypatch.setattr(kit, "deploy", deploy)
    return seen


def test_a_new_model_is_deployed_and_then_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = deploys(monkeypatch, 0)
    settings = tmp_path / "group_vars/kit/settings.yml"
    assert kit.switch("s", tmp_path, "tiny-kimi-vl", []) == 0
    assert seen == [["-e", "inference_model=tiny-kimi-vl"]]
    assert settings.read_text() == "---\ninference_model: tiny-kimi-vl\n"
    settings.write_text("kit_port_base: 8080\ninference_model: smollm2-135m\nx: 1")
    assert kit.switch("s", tmp_path, "tiny-kimi-vl", []) == 0
    assert settings.read_text() == "kit_port_base: 8080\ninference_model: tiny-kimi-vl\nx: 1"


@pytest.mark.parametrize(("status", "arguments"), [(2, []), (0, ["--check"])])
def test_a_deploy_that_failed_or_only_looked_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, arguments: list[str]
) -> None:
    deploys(monkeypatch, status)
    assert kit.switch("s", tmp_path, "tiny-kimi-vl", arguments) == status
    assert not (tmp_path / "group_vars").exists()


@pytest.mark.parametrize(
    ("file", "text", "model", "said"),
    [
        ("hosts.yml", "kit: {}", "no-such-model", r"no model 'no-such-model'.*MODEL= one of .*smollm2-135m"),
        ("hosts.yml", "kit: {}", "", r"no model ''.*MODEL= one of"),
        ("host_vars/gpu.yml", "inference_model: x", "tiny-kimi-vl", r"stands in .*host_vars/gpu\.yml.*Remedy: write"),
        (
            "group_vars/kit/settings.yml",
            "inference_endpoint: external",
            "tiny-kimi-vl",
            r"another server's.*provider_model",
        ),
    ],
)
def test_refused_before_anything_happens(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    text: str,
    model: str,
    said: str,
) -> None:
    seen = deploys(monkeypatch, 0)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(SystemExit) as end:
        kit.switch("s", tmp_path, model, [])
    assert end.value.code == 2

    assert re.search(said, capsys.readouterr().err, re.DOTALL)
    assert seen == []
