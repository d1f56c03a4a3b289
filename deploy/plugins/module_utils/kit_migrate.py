"""Bring databases to a release's schema, and remember in them what was done.

The memory lies in the database itself (schema ``dify_kit``), not in a file beside it: a restored dump, or a new and
empty database, then says by itself how far it is.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

_REVISION = re.compile(r"^(revision|down_revision)(?:\s*:[^=\n]+)?\s*=\s*(\([^)]*\)|[^#\n]+)", re.MULTILINE)
LOG_TAIL_LINES = 25
# The modules' argument. Only the password is hidden: hiding the whole would blank out every "dify" in what they say.
POSTGRES_SPEC: dict[str, Any] = {
    "host": {"type": "str", "required": True},
    "port": {"type": "int", "required": True},
    "user": {"type": "str", "required": True},
    "password": {"type": "str", "required": True, "no_log": True},
    "database": {"type": "str", "required": True},
    "vector_database": {"type": "str"},
    "sslmode": {"type": "str", "default": "disable"},
    "sslrootcert": {"type": "path"},
}


class MigrationProblem(Exception):
    """The database can't be brought to this release; the message says why and what to do."""


def revisions(folder: Path) -> dict[str, tuple[str, ...]]:
    """Alembic's revisions in a ``versions`` folder, each with the ones it builds on.

    Read as text: asking alembic itself means importing all of Dify, 26 seconds.

    Raises:
        MigrationProblem: the folder is missing or empty, or a file of it names no revision.
    """
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted(folder.glob("*.py")):
        values = {name: ast.literal_eval(value.strip()) for name, value in _REVISION.findall(file.read_text())}
        if not isinstance(values.get("revision"), str):
            raise MigrationProblem(
                f"{file} names no revision.\nRemedy: the release is damaged; remove its folder and run `make deploy`."
            )
        down = values.get("down_revision") or ()
        found[values["revision"]] = (down,) if isinstance(down, str) else tuple(down)
    if not found:
        raise MigrationProblem(f"{folder} holds no migrations.\nRemedy: remove the release's folder, `make deploy`.")
    return found


def heads(graph: Mapping[str, tuple[str, ...]]) -> set[str]:
    """The revisions that no other builds on: where a database of this release must be."""
    return set(graph) - {down for downs in graph.values() for down in downs}


def as_numbers(version: str) -> tuple[int, ...]:
    """``1.16.0`` -> ``(1, 16, 0)``, to compare by."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def due_steps(steps: list[dict[str, Any]], came_from: str | None) -> list[dict[str, Any]]:
    """The release's upgrade steps for a database of an earlier release; of an unknown one (None): all, they repeat."""
    return [step for step in steps if came_from is None or as_numbers(came_from) < as_numbers(step["before"])]


class Memory:
    """What the kit remembers in a database: a few names with values."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def get(self, name: str) -> str | None:
        """The value, or None when there is none."""
        if not exists(self._connection, "dify_kit.state"):
            return None
        row = self._connection.execute("SELECT value FROM dify_kit.state WHERE name = %s", [name]).fetchone()
        return row[0] if row else None

    def set(self, name: str, value: str) -> None:
        """Remember a value."""
        self._connection.execute("CREATE SCHEMA IF NOT EXISTS dify_kit")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS dify_kit.state (name text PRIMARY KEY, value text NOT NULL)"
        )
        self._connection.execute(
            "INSERT INTO dify_kit.state VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            [name, value],
        )


def exists(connection: psycopg.Connection[Any], table: str) -> bool:
    """Whether a table (``schema.name``) is there."""
    row = connection.execute("SELECT to_regclass(%s)", [table]).fetchone()
    return bool(row and row[0])


def current(connection: psycopg.Connection[Any]) -> set[str]:
    """Where the database is: alembic's current revisions, empty for a new database."""
    if not exists(connection, "public.alembic_version"):
        return set()
    return {row[0] for row in connection.execute("SELECT version_num FROM public.alembic_version")}


@contextmanager
def connected(postgres: Mapping[str, Any]) -> Iterator[psycopg.Connection[Any]]:
    """A connection that commits each statement.

    Raises:
        MigrationProblem: the database doesn't answer or refuses us.
    """
    import psycopg  # only in the runtime's interpreter

    place = f"{postgres['database']} at {postgres['host']}:{postgres['port']}"
    try:
        connection = psycopg.connect(
            host=postgres["host"],
            port=postgres["port"],
            user=postgres["user"],
            password=postgres["password"],
            dbname=postgres["database"],
            sslmode=postgres["sslmode"],
            sslrootcert=postgres["sslrootcert"] if postgres["sslmode"].startswith("verify") else None,
            connect_timeout=10,
            autocommit=True,
        )
    except psycopg.OperationalError as error:
        raise MigrationProblem(
            f"The database {place} can't be used: {str(error).strip()}\n"
            "Remedy: `make status` shows whether postgres runs, `make logs SERVICE=postgres` why not; "
            "an external server is asked again by `make deploy`."
        ) from None
    with connection:
        yield connection


def run_logged(argv: list[str], directory: Path, log: Path) -> str:
    """Run a command, its output appended to a log; return that output.

    Raises:
        MigrationProblem: it failed; shows the end of its output.
    """
    done = subprocess.run(
        argv, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a") as stream:
        stream.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(argv)}\n{done.stdout}")
    if done.returncode != 0:
        lines = "\n    ".join(done.stdout.splitlines()[-LOG_TAIL_LINES:])
        raise MigrationProblem(
            f"`{' '.join(argv)}` ended with status {done.returncode}. The end of what it said:\n    {lines}\n"
            f"The whole: {log}\nRemedy: mend what it names and run again; it goes on where it stopped."
        )
    return done.stdout
