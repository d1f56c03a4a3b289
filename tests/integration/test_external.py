"""PostgreSQL, Redis and S3 that the kit does not run, each for real: what the precheck says of them.

The servers run as nobody where root runs the tests: PostgreSQL refuses root.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ansible.module_utils import kit_external, kit_wire
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NOBODY: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
# The wheels' are built without TLS.
SYSTEM_POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
SYSTEM_REDIS = Path("/usr/bin/redis-server")
PASSWORD = "dify+/=$%-word"


def certificate(folder: Path, name: str, issuer: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """A certificate for a host name by an authority, or an authority's own; in files, its key for its owner only."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    made = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = folder / f"{name}.key"
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    secret.chmod(0o600)
    return made, key


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class Elsewhere:
    """A folder with certificates and programs, and the servers that were started from it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ca = root / "authority.pem"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str | Path, stop: signal.Signals = signal.SIGTERM) -> None:
        """Run a server; its output goes to a file."""
        with (self.root / f"{Path(command[0]).name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.root,
                start_new_session=True,
                **NOBODY,
            )
        self.processes.append(process)

    def until(self, what: str, answers: Callable[[], object]) -> None:
        """Wait until something does not fail any more."""
        end, wrong = time.monotonic() + 60, ""
        while time.monotonic() < end and all(process.poll() is None for process in self.processes):
            try:
                answers()
                return
            except Exception as error:
                wrong = str(error)
                time.sleep(0.1)
        newest = max(self.root.glob("*.log"), key=lambda path: path.stat().st_mtime)
        pytest.fail(f"{what}: {wrong}\n{newest.read_text(errors='replace')[-1500:]}")

    def stop(self) -> None:
        """End everything, PostgreSQL without waiting for its clients."""
        for process in self.processes:
            process.send_signal(signal.SIGINT)
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    root = Path(tempfile.mkdtemp(prefix="kit-", dir="/tmp"))
    site = Elsewhere(root)
    try:
        authority = certificate(root, "authority")
        certificate(root, "localhost", authority)
        root.chmod(0o755)
        if NOBODY:
            for path in [root, root / "localhost.key"]:
                os.chown(path, NOBODY["user"], NOBODY["group"])
        yield site
    finally:
        site.stop()
        shutil.rmtree(root)


def problems(name: str, server: dict[str, Any]) -> list[Any]:
    """What the precheck finds; every entry has a remedy, and none tells the password."""
    found: list[Any] = kit_external.examine({name: server}).problems
    for problem in found:
        assert problem.remedy
        assert PASSWORD not in f"{problem.what} {problem.where} {problem.remedy}"
    return found


def only(name: str, server: dict[str, Any]) -> str:
    """What and remedy of the one problem."""
    (problem,) = problems(name, server)
    return f"{problem.what} {problem.remedy}"


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres(elsewhere: Elsewhere) -> dict[str, Any]:
    """The distribution's PostgreSQL with TLS alone, with databases as Dify needs them, and some as it does not."""
    if not SYSTEM_POSTGRES:
        pytest.skip("no PostgreSQL with TLS on this machine: apt-get install postgresql")
    tree, data, port = SYSTEM_POSTGRES[-1].parents[1], elsewhere.root / "data", free_port()
    subprocess.run(
        [
            tree / "bin/initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "--auth=trust",
            "--no-sync",
            "--locale=C.UTF-8",
            "-E",
            "UTF8",
        ],
        check=True,
        capture_output=True,
        **NOBODY,
    )
    (data / "pg_hba.conf").write_text(
        "local all postgres trust\nhostssl all old 127.0.0.1/32 md5\nhostssl all plain 127.0.0.1/32 password\n"
        "hostssl all all 127.0.0.1/32 scram-sha-256\n"
    )
    options = {
        "ssl": "on",
        "ssl_cert_file": elsewhere.root / "localhost.pem",
        "port": port,
        "fsync": "off",
        "ssl_key_file": elsewhere.root / "localhost.key",
        "unix_socket_directories": elsewhere.root,
        "listen_addresses": "127.0.0.1",
    }
    # Not on its command line, which would go before what a test sets.
    with (data / "postgresql.conf").open("a") as conf:
        conf.writelines(f"{name} = '{value}'\n" for name, value in options.items())
    elsewhere.start(tree / "bin/postgres", "-D", data)

    def login(database: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(host=str(elsewhere.root), port=port, user="postgres", dbname=database, autocommit=True)

    elsewhere.until("PostgreSQL", lambda: login().close())
    with login() as admin:
        admin.execute(f"CREATE ROLE dify LOGIN PASSWORD '{PASSWORD}'")
        admin.execute(f"CREATE ROLE plain LOGIN PASSWORD '{PASSWORD}'")
        admin.execute(f"SET password_encryption = md5; CREATE ROLE old LOGIN PASSWORD '{PASSWORD}'")
        for database in ("dify", "dify_plugin", "dify_vector"):
            admin.execute(f"CREATE DATABASE {database} OWNER dify TEMPLATE template0")
        admin.execute("CREATE DATABASE foreign_one TEMPLATE template0")
        admin.execute("CREATE DATABASE ascii OWNER dify TEMPLATE template0 ENCODING 'SQL_ASCII'")
    with login("dify_vector") as admin:
        admin.execute("CREATE EXTENSION dblink")
    return {
        "host": "localhost",
        "port": port,
        "user": "dify",
        "password": PASSWORD,
        "login": login,
        "sslmode": "verify-full",
        "sslrootcert": str(elsewhere.ca),
        "newest": "18",
        "connections": 50,
        # dblink: like pgvector, only a superuser may create it; uuid-ossp: a database's owner may.
        "databases": {"dify": ["uuid-ossp"], "dify_plugin": [], "dify_vector": ["dblink"]},
        "moved_from": "",
        "forget": "/home/etc/env/api.env",
    }


def test_a_sound_postgres_has_no_problem(postgres: dict[str, Any]) -> None:
    for mode in ("verify-full", "verify-ca", "require"):
        assert problems("postgres", {**postgres, "sslmode": mode}) == []
    assert problems("postgres", {**postgres, "sslmode": "verify-ca", "host": "127.0.0.1"}) == []


@pytest.mark.parametrize("user", ["old", "plain"])
def test_older_ways_to_log_in_work(postgres: dict[str, Any], user: str) -> None:
    found = problems("postgres", {**postgres, "user": user, "databases": {"dify": []}})
    assert [problem.what for problem in found] == [f"{user} may not create tables and schemas in the database dify."]
    assert "Remedy" not in only("postgres", {**postgres, "user": user, "password": "wrong"})


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        ({"host": "no-such-host.invalid"}, "no-such-host.invalid is not known", "correct postgres_host"),
        ({"port": 9}, "cannot be reached at localhost:9: Connection refused", "listens there"),
        ({"password": "wrong"}, "password authentication failed", "postgres_password in the site's secrets.yml"),
        ({"user": "nobody"}, "password authentication failed", "postgres_user"),
        ({"sslmode": "disable"}, "no encryption", "pg_hba.conf: host all dify"),
        ({"host": "127.0.0.1"}, "certificate is not for 127.0.0.1", "that stands in the certificate"),
        ({"sslrootcert": ssl.get_default_verify_paths().cafile or ""}, "not trusted", "set postgres_sslrootcert"),
        ({"sslrootcert": "/nowhere.pem"}, "cannot be read: No such file", "set postgres_sslrootcert"),
        ({"databases": {"missing": []}}, 'database "missing" does not exist', "CREATE DATABASE missing OWNER dify"),
        ({"databases": {"foreign_one": []}}, "may not create tables", "ALTER DATABASE foreign_one OWNER TO dify"),
        ({"databases": {"ascii": []}}, "encoded as SQL_ASCII", "ENCODING 'UTF8'"),
        ({"databases": {"dify": ["dblink"]}}, "lacks the extension dblink", 'in dify: CREATE EXTENSION "dblink"'),
        ({"databases": {"dify": ["none"]}}, "does not have the extension none", "let its administrator install it"),
        ({"newest": "14"}, "this release of Dify works with 13 to 14", "postgres_source: wheel"),
        ({"moved_from": "dify at 127.0.0.1:5"}, "dify at 127.0.0.1:5, but the database dify is empty", "pg_restore"),
    ],
)
def test_what_is_wrong_with_postgres_is_named(
    postgres: dict[str, Any], changes: dict[str, Any], what: str, remedy: str
) -> None:
    said = only("postgres", {**postgres, **changes})
    assert what in said
    assert remedy in said


