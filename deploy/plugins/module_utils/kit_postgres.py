"""PostgreSQL of a host: its cluster's files, sizes, and what must exist in it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kit_fetch import digest_of

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


# --- Where its programs come from -------------------------------------------------------------------------------------


#: The trees in the runtime's wheel, by major version; links in kit_home/runtime.
WHEEL_TREES = {"16": "postgresql", "18": "postgresql18"}
#: Where distributions have a PostgreSQL: folder of its programs, folder of its extensions.
SYSTEM_TREES = (
    ("/usr/lib/postgresql/*/bin", "/usr/share/postgresql/{major}/extension"),  # Debian, Ubuntu
    ("/usr/pgsql-*/bin", "/usr/pgsql-{major}/share/extension"),  # postgresql.org's packages for Red Hat
)
ARCHIVES = "postgresql-archive"
#: In the stand-in for the contrib module uuid-ossp, by which it is told from the real one.
STAND_IN = "the kit's stand-in"


@dataclass(frozen=True)
class Programs:
    """A PostgreSQL to run: its programs, its extensions' folder and their names, and its major version, "16".

    ``build`` is what stands for it: when that is another one, the server must be started anew.
    """

    bin: Path
    extensions: Path
    names: frozenset[str]
    major: str
    build: Path

    @classmethod
    def at(cls, folder: Path, extensions: Path, major: str, build: Path) -> Programs:
        """Those in a folder ``bin``, with the extensions that are there now."""
        return cls(folder, extensions, frozenset(path.stem for path in extensions.glob("*.control")), major, build)

    def uuid_ossp(self) -> Path | None:
        """Where the kit's stand-in for uuid-ossp belongs; None for a server that has the real one."""
        control = self.extensions / "uuid-ossp.control"
        ours = not control.exists() or STAND_IN in control.read_text(errors="replace")
        return control.with_suffix("") if ours else None


def majors_with_data(home: Path) -> list[str]:
    """The versions of which there is data, the newest last."""
    return sorted((path.parent.name for path in (home / "var/postgres").glob("[0-9]*/PG_VERSION")), key=int)


def find_programs(home: Path, source: str, version: str, archive: str = "", sha256: str = "") -> Programs:
    """The PostgreSQL that a site runs.

    :param source: wheel, system or archive.
    :param version: major version; empty for that of the data which is there, else the source's first choice.
    :raises PostgresProblem: there is none.
    """
    if source == "archive":
        return _in_archive(home, Path(archive), sha256)
    system = _system_programs() if source == "system" else {}
    choices = sorted(system or WHEEL_TREES, key=int)
    kept = [major for major in majors_with_data(home) if major in choices]
    major = version or (kept[-1] if kept else choices[-1] if system else "16")
    if source == "system" and major not in system:
        has = f" (it has {', '.join(system)})" if system else ""
        raise PostgresProblem(
            f"postgres_source is system, but PostgreSQL{' ' + version if version else ''} is not installed on this "
            f"host{has}. Remedy: let an administrator install it: apt-get install postgresql"
            f"{'-' + version if version else ''} (its own server need not run: systemctl disable --now postgresql); or "
            "let the kit bring one: postgres_source: wheel"
        )
    if source == "system":
        return system[major]
    if major not in WHEEL_TREES:
        raise PostgresProblem(
            f"postgres_version is {version}, but the wheel has PostgreSQL {' and '.join(WHEEL_TREES)}. "
            "Remedy: choose one of them, or another postgres_source."
        )
    tree = home / "runtime" / WHEEL_TREES[major]
    return Programs.at(tree / "bin", tree / "share/postgresql/extension", major, tree)


def _system_programs() -> dict[str, Programs]:
    """Those that distributions have installed, by major version."""
    found = {}
    for programs, extensions in SYSTEM_TREES:
        for server in map(Path, glob(f"{programs}/postgres")):
            major = re.sub(r"\D", "", server.parent.parent.name)
            # A package with the client alone has no initdb.
            if major and (server.parent / "initdb").exists():
                found[major] = Programs.at(server.parent, Path(extensions.format(major=major)), major, server)
    return found


def find_tools(home: Path) -> tuple[Path, bool]:
    """The folder of psql and pg_dump for a server of unknown version, and whether they are known to speak TLS.

    The newest know all older servers; the wheel's are built without TLS.
    """
    installed = [Path(found).parent for pattern, _ in SYSTEM_TREES for found in glob(f"{pattern}/pg_dump")]
    newest = max(installed, key=lambda folder: int(re.sub(r"\D", "", folder.parent.name) or 0), default=None)
    return (newest, True) if newest else (home / "runtime" / WHEEL_TREES["18"] / "bin", False)


