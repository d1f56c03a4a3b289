"""Bring databases to a release's schema, and remember in them what was done.

The memory lies in the database itself (schema ``dify_kit``), not in a file beside it: a restored dump, or a new and
empty database, then says by itself how far it is.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .kit_files import parse_env

if TYPE_CHECKING:
    import psycopg

_REVISION = re.compile(r"^(revision|down_revision)(?:\s*:[^=\n]+)?\s*=\s*(\([^)]*\)|[^#\n]+)", re.MULTILINE)
LOG_TAIL_LINES = 25


class Signs(NamedTuple):
    """Where a mode's data is seen.

    Attributes:
        note: below kit_home, written when Dify has run with that mode.
        data: its PostgreSQL's folder, below kit_home.
        env: what Dify was told, below kit_home.
        own: the address of its PostgreSQL in there, unless another server is the site's.
    """

    note: str
    data: str
    env: str
    own: str


SIGNS = {
    "source": Signs("current", "var/postgres", "etc/env/api.env", "127.0.0.1"),
    "compose": Signs("etc/compose/has-data.json", "var/compose/postgres", "etc/env/dify.env", "db_postgres"),
}
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


@contextlib.contextmanager
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


def point_current(home: Path, version: str, *, check: bool = False) -> bool:
    """Point ``current`` to a release; whether it did not yet."""
    link, target = home / "current", f"releases/{version}"
    if link.is_symlink() and os.readlink(link) == target:
        return False
    if not check:
        new = link.with_name(".current.new")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(link)
    return True


def is_filled(folder: Path) -> bool:
    """Whether a folder is there, with something in it."""
    with contextlib.suppress(OSError):
        return any(folder.iterdir())
    return False


def elsewhere(home: Path, mode: str) -> str:
    """The address of the PostgreSQL that the mode's Dify uses, where it isn't the mode's own; empty otherwise."""
    signs = SIGNS[mode]
    with contextlib.suppress(OSError):
        host = parse_env((home / signs.env).read_text()).get("DB_HOST", "")
        return host if host != signs.own else ""
    return ""


def alive(home: Path, mode: str) -> bool:
    """Whether that mode has the site's data: a deploy in it has come so far that Dify ran."""
    signs = SIGNS[mode]
    return os.path.lexists(home / signs.note) and (is_filled(home / signs.data) or bool(elsewhere(home, mode)))


def make_signing_key(cli: str, key: Path, log: Path, *, check: bool = False) -> list[str]:
    """Make the site's key pair for signing plugins where there is none; return what was done.

    ``cli`` is the plugin daemon's command line; ``key`` the pair's path without .private.pem and .public.pem.
    """
    private, public = key.with_name(key.name + ".private.pem"), key.with_name(key.name + ".public.pem")
    if private.exists() and public.exists():
        return []
    if not check:
        # Aside and with the right mode first: the daemon's tool writes the private key for everybody to read.
        key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = key.with_name(".new")
        run_logged([cli, "signature", "generate", "--filename", str(aside)], key.parent, log)
        for suffix, target in ((".private.pem", private), (".public.pem", public)):
            half = aside.with_name(aside.name + suffix)
            half.chmod(0o600)
            half.replace(target)
    return ["signing key made"]
