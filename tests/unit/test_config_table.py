from pathlib import Path

import config_table
import pytest


def test_readme_is_up_to_date() -> None:
    text = config_table.README.read_text()
    assert text == config_table.updated(text), "run: .venv/bin/python deploy/tools/config_table.py --write"


def test_every_role_is_in_the_readme() -> None:
    specs = [file for file in config_table.ROOT.glob("roles/*/meta/argument_specs.yml") if config_table.options(file)]
    assert specs
    text = config_table.README.read_text()
    for file in specs:
        for name in config_table.options(file):
            assert f"| `{name}` |" in text


def test_a_missing_marker_is_an_error() -> None:
    with pytest.raises(ValueError, match="lacks"):
        config_table.updated("# A README without tables")


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"default": "source"}, "`source`"),
        ({"default": ""}, '`""`'),
        ({"default": []}, "`[]`"),
        ({"default": True}, "`true`"),
        ({"required": True}, "*required*"),
        ({}, "*computed*"),
        ({"no_log": True}, "*generated*"),
    ],
)
def test_default_values(option: dict[str, object], shown: str) -> None:
    assert config_table.value(option) == shown


def test_a_row_stays_one_row(tmp_path: Path) -> None:
    file = tmp_path / "specs.yml"
    file.write_text(
        "argument_specs: {main: {options: {a_b: {default: x|y, description: ['One,', 'two.'], choices: [x|y, z]}}}}"
    )
    assert config_table.table(config_table.options(file)).splitlines()[2] == (
        "| `a_b` | `x\\|y` | One, two. One of `x|y`, `z`. |"
    )