def test_all_databases_are_looked_at(postgres: dict[str, Any]) -> None:
    found = problems("postgres", {**postgres, "databases": {"missing": [], "ascii": [], "dify_vector": ["dblink"]}})
    assert len(found) == 2


def test_data_that_was_taken_over_is_recognized(postgres: dict[str, Any]) -> None:
    with postgres["login"]("dify") as admin:
        admin.execute("CREATE TABLE alembic_version (version_num text)")
        try:
            assert problems("postgres", {**postgres, "moved_from": "elsewhere"}) == []
        finally:
            admin.execute("DROP TABLE alembic_version")


def test_too_few_connections_are_worth_a_notice(postgres: dict[str, Any]) -> None:
    (notice,) = kit_external.examine({"postgres": {**postgres, "connections": 200}}).notices
    assert "allows 100 connections" in notice


def test_a_postgres_without_tls(elsewhere: Elsewhere, postgres: dict[str, Any]) -> None:
    def refused() -> None:
        assert "offers no TLS, but postgres_sslmode is verify-full" in only("postgres", postgres)

    with postgres["login"]() as admin:
        admin.execute("ALTER SYSTEM SET ssl = off")
        admin.execute("SELECT pg_reload_conf()")
        try:
            elsewhere.until("reload", refused)
        finally:
            admin.execute("ALTER SYSTEM RESET ssl")
            admin.execute("SELECT pg_reload_conf()")


