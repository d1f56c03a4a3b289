"""A site's data from one mode to the other: databases as dumps, files as copies; the rows are counted.

Until everything is there the old data is only read, and it is what counts (`kit_migrate.alive`): a move that broke off
begins again, and a deploy in the old mode goes on as if nothing had been. Redis isn't moved: it holds sessions and
queues, and a container's is older than most hosts'.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kit_files import parse_env
from .kit_images import docker
from .kit_migrate import SIGNS, alive, elsewhere, point_current

#: Services of upstream's Compose file.
DATABASES = ("db_postgres", "pgvector")
# Of the whole data that both copies need for a while, in parts of it.
ROOM = 1.1
# What one version writes into a dump and another doesn't know. An extension's comment is for its owner to make, who has
# done so already.
_SKIPPED = (b"SET transaction_timeout", b"\\restrict ", b"\\unrestrict ", b"COMMENT ON EXTENSION ")
_LAST = b"-- PostgreSQL database dump complete\n"
_TABLES = (
    "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables "
    "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
)
# Made anew by the plugin daemon where it starts: plugins' programs, with paths of the other mode in them.
_MADE_ANEW = ("cwd", ".cache")


class MoveProblem(Exception):
    """The data can't be moved; the message says why, and what to do. What was is untouched."""


