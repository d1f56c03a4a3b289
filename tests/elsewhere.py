"""Servers that somebody else runs, for real: PostgreSQL, Redis, S3, Weaviate, Qdrant, with TLS and users of their own.

They run as nobody where root runs the tests: PostgreSQL refuses root.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
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
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests import go_programs

NOBODY: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
# The wheels' are built without TLS.
SYSTEM_POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
SYSTEM_REDIS = Path("/usr/bin/redis-server")
# In no package registry, so a machine may not have it.
QDRANT = os.environ.get("QDRANT") or shutil.which("qdrant") or ""
NO_QDRANT = (
    "no Qdrant server on this machine: put `qdrant` on PATH, from https://github.com/qdrant/qdrant/releases or built "
    "from its source, or name it as QDRANT=/path/to/qdrant"
)
PASSWORD = "dify+/=$%-word"


def certificate(folder: Path, name: str, issuer: tuple[Any, Any] | None = None, address: str = "") -> tuple[Any, Any]:
    """A certificate for a host by an authority, or an authority's own; in files, its key for its owner only."""
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
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName(name), *([x509.IPAddress(ipaddress.ip_address(address))] if address else [])]
            ),
            critical=False,
        )
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
    """A folder with certificates and programs, and the servers that were started from it, listening at an address."""

    def __init__(self, root: Path, address: str) -> None:
        self.root = root
        self.address = address
        # By which it is known, and no other: certificates are for this.
        self.host = "localhost" if address == "127.0.0.1" else address
        self.ca = root / "authority.pem"
        self.processes: list[subprocess.Popen[bytes]] = []

    @classmethod
    @contextlib.contextmanager
    def made(cls, address: str = "127.0.0.1") -> Iterator[Elsewhere]:
        """An empty one, with certificates for localhost; its servers end and its folder goes at the end."""
        root = Path(tempfile.mkdtemp(prefix="kit-", dir="/tmp"))
        site = cls(root, address)
        try:
            authority = certificate(root, "authority")
            certificate(root, "localhost", authority, "" if site.host == "localhost" else address)
            root.chmod(0o755)
            for path in (root, root / "localhost.key"):
                site.give(path)
            yield site
        finally:
            site.stop()
            shutil.rmtree(root)

    def bundle(self) -> Path:
        """The machine's certificate authorities with this one's, for everybody."""
        file = self.root / "bundle.pem"
        file.write_text(Path("/etc/ssl/certs/ca-certificates.crt").read_text() + self.ca.read_text())
        return file

    def give(self, path: Path) -> None:
        """To the user of the servers."""
        if NOBODY:
            os.chown(path, NOBODY["user"], NOBODY["group"])

    def start(self, *command: str | Path, environment: dict[str, str] | None = None) -> None:
        """Run a server; its output goes to a file."""
        with (self.root / f"{Path(command[0]).name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.root,
                env={**os.environ, **(environment or {})},
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

    def postgres(self) -> tuple[int, Callable[..., psycopg.Connection[Any]]]:
        """The distribution's PostgreSQL with TLS alone, and the three databases of a user `dify`.

        Its port, and what logs its administrator in to a database.
        """
        if not SYSTEM_POSTGRES:
            pytest.skip("no PostgreSQL with TLS on this machine: apt-get install postgresql")
        tree, data, port = SYSTEM_POSTGRES[-1].parents[1], self.root / "data", free_port()
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
            "hostssl all all 0.0.0.0/0 scram-sha-256\n"
        )
        options = {
            "ssl": "on",
            "ssl_cert_file": self.root / "localhost.pem",
            "port": port,
            "fsync": "off",
            "ssl_key_file": self.root / "localhost.key",
            "unix_socket_directories": self.root,
            "listen_addresses": self.address,
        }
        # Not on its command line, which would go before what a test sets.
        with (data / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in options.items())
        self.start(tree / "bin/postgres", "-D", data)

        def login(database: str = "postgres") -> psycopg.Connection[Any]:
            return psycopg.connect(host=str(self.root), port=port, user="postgres", dbname=database, autocommit=True)

        self.until("PostgreSQL", lambda: login().close())
        with login() as admin:
            admin.execute(f"CREATE ROLE dify LOGIN PASSWORD '{PASSWORD}'")
            for database in ("dify", "dify_plugin", "dify_vector"):
                admin.execute(f"CREATE DATABASE {database} OWNER dify TEMPLATE template0")
        return port, login

    def redis(self) -> tuple[int, int]:
        """The distribution's Redis with users that have names: its ports with TLS and without."""
        if not SYSTEM_REDIS.exists():
            pytest.skip("no Redis with TLS on this machine: apt-get install redis-server")
        port, plain = free_port(), free_port()
        (self.root / "redis.conf").write_text(
            f"bind {self.address}\nport {plain}\ntls-port {port}\ntls-auth-clients no\nsave ''\n"
            f"tls-cert-file {self.root}/localhost.pem\ntls-key-file {self.root}/localhost.key\n"
            f"user default off\nuser dify on >{PASSWORD} ~* &* +@all -@admin -@dangerous +info +keys\n"
            f"user reader on >{PASSWORD} ~* &* +@read +@connection +info\n"
        )
        self.start(SYSTEM_REDIS, self.root / "redis.conf")
        self.until("Redis", lambda: socket.create_connection((self.address, port), 1).close())
        return port, plain

    def s3(self) -> tuple[int, Callable[..., None]]:
        """SeaweedFS with the bucket `kit` and the key `kit-key`: its port with TLS, and what puts a file there."""
        weed = Path(sys.executable).with_name("weed")
        folder = self.root / "weed"
        folder.mkdir()
        self.give(folder)
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        ports = {name: free_port() for name in (*names, "s3.port", "s3.port.grpc", "s3.port.https")}
        actions = ["Read", "Write", "List", "Tagging"]
        identity = {
            "name": "dify",
            "credentials": [{"accessKey": "kit-key", "secretKey": PASSWORD}],
            "actions": actions,
        }
        (self.root / "s3.json").write_text(json.dumps({"identities": [identity]}))
        shutil.copy(weed, self.root / "weed-server")  # nobody may not read root's environments
        self.start(
            self.root / "weed-server", "server", f"-dir={folder}", f"-ip={self.address}", f"-ip.bind={self.address}",
            "-volume.max=8", "-master.volumeSizeLimitMB=16", "-filer", f"-filer.localSocket={self.root}/filer.sock",
            "-s3", f"-s3.config={self.root}/s3.json", f"-s3.cert.file={self.root}/localhost.pem",
            f"-s3.key.file={self.root}/localhost.key", f"-s3.localSocket={self.root}/s3.sock",
            # Catalogs at fixed ports, for nobody here.
            "-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}={port}" for name, port in ports.items()),
        )  # fmt: skip
        files = f"http://{self.address}:{ports['filer.port']}/buckets/kit/"

        def put(name: str, content: bytes = b"") -> None:
            kind = {"Content-Type": "application/octet-stream"}
            new = urllib.request.Request(files + name, content, kind, method="PUT")
            # A name that ends with a slash is a folder.
            folder = urllib.request.Request(files, method="POST")
            urllib.request.urlopen(new if name else folder, timeout=10).close()

        self.until("SeaweedFS", lambda: put(""))
        return ports["s3.port.https"], put

    def weaviate(self) -> tuple[int, int]:
        """Weaviate, which lets nobody in without PASSWORD as key: its ports for HTTP and gRPC."""
        port, grpc, gossip = free_port(), free_port(), (free_port(), free_port(), free_port(), free_port())
        program = self.root / "weaviate-server"
        shutil.copy(go_programs.build("github.com/weaviate/weaviate", "v1.35.2", "cmd/weaviate-server"), program)
        folder = self.root / "weaviate"
        folder.mkdir()
        self.give(folder)
        environment = {
            "AUTHENTICATION_APIKEY_ENABLED": "true",
            "AUTHENTICATION_APIKEY_ALLOWED_KEYS": PASSWORD,
            "AUTHENTICATION_APIKEY_USERS": "dify",
            "AUTHENTICATION_ANONYMOUS_ACCESS_ENABLED": "false",
            "AUTHORIZATION_ADMINLIST_ENABLED": "true",
            "AUTHORIZATION_ADMINLIST_USERS": "dify",
            "PERSISTENCE_DATA_PATH": str(folder),
            "DISABLE_TELEMETRY": "true",
            "DEFAULT_VECTORIZER_MODULE": "none",
            "GRPC_PORT": str(grpc),
            "GO_PROFILING_DISABLE": "true",
            "CLUSTER_HOSTNAME": "kit",
            "CLUSTER_ADVERTISE_ADDR": self.address,
            **dict(
                zip(
                    ("CLUSTER_GOSSIP_BIND_PORT", "CLUSTER_DATA_BIND_PORT", "RAFT_PORT", "RAFT_INTERNAL_RPC_PORT"),
                    map(str, gossip),
                    strict=True,
                )
            ),
        }
        self.start(program, "--host", self.address, "--port", str(port), "--scheme", "http", environment=environment)
        ready = f"http://{self.address}:{port}/v1/.well-known/ready"
        self.until("Weaviate", lambda: urllib.request.urlopen(ready, timeout=5).close())
        return port, grpc

    def qdrant(self) -> int:
        """Qdrant, which lets nobody in without PASSWORD as key: its port for HTTP. Skips where there is none."""
        if not QDRANT:
            pytest.skip(NO_QDRANT)
        port, program, folder = free_port(), self.root / "qdrant-server", self.root / "qdrant"
        shutil.copy(QDRANT, program)  # nobody may not read root's folders
        folder.mkdir()
        self.give(folder)
        environment = {
            "QDRANT__SERVICE__HOST": self.address,
            "QDRANT__SERVICE__HTTP_PORT": str(port),
            "QDRANT__SERVICE__GRPC_PORT": str(free_port()),
            "QDRANT__SERVICE__API_KEY": PASSWORD,
            "QDRANT__STORAGE__STORAGE_PATH": str(folder / "storage"),
            "QDRANT__STORAGE__SNAPSHOTS_PATH": str(folder / "snapshots"),
            "QDRANT__TELEMETRY_DISABLED": "true",
            "QDRANT_INIT_FILE_PATH": str(folder / ".qdrant-initialized"),
        }
        self.start(program, environment=environment)
        self.until("Qdrant", lambda: urllib.request.urlopen(f"http://{self.address}:{port}/healthz", timeout=5).close())
        return port

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