# --- Redis ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis(elsewhere: Elsewhere) -> dict[str, Any]:
    """The distribution's Redis with TLS, and without at another port; users have names."""
    if not SYSTEM_REDIS.exists():
        pytest.skip("no Redis with TLS on this machine: apt-get install redis-server")
    port, plain = free_port(), free_port()
    (elsewhere.root / "redis.conf").write_text(
        f"bind 127.0.0.1\nport {plain}\ntls-port {port}\ntls-auth-clients no\nsave ''\n"
        f"tls-cert-file {elsewhere.root}/localhost.pem\ntls-key-file {elsewhere.root}/localhost.key\n"
        f"user default off\nuser dify on >{PASSWORD} ~* &* +@all -@admin -@dangerous +info +keys\n"
        f"user reader on >{PASSWORD} ~* &* +@read +@connection +info\n"
    )
    elsewhere.start(SYSTEM_REDIS, elsewhere.root / "redis.conf")
    elsewhere.until("Redis", lambda: socket.create_connection(("127.0.0.1", port), 1).close())
    login = {"host": "localhost", "port": port, "username": "dify", "password": PASSWORD}
    return {**login, "tls": True, "ca_file": str(elsewhere.ca), "plain": plain}


def test_a_sound_redis_has_no_problem(redis: dict[str, Any]) -> None:
    assert problems("redis", redis) == []
    assert problems("redis", {**redis, "tls": False, "port": redis["plain"]}) == []


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        ({"port": 9}, "cannot be reached at localhost:9: Connection refused", "correct the address"),
        ({"password": "wrong"}, "refuses the login of dify (WRONGPASS)", "redis_password in the site's secrets.yml"),
        ({"username": "", "password": ""}, "wants a password", "redis_password"),
        ({"host": "127.0.0.1"}, "certificate is not for 127.0.0.1", "that stands in the certificate"),
        ({"ca_file": ssl.get_default_verify_paths().cafile or ""}, "not trusted", "set redis_ca"),
        ({"tls": False}, "breaks off", "redis_tls: true"),
    ],
)
def test_what_is_wrong_with_redis_is_named(
    redis: dict[str, Any], changes: dict[str, Any], what: str, remedy: str
) -> None:
    said = only("redis", {**redis, **changes})
    assert what in said
    assert remedy in said


def test_a_redis_that_speaks_no_tls(redis: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit_wire, "SECONDS", 1.0)  # it waits for more
    assert "TLS" in only("redis", {**redis, "port": redis["plain"]})


def test_a_user_who_may_not_do_enough(redis: dict[str, Any]) -> None:
    found = problems("redis", {**redis, "username": "reader"})
    assert [problem.what.split()[-7] for problem in found] == ["DEL,", "EVAL,", "PUBLISH,"]
    assert "ACL SETUSER reader on ~* &*" in found[0].remedy