# --- Databases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A PostgreSQL as its programs reach it.

    Attributes:
        words: what stands before ``psql`` or ``pg_dump`` on a command line.
        environment: in which these run; passwords are in here.
        superuser: whether its user owns the server, and so may make databases, but not drop all that he owns.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]
    superuser: bool

    def start(self, program: str, *arguments: str, **pipes: Any) -> subprocess.Popen[bytes]:
        """Start one of the server's programs; ``pipes`` as `subprocess.Popen` has them."""
        environment = {**os.environ, **self.environment}
        return subprocess.Popen([*self.words, program, *arguments], env=environment, **pipes)

    def sql(self, database: str, text: str) -> list[str]:
        """Run statements, return the rows' texts.

        Raises:
            MoveProblem: one of them failed.
        """
        options = ["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"]
        pipe = subprocess.PIPE
        with self.start("psql", *options, f"--dbname={database}", stdin=pipe, stdout=pipe, stderr=pipe) as running:
            said, error = running.communicate(text.encode())
        if running.returncode:
            raise MoveProblem(f"PostgreSQL refuses {text[:80]!r} in {database}: {error.decode().strip()}")
        return said.decode().splitlines()

    def empty(self, database: str) -> None:
        """Leave a database without content, in existence."""
        name = '"' + database.replace('"', '""') + '"'
        if self.superuser:
            self.sql("postgres", f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            self.sql("postgres", f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        else:
            self.sql(database, "DROP OWNED BY CURRENT_USER CASCADE")

    def rows(self, database: str) -> dict[str, int]:
        """Table -> how many rows it has."""
        tables = self.sql(database, _TABLES)
        counts = [f"SELECT '{table.replace(chr(39), chr(39) * 2)}', count(*) FROM {table}" for table in tables]
        lines = self.sql(database, " UNION ALL ".join(counts)) if counts else []
        return {table: int(count) for table, _, count in (line.rpartition("|") for line in lines)}


def portable(dump: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a plain dump that every version of PostgreSQL understands; rows of tables as they are."""
    copying = False
    for line in dump:
        if copying:
            copying = line != b"\\.\n"
        elif line.startswith(_SKIPPED):
            continue
        else:
            copying = line.startswith(b"COPY ") and line.endswith(b"FROM stdin;\n")
        yield line


def copy_database(old: Server, database: str, new: Server, target: str) -> int:
    """Replace what ``target`` holds by a copy; return how many rows that is.

    Raises:
        MoveProblem: it can't be read or written, or the copy has other rows.
    """
    new.empty(target)
    with tempfile.TemporaryFile() as reading, tempfile.TemporaryFile() as writing:
        dump = old.start(
            "pg_dump", "--no-owner", "--no-privileges", f"--dbname={database}", stdout=subprocess.PIPE, stderr=reading
        )
        options = ["--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1", f"--dbname={target}"]
        load = new.start("psql", *options, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=writing)
        assert dump.stdout
        assert load.stdin
        whole = False
        try:
            for line in portable(dump.stdout):
                load.stdin.write(line)
                whole = whole or line == _LAST
            load.stdin.close()
        except BrokenPipeError:
            pass  # psql has ended, and says why
        # psql commits what a dump that broke off has left, too: the next try empties the database.
        dump.stdout.close()
        failed = {"pg_dump": dump.wait(), "psql": load.wait()}
        for name, output in (("psql", writing), ("pg_dump", reading)):
            if failed[name]:
                output.seek(0)
                said = output.read().decode(errors="replace").strip()[-1500:]
                raise MoveProblem(f"The database {database} can't be copied: {name} says: {said}")
    if not whole:
        raise MoveProblem(f"The database {database} can't be copied: its dump has no end.")
    before, after = old.rows(database), new.rows(target)
    if before != after:
        tables = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        raise MoveProblem(f"The copy of the database {database} has other rows, in {', '.join(tables)}.")
    return sum(after.values())


def own_server(home: Path, seconds: float = 60) -> Server:
    """The kit's PostgreSQL, as the user that Dify logs in as; waits until it answers.

    Raises:
        MoveProblem: it does not.
    """
    programs = f"{home}/runtime/bin:/usr/bin:/bin"
    server = Server((), {**parse_env((home / "etc/env/postgres.env").read_text()), "PATH": programs}, superuser=False)
    end = time.monotonic() + seconds
    while True:
        try:
            server.sql("postgres", "SELECT 1")
            return server
        except MoveProblem as problem:
            if time.monotonic() > end:
                raise MoveProblem(f"{problem}\nRemedy: make start, make logs SERVICE=postgres") from None
        time.sleep(0.5)


# --- Containers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Containers:
    """The databases' containers.

    Attributes:
        compose: words before a command of ``docker compose`` with the site's files.
        settings: the site's values for upstream's .env.
    """

    compose: tuple[str, ...]
    settings: Mapping[str, str]

    def call(self, *arguments: str) -> str:
        """Run a command of ``docker compose``; return its output.

        Raises:
            MoveProblem: it failed.
        """
        done = subprocess.run([*self.compose, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise MoveProblem(f"`docker compose {' '.join(arguments)}` failed: {done.stderr.strip()[-1500:]}")
        return done.stdout

    def services(self) -> list[str]:
        """The databases that the site has."""
        known = self.call("config", "--services").split()
        return [name for name in DATABASES if name in known]

    def server(self, service: str, seconds: float = 180) -> Server:
        """A database's server, which must have been started; waits until it answers.

        Raises:
            MoveProblem: it does not.
        """
        container = self.call("ps", "--quiet", service).strip()
        prefix = {"db_postgres": "DB_USERNAME DB_PASSWORD", "pgvector": "PGVECTOR_USER PGVECTOR_PASSWORD"}[service]
        user, password = prefix.split()
        variables = {"PGUSER": self.settings[user], "PGPASSWORD": self.settings[password]}
        names = [word for name in variables for word in ("--env", name)]
        server = Server(("docker", "exec", "--interactive", *names, container), variables, superuser=True)
        end = time.monotonic() + seconds
        # Over TCP: while it makes its data folder, the server listens on its socket only.
        while server.start("pg_isready", "--quiet", "--host=127.0.0.1", stderr=subprocess.DEVNULL).wait():
            if time.monotonic() > end:
                raise MoveProblem(f"The container of {service} does not answer.\nRemedy: docker logs {container[:12]}")
            time.sleep(0.5)
        return server

    def pairs(self, own: Sequence[str]) -> list[tuple[str, str, str]]:
        """The kit's databases (Dify's, the plugin daemon's, the vectors'), each with its service and its name there."""
        known = self.services()
        if "db_postgres" not in known:
            return []  # another server's, in either mode
        there = [("db_postgres", self.settings["DB_DATABASE"]), ("db_postgres", self.settings["DB_PLUGIN_DATABASE"])]
        if "pgvector" in known:
            there.append(("pgvector", self.settings["PGVECTOR_DATABASE"]))
        return [(name, *place) for name, place in zip(own, there, strict=False)]


def in_container(image: str, script: str, **mounts: tuple[Path, bool]) -> str:
    """Run a shell script as root in a container that has nothing but these folders; return its output.

    ``mounts``: name below / -> (folder on the host, whether it may be written).

    Raises:
        MoveProblem: it failed.
    """
    volumes = [
        word
        for name, (folder, writable) in mounts.items()
        for word in ("--volume", f"{folder}:/{name}{'' if writable else ':ro'}")
    ]
    done = docker(
        "run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "sh", *volumes, image, "-c", script
    )
    if done.returncode:
        raise MoveProblem(f"A container of {image} that works on files fails: {done.stderr.strip()[-1500:]}")
    return done.stdout


def copy_files(image: str, old: Path, new: Path, owner: str = "") -> None:
    """Replace what is in a folder by a copy, made by root in a container: the files may be any container's user's.

    With an ``owner`` the copy is his alone.

    Raises:
        MoveProblem: it failed.
    """
    for folder in (new.parent, new):
        folder.mkdir(mode=0o700, exist_ok=True)
    kept = " ".join(f"/from/{name}" for name in _MADE_ANEW)
    script = (
        "set -e; find /to -mindepth 1 -maxdepth 1 -exec rm -rf {} +; "
        f'for one in /from/* /from/.[!.]*; do case " {kept} " in *" $one "*) continue;; esac; '
        '[ ! -e "$one" ] || cp -a "$one" /to/; done'
    )
    if owner:
        script += f"; chown -R {owner} /to; chmod -R go= /to"
    in_container(image, script, **{"from": (old, False), "to": (new, True)})


def check_room(image: str, home: Path, folders: Iterable[Path]) -> None:
    """Refuse to fill the disk.

    Raises:
        MoveProblem: says how much is missing.
    """
    there = {f"at{number}": (folder, False) for number, folder in enumerate(folders) if folder.is_dir()}
    kibibytes = in_container(image, f"du -sk {' '.join(f'/{name}' for name in there)}", **there) if there else ""
    needed = int(sum(int(line.split()[0]) for line in kibibytes.splitlines()) * 1024 * ROOM)
    free = shutil.disk_usage(home).free
    if needed > free:
        raise MoveProblem(
            f"The move needs {needed / 2**30:.1f} GiB beside the data that is there; {home} has {free / 2**30:.1f} GiB "
            "free.\nRemedy: free that much."
        )


def owner_inside() -> str:
    """The service user as a container's root must name it for chown."""
    rootless = "name=rootless" in docker("info", "--format", "{{.SecurityOptions}}").stdout
    return "0:0" if rootless else f"{os.getuid()}:{os.getgid()}"


def put_away(home: Path, mode: str, names: Iterable[str]) -> Path:
    """Move a mode's data aside; return where it is."""
    moved = home / "var/moved"
    moved.mkdir(mode=0o700, exist_ok=True)
    folder = moved / f"{mode}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(mode=0o700)
    for name in names:
        if (home / name).exists():
            (home / name).replace(folder / Path(name).name)
    return folder


# --- The two ways -----------------------------------------------------------------------------------------------------

OWN = ("var/postgres", "var/redis", "var/storage", "var/plugins", "etc/postgres.marker")
CONTAINERS = ("var/compose",)
#: Beside containers' data that was put away: the name of an image in which it can be deleted.
CLEANER = "cleaner"
#: The kit's folders and the containers', below kit_home.
_FILES = (("var/storage", "var/compose/storage"), ("var/plugins/storage", "var/compose/plugins"))


def check_one(home: Path) -> None:
    """Refuse to guess which of two modes' data is the site's.

    Raises:
        MoveProblem: both have data.
    """
    if alive(home, "source") and alive(home, "compose"):
        raise MoveProblem(
            f"Both modes have data: {home}/var/postgres and {home}/var/compose.\nRemedy: delete {home}/current where "
            f"the containers' is the site's, {home}/etc/compose/has-data.json where the other is."
        )


def check_servers(home: Path) -> None:
    """Refuse to change PostgreSQL's server together with the mode: of which data there is, nothing would be sure.

    Both modes' settings are there: one's of the deploy before, the other's of this one.

    Raises:
        MoveProblem: one mode has a PostgreSQL of the kit's, the other has another.
    """
    there = {mode: elsewhere(home, mode) for mode in SIGNS}
    if bool(there["source"]) != bool(there["compose"]):
        other = "".join(there.values())
        raise MoveProblem(
            f"With the mode, PostgreSQL would change: {other} is the site's in one mode, the kit's own in the other.\n"
            "Remedy: move with postgres_source as it was, and change it with another deploy."
        )


def fill_containers(home: Path, own: Sequence[str], containers: Containers, image: str) -> int:
    """Copy source mode's data into containers whose databases run; return the rows.

    ``own`` names the kit's databases as `Containers.pairs` has them, ``image`` what `in_container` runs.

    Raises:
        MoveProblem: something could not be copied.
    """
    rows = 0
    for database, service, name in containers.pairs(own):
        rows += copy_database(own_server(home), database, containers.server(service), name)
    for old, new in _FILES:
        if (home / old).is_dir():
            copy_files(image, home / old, home / new)
    return rows


def fill_source(home: Path, own: Sequence[str], containers: Containers, image: str) -> int:
    """The inverse of `fill_containers`; the kit's PostgreSQL runs and has the databases.

    Raises:
        MoveProblem: something could not be copied.
    """
    rows, owner = 0, owner_inside()
    for database, service, name in containers.pairs(own):
        rows += copy_database(containers.server(service), name, own_server(home), database)
    for new, old in _FILES:
        if (home / old).is_dir():
            copy_files(image, home / old, home / new, owner)
    return rows


def from_containers(home: Path, version: str, own: Sequence[str], check: bool) -> list[str]:
    """Take the containers' data over into source mode; return what was done, for people.

    Raises:
        MoveProblem: it can't be; the containers' data is untouched.
    """
    check_one(home)
    program, folder = home / "runtime/bin/kit-compose", home / "etc/compose"
    done: list[str] = []
    if not program.exists():
        return []
    if check:
        return ["the containers' data moved to source mode"]
    if alive(home, "compose"):
        check_servers(home)
        image = json.loads((folder / "images.json").read_text())["cleaner"]
        containers = Containers((str(program),), parse_env((home / "etc/env/dify.env").read_text()))
        check_room(image, home, [home / "var/compose"])
        if databases := containers.services():
            containers.call("up", "--detach", "--no-deps", "--no-build", "--pull", "never", *databases)
        # What writes is stopped first. One-shot services have ended.
        if others := sorted(set(containers.call("ps", "--services").split()) - set(databases)):
            containers.call("stop", *others)
        rows = fill_source(home, own, containers, image)
        done.append(f"{rows} rows and the files of the containers moved to source mode")
        point_current(home, version)
        (folder / "has-data.json").unlink()
    # From here on source mode's data is the site's; what follows is done again where it broke off.
    Containers((str(program),), {}).call("down", "--remove-orphans")
    cleaner = json.loads((folder / "images.json").read_text())["cleaner"]
    aside = put_away(home, "compose", CONTAINERS)
    # Who deletes it one day needs a root inside of a container.
    (aside / CLEANER).write_text(cleaner)
    program.unlink()
    shutil.rmtree(folder)
    return [*done, f"the containers' data put away to {aside}"]
