"""How far a database is, and what an upgrade still has to do."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from ansible.module_utils.kit_migrate import MigrationProblem, as_numbers, due_steps, heads, revisions, run_logged

STEPS = [{"name": "a", "before": "1.15.0"}, {"name": "b", "before": "1.16.0"}]


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(f'"""{name}\n\nRevision ID: {name}\n"""\nfrom alembic import op\n\n{text}\n')


def test_heads_are_what_nothing_builds_on(tmp_path: Path) -> None:
    write(tmp_path, "one", "revision = 'one'\ndown_revision = None\nbranch_labels = None")
    write(tmp_path, "two", 'revision: str = "two"\ndown_revision: str | None = "one"  # comment')
    write(tmp_path, "three", "revision = 'three'\ndown_revision = 'one'")
    assert heads(revisions(tmp_path)) == {"two", "three"}
    write(tmp_path, "four", "revision = 'four'\ndown_revision = (\n    'two',\n    'three',\n)")
    graph = revisions(tmp_path)
    assert graph["four"] == ("two", "three")
    assert heads(graph) == {"four"}


def test_a_damaged_release_is_named(tmp_path: Path) -> None:
    with pytest.raises(MigrationProblem, match="holds no migrations"):
        revisions(tmp_path)
    write(tmp_path, "half", "def upgrade():\n    revision = 'no'")
    with pytest.raises(MigrationProblem, match=r"half\.py names no revision"):
        revisions(tmp_path)


@pytest.mark.parametrize(
    ("came_from", "names"),
    [("1.14.2", ["a", "b"]), ("1.15.0", ["b"]), ("1.16.0", []), ("1.9.2", ["a", "b"]), (None, ["a", "b"])],
)
def test_steps_depend_on_where_the_database_comes_from(came_from: str | None, names: list[str]) -> None:
    assert [step["name"] for step in due_steps(STEPS, came_from)] == names


def test_versions_compare_as_numbers() -> None:
    assert as_numbers("1.9.2") < as_numbers("1.14.2") < as_numbers("1.16.0")


def test_a_failing_command_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    log = tmp_path / "migrate.log"
    assert run_logged(["/bin/echo", "fine"], tmp_path, log) == "fine\n"
    with pytest.raises(MigrationProblem, match=r"status 3.*\n    broken\n.*migrate\.log"):
        run_logged(["/bin/sh", "-c", "echo broken >&2; exit 3"], tmp_path, log)
    assert "fine" in log.read_text()
    assert "broken" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