# --- A PostgreSQL out of an archive -----------------------------------------------------------------------------------


def _in_archive(home: Path, archive: Path, sha256: str) -> Programs:
    """Those of an archive: unpacked, or as they will be."""
    folder = home / "runtime" / ARCHIVES / sha256[:12]
    if folder.is_dir():
        template, initdb = next(folder.rglob("postgres.bki")), next(folder.rglob("bin/initdb"))
        return Programs.at(initdb.parent, template.parent / "extension", _version(template.read_text()), folder)
    prove(archive, sha256)
    major, names = "", []
    with _opened(archive) as tar:
        for member in tar:
            names.append(os.path.normpath(member.name))
            if names[-1].endswith("/postgres.bki") and (text := tar.extractfile(member)):
                major = _version(text.read(100).decode(errors="replace"))
    programs = next((folder / name for name in names if f"/{name}".endswith("/bin/initdb")), None)
    if not major or programs is None:
        raise PostgresProblem(
            f"{archive} (postgres_archive) holds no PostgreSQL server: bin/initdb or share/.../postgres.bki is missing."
            " Remedy: pack a whole installation, the folders bin, lib and share."
        )
    extensions = frozenset(Path(name).stem for name in names if name.endswith(".control"))
    return Programs(programs.parent, folder, extensions, major, folder)


def _version(template: str) -> str:
    """The major version that a server's catalog template names in its first line, ``# PostgreSQL 16``."""
    found = re.match(r"# PostgreSQL (\d+)", template)
    return found[1] if found else ""


def prove(archive: Path, sha256: str) -> None:
    """An archive is there, and it is the one that the site means.

    :raises PostgresProblem: it is not.
    """
    where = f"{archive} (postgres_archive)"
    try:
        with archive.open("rb") as stream:
            found = digest_of(stream).hex()
    except OSError as error:
        raise PostgresProblem(
            f"{where} cannot be read: {error.strerror}. Remedy: copy it to the host, for the service user to read."
        ) from None
    if found != sha256.lower():
        raise PostgresProblem(
            f"{where} has the sha256 {found}, not that of postgres_archive_sha256. "
            "Remedy: copy the file anew, or, if it is the right one, correct postgres_archive_sha256."
        )


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive) as tar:
            # Links out of its own folder and device files are refused where this Python knows how to.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
            yield tar
    except (tarfile.TarError, EOFError) as error:
        raise PostgresProblem(
            f"{archive} (postgres_archive) is no tar archive: {error}. Remedy: pack it as .tar.gz or .tar.xz."
        ) from None


def unpack(home: Path, archive: Path, sha256: str) -> bool:
    """Unpack an archive beside its place and rename it; return whether that was needed."""
    folder = home / "runtime" / ARCHIVES / sha256[:12]
    if folder.is_dir():
        return False
    prove(archive, sha256)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = folder.with_name(".new")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with _opened(archive) as tar:
            tar.extractall(scratch)
        os.rename(scratch, folder)
    except OSError as error:
        raise PostgresProblem(
            f"{archive} cannot be unpacked to {folder}: {error}. Remedy: see its words; often the disk is full."
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


# --- The cluster's files ----------------------------------------------------------------------------------------------


class Cluster:
    """The data of one PostgreSQL: ``var/postgres/<major>``, and the marker in ``etc`` that says that there was data.

    The marker is what tells a first deploy from a host that has lost its disk: an empty folder alone does not.
    """

    def __init__(self, home: Path, programs: Programs) -> None:
        self.bin, self.major = programs.bin, programs.major
        self.home = home
        self.parent = home / "var" / "postgres"
        self.data = self.parent / self.major
        self.marker = home / "etc" / "postgres.marker"

    def exists(self) -> bool:
        """Tell whether there is data of this version.

        :raises PostgresProblem: there is data of another version only, or there was data and it is gone.
        """
        if (self.data / "PG_VERSION").is_file():
            return True
        others = majors_with_data(self.home)
        if others:
            old = others[-1]
            tools = f"{self.home}/runtime/bin"
            raise PostgresProblem(
                f"The data in {self.parent}/{old} is of PostgreSQL {old}; PostgreSQL {self.major}, which the settings "
                f'name, cannot read it, and it was not touched. Remedy: stay with it (postgres_version: "{old}", from '
                f"where it comes now); or move: take a dump while it runs ({tools}/kit-exec --env-file "
                f"{self.home}/etc/env/postgres-admin.env -- {tools}/pg_dumpall --file=all.sql), make stop, move "
                f"{self.parent}/{old} and {self.marker} away, set the new version, make deploy DIFY=skip, load all.sql "
                f"with {tools}/psql in the same way, make deploy."
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