# --- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(elsewhere: Elsewhere) -> dict[str, Any]:
    """SeaweedFS, with a bucket and one key."""
    weed = Path(sys.executable).with_name("weed")
    folder = elsewhere.root / "weed"
    folder.mkdir()
    if NOBODY:
        os.chown(folder, NOBODY["user"], NOBODY["group"])
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    ports = {name: free_port() for name in (*names, "s3.port", "s3.port.grpc", "s3.port.https")}
    actions = ["Read", "Write", "List", "Tagging"]
    identity = {"name": "dify", "credentials": [{"accessKey": "kit-key", "secretKey": PASSWORD}], "actions": actions}
    (elsewhere.root / "s3.json").write_text(json.dumps({"identities": [identity]}))
    shutil.copy(weed, elsewhere.root / "weed-server")  # nobody may not read root's environments
    elsewhere.start(
        elsewhere.root / "weed-server", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-volume.max=8", "-master.volumeSizeLimitMB=16", "-filer", f"-filer.localSocket={elsewhere.root}/filer.sock",
        "-s3", f"-s3.config={elsewhere.root}/s3.json", f"-s3.cert.file={elsewhere.root}/localhost.pem",
        f"-s3.key.file={elsewhere.root}/localhost.key", f"-s3.localSocket={elsewhere.root}/s3.sock",
        *(f"-{name}={port}" for name, port in ports.items()),
    )  # fmt: skip
    files = f"http://127.0.0.1:{ports['filer.port']}/buckets/kit/"

    def put(name: str, content: bytes = b"") -> None:
        kind = {"Content-Type": "application/octet-stream"}
        new = urllib.request.Request(files + name, content, kind, method="PUT")
        # A name that ends with a slash is a folder.
        folder = urllib.request.Request(files, method="POST")
        urllib.request.urlopen(new if name else folder, timeout=10).close()

    elsewhere.until("SeaweedFS", lambda: put(""))
    server = {
        "endpoint": f"https://localhost:{ports['s3.port.https']}",
        "region": "us-east-1",
        "bucket": "kit",
        "access_key": "kit-key",
        "secret_key": PASSWORD,
        "address_style": "path",
        "environment": {},
        "ca_file": str(elsewhere.ca),
        "moved_from": "",
        "forget": "/home/etc/env/api.env",
        "put": put,
    }

    def answers() -> None:
        assert kit_external.examine({"storage": server}).problems == []

    elsewhere.until("S3", answers)
    return server


def test_a_sound_bucket_has_no_problem(bucket: dict[str, Any]) -> None:
    assert problems("storage", bucket) == []


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        ({"endpoint": "http://localhost:9"}, "cannot be reached at http://localhost:9", "kit_no_proxy"),
        ({"access_key": "other"}, "InvalidAccessKeyId", "correct access_key"),
        ({"secret_key": "wrong"}, "SignatureDoesNotMatch", "dify_s3_secret_key in the site's secrets.yml"),
        ({"bucket": "other"}, "NoSuchBucket", "make the bucket"),
        ({"ca_file": ""}, "certificate is not trusted", "set kit_ca_bundle"),
        ({"moved_from": "/home/var/storage"}, "the bucket has none of them", "copy them first"),
    ],
)
def test_what_is_wrong_with_a_bucket_is_named(
    bucket: dict[str, Any], changes: dict[str, Any], what: str, remedy: str
) -> None:
    said = only("storage", {**bucket, **changes})
    assert what in said
    assert remedy in said


def test_files_that_were_copied_are_recognized(bucket: dict[str, Any]) -> None:
    bucket["put"]("privkeys/tenant/private.pem", b"key")
    assert problems("storage", {**bucket, "moved_from": "/home/var/storage"}) == []


def test_everything_that_is_wrong_comes_at_once(
    postgres: dict[str, Any], redis: dict[str, Any], bucket: dict[str, Any]
) -> None:
    servers = {"postgres": postgres, "redis": redis, "storage": bucket}
    closed = {"host": "localhost", "port": 9, "endpoint": "http://localhost:9"}
    found = kit_external.examine({name: {**server, **closed} for name, server in servers.items()})
    assert [problem.what.split(" cannot")[0] for problem in found.problems] == ["PostgreSQL", "Redis", "The S3 server"]
