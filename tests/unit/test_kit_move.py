"""Which mode's data is the site's, and what of a dump another version of PostgreSQL gets; the rest needs servers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from ansible.module_utils import kit_migrate, kit_move


def have(home: Path, mode: str) -> None:
    """A home in which Dify has run in that mode."""
    note, data, *_ = kit_migrate.SIGNS[mode]
    (home / data / "16").mkdir(parents=True)
    (home / note).parent.mkdir(parents=True, exist_ok=True)
    if mode == "source":
        (home / note).symlink_to("releases/1.16.0")  # as the release may have been removed, to nothing
    else:
        (home / note).write_text("[]")


@pytest.mark.parametrize("mode", ["source", "compose"])
def test_data_counts_once_dify_has_run_with_it(tmp_path: Path, mode: str) -> None:
    other = {"source": "compose", "compose": "source"}[mode]
    assert not kit_migrate.alive(tmp_path, mode)
    have(tmp_path, mode)
    assert kit_migrate.alive(tmp_path, mode)
    assert not kit_migrate.alive(tmp_path, other)
    kit_move.check_one(tmp_path)
    (tmp_path / kit_migrate.SIGNS[mode][0]).unlink()
    assert not kit_migrate.alive(tmp_path, mode)


def told(home: Path, mode: str, host: str) -> None:
    """What that mode's Dify was told of PostgreSQL."""
    env = home / kit_migrate.SIGNS[mode].env
    env.parent.mkdir(parents=True, exist_ok=True)
    env.write_text(f"DB_HOST='{host}'\n")


@pytest.mark.parametrize("mode", ["source", "compose"])
def test_data_that_is_elsewhere_counts_too(tmp_path: Path, mode: str) -> None:
    told(tmp_path, mode, "db.example.com")
    assert not kit_migrate.alive(tmp_path, mode)
    note = tmp_path / kit_migrate.SIGNS[mode].note
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()
    assert kit_migrate.alive(tmp_path, mode)
    told(tmp_path, mode, kit_migrate.SIGNS[mode].own)
    assert not kit_migrate.alive(tmp_path, mode)


@pytest.mark.parametrize(
    ("source", "compose", "fits"),
    [
        ("127.0.0.1", "db_postgres", True),
        ("db.example.com", "db.example.com", True),
        ("127.0.0.1", "db.example.com", False),
        ("db.example.com", "db_postgres", False),
    ],
)
def test_the_server_stays_while_the_mode_changes(tmp_path: Path, source: str, compose: str, fits: bool) -> None:
    told(tmp_path, "source", source)
    told(tmp_path, "compose", compose)
    refused = pytest.raises(
        kit_move.MoveProblem, match=r"db\.example\.com is the site's .*\nRemedy: move with postgres_"
    )
    with contextlib.nullcontext() if fits else refused:
        kit_move.check_servers(tmp_path)


def test_two_that_count_are_one_too_many(tmp_path: Path) -> None:
    have(tmp_path, "source")
    have(tmp_path, "compose")
    with pytest.raises(kit_move.MoveProblem, match=r"Both modes have data.*\nRemedy: delete .*/current"):
        kit_move.check_one(tmp_path)


def test_a_dump_without_words_of_one_version() -> None:
    dump = (
        b"\\restrict abc\nSET statement_timeout = 0;\nSET transaction_timeout = 0;\n"
        b"COMMENT ON EXTENSION vector IS 'x';\nCOMMENT ON TABLE t IS 'y';\n"
        b"COPY public.t (line) FROM stdin;\nSET transaction_timeout = 0;\n\\\\restrict x\n\\.\n\\unrestrict abc\n"
    )
    assert b"".join(kit_move.portable(dump.splitlines(keepends=True))) == (
        b"SET statement_timeout = 0;\nCOMMENT ON TABLE t IS 'y';\n"
        b"COPY public.t (line) FROM stdin;\nSET transaction_timeout = 0;\n\\\\restrict x\n\\.\n"
    )


def test_what_is_put_away_is_whole(tmp_path: Path) -> None:
    (tmp_path / "var/postgres/16").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/postgres.marker").touch()
    folder = kit_move.put_away(tmp_path, "source", kit_move.OWN)
    assert sorted(path.name for path in folder.iterdir()) == ["postgres", "postgres.marker"]
    assert (folder / "postgres/16").is_dir()
    assert not (tmp_path / "var/postgres").exists()
    assert folder.parent == tmp_path / "var/moved"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_host_without_containers_has_nothing_to_move(tmp_path: Path) -> None:
    assert kit_move.from_containers(tmp_path, "1.16.0", ["dify"], check=False) == []
    assert list(tmp_path.iterdir()) == []
