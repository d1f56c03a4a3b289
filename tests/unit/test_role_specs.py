"""A role's defaults, its argument specification and the examples agree: what is documented is what is checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import kit_validate
from ansible.module_utils.kit_validate import Setting

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if (path / "tasks").is_dir())
WIRING: dict[str, Any] = yaml.safe_load((ROOT / "deploy/group_vars/all.yml").read_text())
EXAMPLES = sorted((ROOT / "deploy/inventories").glob("*/group_vars/kit/settings.yml.example"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.is_file() else None


def options(role: str) -> dict[str, dict[str, Any]]:
    spec = load(ROOT / "roles" / role / "meta/argument_specs.yml")
    return (spec or {}).get("argument_specs", {}).get("main", {}).get("options") or {}


def defaults(role: str) -> dict[str, Any]:
    return load(ROOT / "roles" / role / "defaults/main.yml") or {}


def all_options() -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = load(ROOT / "deploy/kit_variables.yml")["argument_specs"]["main"]["options"]
    return {**known, **{name: spec for role in ROLES for name, spec in options(role).items()}}


@pytest.mark.parametrize("role", ROLES)
def test_every_default_is_specified(role: str) -> None:
    assert set(defaults(role)) <= set(options(role))


@pytest.mark.parametrize("role", ROLES)
def test_every_option_has_a_default_or_is_wired(role: str) -> None:
    missing = [
        name
        for name, spec in options(role).items()
        if name not in defaults(role) and name not in WIRING and not spec.get("required")
    ]
    assert missing == []


@pytest.mark.parametrize("role", ROLES)
def test_names_begin_with_the_role(role: str) -> None:
    assert [name for name in {*options(role), *defaults(role)} if not name.startswith(f"{role}_")] == []


@pytest.mark.parametrize("role", ROLES)
def test_defaults_are_the_documented_ones(role: str) -> None:
    for name, value in defaults(role).items():
        spec = options(role)[name]
        if "default" in spec:
            assert value == spec["default"], name


@pytest.mark.parametrize("role", ROLES)
def test_defaults_have_the_specified_type(role: str) -> None:
    for name, value in defaults(role).items():
        if "{{" not in str(value):
            found = kit_validate.check_value(Setting(name, value, "defaults/main.yml"), options(role)[name])
            assert found == [], name


@pytest.mark.parametrize("role", ROLES)
def test_every_option_says_what_it_is(role: str) -> None:
    for name, spec in options(role).items():
        assert spec.get("type"), name
        assert spec.get("description"), name


@pytest.mark.parametrize("role", ROLES)
def test_every_default_is_documented_above_itself(role: str) -> None:
    path = ROOT / "roles" / role / "defaults/main.yml"
    if not path.is_file():
        pytest.skip("the role has no defaults")
    above = ""
    for line in path.read_text().splitlines():
        if re.match(r"\w+:", line):
            # Variables that belong together may share one comment.
            assert above.startswith("#") or re.match(r"\w+:", above), line
        above = line if line.strip() != "---" else above


def test_every_secret_is_marked_so_that_it_is_never_shown() -> None:
    for name, value in WIRING.items():
        if re.fullmatch(r"\{\{ kit_secret_\w+ \}\}", str(value)):
            assert all_options()[name].get("no_log"), name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parents[2].name)
def test_the_example_settings_are_valid(path: Path) -> None:
    text = re.sub(r"^# (\w+_\w+: )", r"\1", path.read_text(), flags=re.MULTILINE)
    settings = [Setting(name, value, path.name) for name, value in yaml.safe_load(text).items()]
    assert len(settings) > 10
    assert kit_validate.check_settings(settings, all_options(), {}) == []


def test_there_is_an_example_to_start_from() -> None:
    assert {path.parents[2].name for path in EXAMPLES} == {"example", "local"}
