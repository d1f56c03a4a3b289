"""PostgreSQL of a host: its cluster's files, sizes, and what must exist in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # on hosts only the runtime's interpreter has it
    import psycopg

GB = 1024
SUPERUSER = "postgres"


class PostgresProblem(Exception):
    """What is wrong, where, and the remedy."""


# --- Sizes ------------------------------------------------------------------------------------------------------------


def settings(memory_mb: int, max_connections: int) -> dict[str, str]:
    """Return the settings that depend on the host: memory that PostgreSQL may count on, and connections.

    The host also runs Dify and perhaps a model, so the shares are half of what PostgreSQL's manual gives a machine of
    its own: an eighth for shared buffers (never above 8 GB: beyond it the kernel's cache does better), three eighths
    assumed to be file cache. ``work_mem`` is per sort, not per connection: a quarter of the memory, if every connection
    sorted at once.

    :param memory_mb: the host's memory in megabytes.
    :param max_connections: what the pools of all processes may open together.
    """

    def megabytes(value: int, low: int, high: int) -> str:
        return f"{min(max(value, low), high)}MB"

    return {
        "max_connections": str(max_connections),
        "shared_buffers": megabytes(memory_mb // 8, 128, 8 * GB),
        "effective_cache_size": megabytes(memory_mb * 3 // 8, 256, 256 * GB),
        "maintenance_work_mem": megabytes(memory_mb // 64, 64, 1 * GB),
        "work_mem": megabytes(memory_mb // 4 // max(max_connections, 1), 4, 64),
    }


def config_value(value: Any) -> str:
    """Return a value as postgresql.conf wants it: on/off, a number, or a quoted text."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return str(value)
    return "'" + str(value).replace("'", "''") + "'"


# --- The cluster's files ----------------------------------------------------------------------------------------------


def major_version(bin_folder: Path) -> str:
    """Return the major version of the server's programs, "16"."""
    try:
        run = subprocess.run([bin_folder / "postgres", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PostgresProblem(
            f"PostgreSQL's programs in {bin_folder} do not run: {error}. "
            "Remedy: delete the folder runtime in kit_home and run `make deploy` again."
        ) from None
    found = re.search(r"\(PostgreSQL\) (\d+)", run.stdout)
    if found is None:
        raise PostgresProblem(f"{bin_folder}/postgres is not PostgreSQL: {run.stdout.strip()}. Remedy: see above.")
    return found[1]


class Cluster:
    """The data of one PostgreSQL: ``var/postgres/<major>``, and the marker in ``etc`` that says that there was data.

    The marker is what tells a first deploy from a host that has lost its disk: an empty folder alone does not.
    """

    def __init__(self, home: Path, bin_folder: Path) -> None:
        self.bin = bin_folder
        self.major = major_version(bin_folder)
        self.parent = home / "var" / "postgres"
        self.data = self.parent / self.major
        self.marker = home / "etc" / "postgres.marker"

    def exists(self) -> bool:
        """Tell whether there is data of this version.

        :raises PostgresProblem: there is data of another version only, or there was data and it is gone.
        """
        if (self.data / "PG_VERSION").is_file():
            return True
        others = sorted(path.parent.name for path in self.parent.glob("[0-9]*/PG_VERSION"))
        if others:
            raise PostgresProblem(
                f"The data in {self.parent}/{others[-1]} is of PostgreSQL {others[-1]}, but the runtime brings "
                f"PostgreSQL {self.major}, which cannot read it. Remedy: go back to the kit that wrote it, take a dump "
                f"there (`pg_dumpall`), move {self.parent}/{others[-1]} and {self.marker} away, deploy this kit and "
                "load the dump."
            )
        if self.marker.is_file():
            raise PostgresProblem(
                f"{self.marker} says: {self.marker.read_text().strip()}. But there is no data in {self.data}. Nothing "
                "was started: an empty database would look like a new installation. Remedy: bring the data back (mount "
                f"its disk, restore a backup into {self.data}); or, if the data may be lost, delete {self.marker}."
            )
        return False

    def initialise(self, password: str) -> None:
        """Make a new cluster beside its place and rename it: an interrupted run leaves nothing that looks like data."""
        scratch = self.parent / ".new"
        new, password_file = scratch / "data", scratch / "password"
        try:
            if scratch.exists():
                shutil.rmtree(scratch)
            scratch.mkdir(parents=True, mode=0o700)
            # The password goes through a file that only this user may read, for as long as initdb runs.
            password_file.write_text(password + "\n")
            run = subprocess.run(
                [
                    self.bin / "initdb",
                    f"--pgdata={new}",
                    f"--username={SUPERUSER}",
                    f"--pwfile={password_file}",
                    "--auth-local=scram-sha-256",
                    "--auth-host=scram-sha-256",
                    "--data-checksums",
                    "--encoding=UTF8",
                    "--locale=C.UTF-8",
                    "--no-instructions",
                ],
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise PostgresProblem(
                    f"initdb could not make a database in {self.parent}: {run.stderr.strip()[-1500:]}. Remedy: see its "
                    "words; often the disk is full, or the system has no locale C.UTF-8."
                )
            os.rename(new, self.data)  # over an empty folder too
        except OSError as error:
            raise PostgresProblem(
                f"The new database cannot be put to {self.data}: {error}. Remedy: free space, give "
                f"{self.parent} to the service user, or move away what is in it."
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def mark(self) -> bool:
        """Note that there is data from now on; return whether the note is new."""
        if self.marker.is_file():
            return False
        self.marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch = self.marker.with_suffix(".new")
        with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"PostgreSQL {self.major} keeps data in {self.data} since {time.strftime('%Y-%m-%d')}\n")
        os.replace(scratch, self.marker)
        return True


# --- What is in it ----------------------------------------------------------------------------------------------------


class Catalog:
    """Roles, databases and extensions of a running server, brought to what is wanted; notes what it changes."""

    def __init__(self, login: Mapping[str, Any], check: bool) -> None:
        self.login = {"connect_timeout": 10, **login}
        self.check = check
        self.changes: list[str] = []

    def connect(self, user: str, password: str, database: str) -> psycopg.Connection[Any]:
        """Log in; each statement is its own transaction, as CREATE DATABASE wants."""
        import psycopg

        return psycopg.connect(user=user, password=password, dbname=database, autocommit=True, **self.login)

    def accepts(self, user: str, password: str, database: str = "postgres") -> bool:
        """Tell whether a login works: the only proof that a password is the one in force."""
        import psycopg

        try:
            self.connect(user, password, database).close()
        except psycopg.OperationalError as error:
            if "password authentication failed" in str(error):
                return False
            raise PostgresProblem(
                f"PostgreSQL does not answer on {self.login.get('host')}:{self.login.get('port')}: {error}. "
                "Remedy: `make status` shows whether postgres runs, `make logs SERVICE=postgres` why not."
            ) from None
        return True

    def run(self, connection: psycopg.Connection[Any], change: str, statement: Any) -> None:
        """Note a change and make it, unless only looking."""
        self.changes.append(change)
        if not self.check:
            connection.execute(statement)

    def ensure_password(self, connection: psycopg.Connection[Any], user: str, password: str) -> None:
        """Give a role another password; what is sent (and perhaps logged by the server) is its SCRAM hash only."""
        from psycopg import sql

        hashed = connection.pgconn.encrypt_password(password.encode(), user.encode(), b"scram-sha-256").decode()
        self.run(
            connection,
            f"password of {user}",
            sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(user), sql.Literal(hashed)),
        )

    def ensure_role(self, connection: psycopg.Connection[Any], user: str, password: str) -> None:
        """Have a role that may log in with this password, and nothing more."""
        from psycopg import sql

        known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [user]).fetchone()
        if known is None:
            self.run(connection, f"role {user}", sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(user)))
        if known is None or not self.accepts(user, password):
            self.ensure_password(connection, user, password)

    def ensure_database(self, connection: psycopg.Connection[Any], database: str, owner: str) -> bool:
        """Have a database of this owner; return whether it is there (it is not when only looking)."""
        from psycopg import sql

        row = connection.execute(
            "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = %s", [database]
        ).fetchone()
        names = {"database": sql.Identifier(database), "owner": sql.Identifier(owner)}
        if row is None:
            # template0: whatever somebody put into template1 must not come along.
            statement = sql.SQL("CREATE DATABASE {database} OWNER {owner} TEMPLATE template0").format(**names)
            self.run(connection, f"database {database}", statement)
            return not self.check
        if row[0] != owner:
            self.run(
                connection,
                f"owner of {database}",
                sql.SQL("ALTER DATABASE {database} OWNER TO {owner}").format(**names),
            )
        return True

    def ensure_limit(self, connection: psycopg.Connection[Any], database: str, limit: int) -> None:
        """Let ordinary users have so many connections to a database at a time; -1: as many as the server has."""
        from psycopg import sql

        row = connection.execute("SELECT datconnlimit FROM pg_database WHERE datname = %s", [database]).fetchone()
        if row is not None and row[0] != limit:
            statement = sql.SQL("ALTER DATABASE {} CONNECTION LIMIT {}")
            self.run(
                connection,
                f"connection limit of {database}",
                statement.format(sql.Identifier(database), sql.Literal(limit)),
            )

    def ensure_extensions(self, connection: psycopg.Connection[Any], database: str, extensions: Sequence[str]) -> None:
        """Have extensions in the version that the server brings."""
        from psycopg import sql

        for extension in extensions:
            row = connection.execute(
                "SELECT installed_version, default_version FROM pg_available_extensions WHERE name = %s", [extension]
            ).fetchone()
            if row is None:
                raise PostgresProblem(
                    f"The PostgreSQL of this host does not have the extension {extension}, which {database} needs. "
                    "Remedy: correct postgres_extensions, or use a PostgreSQL that has it."
                )
            name = sql.Identifier(extension)
            if row[0] is None:
                statement = sql.SQL("CREATE EXTENSION {}").format(name)
                self.run(connection, f"extension {extension} in {database}", statement)
            elif row[0] != row[1]:
                statement = sql.SQL("ALTER EXTENSION {} UPDATE").format(name)
                self.run(connection, f"extension {extension} {row[0]} -> {row[1]} in {database}", statement)
