"""Questions to a host, asked by the tests beside this file: `python -c <this file> <question> <arguments as JSON>`.

Runs on the host as the service user with the kit's runtime, so that it reads the keys where the services read them
and listens where only this host can. Prints the answer as JSON. A secret never leaves it.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import smtplib
import socket
import ssl
import stat
import subprocess
import sys
import time
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.", "::1", "::ffff:127.")


def env(home: str, name: str) -> dict[str, str]:
    """The variables of etc/env/<name>.env; in a container, which has no home, those that it was started with."""
    if not home:
        return dict(os.environ)
    lines = Path(home, "etc", "env", f"{name}.env").read_text().splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return dict(word[0].split("=", 1) for word in words if word)


# --- Processes --------------------------------------------------------------------------------------------------------


def descendants(root: int) -> list[int]:
    """Process `root` and everything that it or its children started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name, field 2, may hold blanks and parentheses; what counts comes after the last one.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # ended meanwhile
    family = [root]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    return family


def processes(home: str, supervisord: int) -> list[dict[str, Any]]:
    """Each process of the kit: pid, effective uid and arguments."""
    found = []
    for pid in descendants(supervisord):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found.append({"pid": pid, "uid": int(re.findall(r"^Uid:\s+\d+\s+(\d+)", status, re.M)[0]), "argv": argv[:-1]})
    return found


def listeners(home: str, supervisord: int) -> list[dict[str, Any]]:
    """Each listening TCP socket of the kit's processes: address, port, pid and whether only this host reaches it."""
    owners: dict[str, int] = {}
    for pid in descendants(supervisord):
        try:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                owners[os.readlink(fd)] = pid
        except OSError:
            continue
    found = []
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            owner = owners.get(f"socket:[{fields[9]}]")
            if fields[3] != "0A" or owner is None:  # 0A: LISTEN
                continue
            digits, port = fields[1].split(":")
            # The kernel prints each 32-bit word in the machine's byte order.
            words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
            address = socket.inet_ntop(family, b"".join(words))
            found.append(
                {"address": address, "port": int(port, 16), "pid": owner, "local": address.startswith(LOOPBACK)}
            )
    return found


# --- Secrets ----------------------------------------------------------------------------------------------------------


def secrets(home: str, secrets_file: str | None) -> dict[str, str]:
    """Every secret that this host knows, by where it stands."""
    found = {}
    for file in sorted(Path(home, "etc", "env").glob("*.env")):
        for key, value in env(home, file.stem).items():
            if re.search("PASSWORD|SECRET|KEY|TOKEN", key) and len(value) >= 12 and not value.startswith(("/", "http")):
                found[f"{file.name}: {key}"] = value
    if secrets_file:
        for line in Path(secrets_file).read_text().splitlines():
            key, _, value = line.partition(":")
            value = value.strip().strip("'\"")
            if len(value) >= 12 and not key.startswith((" ", "#", "$")):
                found[f"{secrets_file}: {key}"] = value
    return found


def leaks(home: str, cache: str, secrets_file: str | None) -> dict[str, Any]:
    """Where a secret can be read that should not be, by its name; `known` counts the secrets, `places` what was read.

    Looked at are the arguments of every process, what the services and jobs have logged or noted, what the kit keeps of
    its own in the cache, and the user's journal where there is one.
    """
    known = secrets(home, secrets_file)
    found: list[str] = []
    places = 0

    def look(place: str, text: bytes) -> None:
        nonlocal places
        places += 1
        found.extend(f"{name} in {place}" for name, value in known.items() if value.encode() in text)

    for pid, text in arguments():
        look(f"arguments of process {pid}", text)
    for file in [*texts(Path(home, "var"), NO_LOGS), *texts(Path(cache), BULK)]:
        with contextlib.suppress(OSError):  # rotated or ended meanwhile
            look(str(file), file.read_bytes())
    if shutil.which("journalctl"):
        journal = ["journalctl", "--quiet", "--output=cat", "--lines=100000", f"_UID={os.stat(home).st_uid}"]
        look("the journal", subprocess.run(journal, capture_output=True).stdout)
    return {"known": len(known), "places": places, "found": found}


# Databases, uploads and programs hold what people and makers put in; the cache's bulk comes from registries.
NO_LOGS = ("postgres", "redis", "compose", "storage", "plugins", "moved")
BULK = ("uv", "builds", "downloads", "inference", "src", "go", "go-build", "pnpm", "provider-plugin", "work")


def texts(folder: Path, without: tuple[str, ...]) -> Iterator[Path]:
    """Files of less than 50 MB below a folder, but for some of its folders."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.is_dir() and not entry.is_symlink():
            if entry.name not in without:
                yield from texts(entry, ())
        elif entry.is_file() and entry.stat().st_size < 50_000_000:
            yield entry


def arguments() -> Iterator[tuple[str, bytes]]:
    """The arguments of every process on this host, the kit's or not."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield entry.name, (entry / "cmdline").read_bytes()
            except OSError:
                continue


def environments(home: str, supervisord: int, services: dict[str, int]) -> dict[str, Any]:
    """Which process has a secret in its environment that is not in its service's own env files.

    `services` are the services' processes; what they started counts as theirs, but a plugin is somebody else's program
    and may have none. `seen` counts by service the processes that were looked at, `plugins` those of plugins.
    """
    known = secrets(home, None)
    found, seen, plugins = [], {}, 0
    for service, root in [("supervisord", supervisord), *services.items()]:
        conf = Path(home, "etc", "conf.d", f"{service}.conf")
        files = re.findall(r"--env-file (\S+)", conf.read_text()) if conf.is_file() else []
        own = "".join(Path(file).read_text() for file in files)
        pids = [root] if service == "supervisord" else descendants(root)
        seen[service] = 0
        for pid in pids:
            try:
                has = Path(f"/proc/{pid}/environ").read_text(errors="replace")
                folder = os.readlink(f"/proc/{pid}/cwd")
            except OSError:
                continue  # ended meanwhile
            seen[service] += 1
            plugin = folder.startswith(f"{home}/var/plugins/cwd/")
            plugins += plugin
            names = sorted(name for name, value in known.items() if value in has and (plugin or value not in own))
            found += [f"{'a plugin' if plugin else service} (process {pid}) has {name}" for name in names]
    return {"known": len(known), "seen": seen, "plugins": plugins, "found": found}


def become_api(home: str) -> None:
    """Lets this process import Dify's own code, with the API's settings."""
    os.environ |= env(home, "api")
    os.chdir(os.path.join(home, "current", "api") if home else "/app/api")
    sys.path.insert(0, os.getcwd())


def settings(home: str, services: dict[str, int]) -> dict[str, Any]:
    """Which variables of its configuration a service's process lacks or has with another value; how many it has.

    PostgreSQL and Redis write their title over what the kernel shows of their environment: they are left out.
    """
    compared, differ = 0, []
    for service, pid in services.items():
        conf = Path(home, "etc", "conf.d", f"{service}.conf")
        files = re.findall(r"--env-file (\S+)", conf.read_text()) if service not in ("postgres", "redis") else []
        wanted = {key: value for file in files for key, value in env(home, Path(file).stem).items()}
        # What stands in the command itself goes before the file.
        command = re.search(r"^command = (.*?) -- ", conf.read_text(), re.M)
        words = shlex.split(command[1].replace("%%", "%")) if command and files else []
        wanted |= dict(word.split("=", 1) for word in words if re.match(r"[A-Za-z_][A-Za-z0-9_]*=", word))
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
        has = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
        compared += len(wanted)
        differ += [f"{service}: {key}" for key, value in wanted.items() if has.get(key) != value]
    return {"compared": compared, "differ": differ}


def modes(home: str, without: list[str], classes: list[tuple[str, str, dict[str, list[int]]]]) -> dict[str, Any]:
    """Every file below the home with an owner or a mode that its class does not allow; what has no class is one, too.

    A class is its name, a regular expression for the whole path below the home, and by kind of file (`folder`, `file`,
    `socket`) two numbers: which bits must be set, and which must not be. `counted` tells how many files each class has.
    Folders of the home that are named in `without` are not looked at.
    """
    me, found, counted = os.getuid(), [], dict.fromkeys((name for name, _, _ in classes), 0)
    compiled = [(name, re.compile(path), kinds) for name, path, kinds in classes]
    kinds = {stat.S_IFDIR: "folder", stat.S_IFREG: "file", stat.S_IFSOCK: "socket"}
    pending = [home]
    left_out = {f"{home}/{name}" for name in without}
    while pending:
        path = pending.pop()
        try:
            entry = os.lstat(path)
            if stat.S_ISDIR(entry.st_mode):
                pending += [child.path for child in os.scandir(path) if child.path not in left_out]
        except FileNotFoundError:
            continue  # removed meanwhile
        name = path[len(home) + 1 :] or "."
        mode, kind = stat.S_IMODE(entry.st_mode), kinds.get(stat.S_IFMT(entry.st_mode), "other")
        if entry.st_uid != me:
            found.append(f"{name} belongs to user {entry.st_uid}")
        if stat.S_ISLNK(entry.st_mode):
            continue  # what it names has a mode, the link has none
        title, allowed = next(((t, k) for t, pattern, k in compiled if pattern.fullmatch(name)), ("", {}))
        if kind not in allowed:
            found.append(f"{name} is a {kind} that nobody expects" + (f" among the {title}" if title else ""))
            continue
        counted[title] += 1
        must, must_not = allowed[kind]
        if mode & must != must or mode & must_not:
            found.append(f"{name} ({title}) has mode {mode:04o}")
    return {"counted": counted, "found": found}


def environment(pid: int) -> dict[str, str]:
    """A process's environment, as it was started; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


# --- PostgreSQL and Redis ---------------------------------------------------------------------------------------------


def login(home: str, **changes: Any) -> dict[str, Any]:
    """How the site's PostgreSQL is reached, wherever it is; the address of Dify's own database."""
    known = env(home, "postgres")
    names = {"host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD", "dbname": "DATABASE"}
    names |= {"sslmode": "SSLMODE", "sslrootcert": "SSLROOTCERT"}
    found = {name: known[f"PG{key}"] for name, key in names.items() if f"PG{key}" in known}
    return {"host": "127.0.0.1", **found, "connect_timeout": 5, **changes}


def postgres(home: str, databases: list[str]) -> dict[str, Any]:
    """What each database answers to its user, and whether a wrong password is refused."""
    import psycopg

    answers = {}
    for database in databases:
        with psycopg.connect(**login(home, dbname=database)) as connection:
            row = connection.execute(
                "SELECT 6 * 7, current_setting('server_encoding'), current_setting('data_checksums'),"
                " ARRAY(SELECT extname::text FROM pg_extension)"
            ).fetchone()
        assert row is not None
        answers[database] = dict(zip(("answer", "encoding", "checksums", "extensions"), row, strict=True))
    try:
        psycopg.connect(**login(home, password="wrong")).close()
        refused = False
    except psycopg.OperationalError as error:
        refused = "password authentication failed" in str(error)
    return {"databases": answers, "refuses_wrong_password": refused}


def connections(home: str, databases: list[str], services: dict[str, int]) -> dict[str, Any]:
    """What the running processes may open in PostgreSQL, what it allows, and what they have open, by database.

    `databases` are Dify's, the plugin daemon's and the vectors'. The processes are asked by their environment, so what
    was restarted with older settings counts as it is.
    """
    import psycopg

    dify, plugin, vectors = databases
    allowed = {dify: 0, plugin: 0}
    for main in services.values():
        family = descendants(main)
        for pid in family:
            told = environment(pid)
            # The parent of a service's workers opens nothing itself.
            if len(descendants(pid)) == 1 and "SQLALCHEMY_POOL_SIZE" in told:
                allowed[dify] += int(told["SQLALCHEMY_POOL_SIZE"]) + int(told["SQLALCHEMY_MAX_OVERFLOW"])
        allowed[plugin] += int(environment(main).get("DB_MAX_OPEN_CONNS", 0))
    with psycopg.connect(**login(home)) as connection:
        limit = connection.execute("SELECT datconnlimit FROM pg_database WHERE datname = %s", [vectors]).fetchone()
        settings = connection.execute(
            "SELECT current_setting('max_connections')::int, current_setting('superuser_reserved_connections')::int"
        ).fetchone()
        opened = connection.execute(
            "SELECT datname, count(*) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() GROUP BY datname"
        ).fetchall()
    assert limit is not None
    assert settings is not None
    allowed[vectors] = limit[0]
    return {"allowed": allowed, "max": settings[0], "reserved": settings[1], "open": dict(opened)}


def schema(home: str) -> dict[str, Any]:
    """Alembic's revision in Dify's database and the heads of the release's migrations."""
    import psycopg

    links: dict[str, set[str]] = {}
    for file in Path(home, "current", "api", "migrations", "versions").glob("*.py"):
        text = file.read_text()
        revision = re.search(r"^revision\b[^=]*=\s*['\"](\w+)['\"]", text, re.M)
        parents = re.search(r"^down_revision\b[^=]*=\s*(.+)$", text, re.M)
        if revision and parents:
            links[revision[1]] = set(re.findall(r"['\"](\w+)['\"]", parents[1]))
    with psycopg.connect(**login(home)) as connection:
        current = sorted(row[0] for row in connection.execute("SELECT version_num FROM alembic_version"))
    return {"current": current, "heads": sorted(set(links) - set().union(*links.values()))}


def redis(home: str, port: int) -> dict[str, Any]:
    """What Redis says with the password and without, wherever it is."""
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import AuthenticationError
    from redis.retry import Retry

    known = env(home, "redis")
    place: dict[str, Any] = {"host": known.get("REDIS_HOST", "127.0.0.1"), "socket_timeout": 5}
    place["port"] = int(known.get("REDIS_PORT", port))
    if roots := known.get("REDIS_CA"):
        place |= {"ssl": True, "ssl_ca_certs": roots}
    who: dict[str, Any] = {"username": known.get("REDIS_USERNAME") or None, "password": known["REDIS_PASSWORD"] or None}
    with Redis(**place, **who, decode_responses=True) as client:
        pong, persistence = client.ping(), client.info("persistence")
    try:
        # A refusal counts as a connection error for the library, which would try again for seconds.
        with Redis(**place, retry=Retry(NoBackoff(), 0)) as stranger:
            stranger.ping()
        refused = False
    except AuthenticationError:
        refused = True
    return {
        "pong": pong,
        "aof": persistence["aof_enabled"],
        "aof_last_write": persistence["aof_last_write_status"],
        "last_save": persistence["rdb_last_bgsave_status"],
        "refuses_strangers": refused,
    }


def bucket(home: str) -> list[str]:
    """The first of the keys that Dify keeps in its bucket, by the library that it uses. Runs with the API's Python."""
    import boto3
    from botocore.config import Config

    known = env(home, "api")
    os.environ |= {name: value for name, value in known.items() if re.match(r"AWS_|(https?|no)_proxy$", name)}
    client = boto3.client(
        "s3",
        aws_access_key_id=known["S3_ACCESS_KEY"],
        aws_secret_access_key=known["S3_SECRET_KEY"],
        endpoint_url=known.get("S3_ENDPOINT"),
        region_name=known["S3_REGION"],
        config=Config(s3={"addressing_style": known["S3_ADDRESS_STYLE"]}),
    )
    listed = client.list_objects_v2(Bucket=known["S3_BUCKET_NAME"], Prefix="privkeys/", MaxKeys=1)
    return [entry["Key"] for entry in listed.get("Contents", [])]


def vectors(home: str) -> dict[str, Any]:
    """What Dify's own code finds near a vector, in a collection that it makes and removes. Runs with API's Python."""
    become_api(home)
    from configs import dify_config  # type: ignore[import-not-found]
    from core.rag.datasource.vdb.vector_backend_registry import (  # type: ignore[import-not-found]
        get_vector_factory_class,
    )
    from core.rag.models.document import Document  # type: ignore[import-not-found]
    from dify_app import DifyApp  # type: ignore[import-not-found]
    from extensions import ext_redis  # type: ignore[import-not-found]

    app = DifyApp("check")
    ext_redis.init_app(app)
    kind, unique = dify_config.VECTOR_STORE, uuid.uuid4().hex
    # Dify remembers for an hour which collections there are; Qdrant's it only empties, so that is always the same.
    collection = "Kit_check_Node" if kind == "qdrant" else f"Kit_check_{unique}_Node"
    knowledge = types.SimpleNamespace(
        id=str(uuid.UUID(unique)),
        tenant_id=str(uuid.UUID(unique)),
        collection_binding_id=None,
        index_struct_dict={"type": kind, "vector_store": {"class_prefix": collection}},
    )
    words = {"blue": [1.0, 0.0, 0.0], "red": [0.0, 1.0, 0.0]}
    documents = [
        Document(
            page_content=word,
            metadata={"doc_id": str(uuid.uuid4()), "dataset_id": knowledge.id, "document_id": knowledge.id},
        )
        for word in words
    ]
    with app.app_context():
        store = get_vector_factory_class(kind)().init_vector(knowledge, ["doc_id", "dataset_id", "document_id"], None)
        try:
            store.create(documents, list(words.values()))
            found = store.search_by_vector([0.1, 0.9, 0.0], top_k=1, score_threshold=0.5)
            return {"kind": kind, "found": [document.page_content for document in found]}
        finally:
            store.delete()


# --- HTTP -------------------------------------------------------------------------------------------------------------


class Http:
    """One request; its answer is read as it arrives."""

    def __init__(
        self,
        method: str,
        url: str,
        key: str = "",
        body: Any = None,
        timeout: float = 120,
        kind: str = "application/json",
    ) -> None:
        parts = urlsplit(url)
        self.connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
        headers = {"Content-Type": kind, **({"Authorization": f"Bearer {key}"} if key else {})}
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        self.connection.request(method, path or "/", data, headers)
        self.response = self.connection.getresponse()
        self.status = self.response.status

    def text(self) -> str:
        """The whole body."""
        return self.response.read().decode(errors="replace")

    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Each server-sent event with the moment of its arrival."""
        for line in self.response:
            if line.startswith(b"data: {"):
                yield time.monotonic(), json.loads(line[6:])


def figures(home: str, url: str) -> list[str]:
    """Names of the metrics that Prometheus would find at `url`; none where it finds nothing."""
    try:
        answer = Http("GET", url, timeout=10)
    except OSError:
        return []
    return sorted(set(re.findall(r"^([A-Za-z_:][\w:]*)[ {]", answer.text(), re.M))) if answer.status == 200 else []


def page(home: str, url: str) -> dict[str, Any]:
    """What a browser gets at `url`: the page after redirects, and one script that it names."""
    answer = Http("GET", url)
    for _ in range(5):
        target = answer.response.getheader("Location")
        if not target:
            break
        parts = urlsplit(url)
        answer = Http("GET", target if "://" in target else f"{parts.scheme}://{parts.netloc}{target}")
    html = answer.text()
    script = re.search(r'src="(/_next/static/[^"]+\.js[^"]*)"', html)
    root = url.rstrip("/")
    return {
        "status": answer.status,
        "type": answer.response.getheader("Content-Type") or "",
        "html": html[:200],
        "script": script[1] if script else None,
        "script_status": Http("GET", root + script[1]).status if script else None,
    }


def websocket(home: str, port: int, behind: int) -> dict[str, Any]:
    """A socket opened at the gateway: what was answered, and how many more connections `behind` had meanwhile."""
    before = established(behind)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as opened:
        words = [
            "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            "Sec-WebSocket-Version: 13",
        ]
        opened.sendall("\r\n".join([*words, "", ""]).encode())
        answer = b""
        # The server speaks first: it names the session.
        while b"}" not in answer and (piece := opened.recv(4096)):
            answer += piece
        during = established(behind)
    status, _, rest = answer.partition(b"\r\n")
    return {"status": status.decode(), "session": b'"sid"' in rest, "behind": during - before}


def established(port: int) -> int:
    """How many connections a local port has accepted."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(field[1].endswith(f":{port:04X}") and field[3] == "01" for field in fields)


def agent_backend(home: str, port: int) -> dict[str, Any]:
    """The agent backend's own description: its status, title and paths."""
    answer = Http("GET", f"http://127.0.0.1:{port}/openapi.json")
    said = json.loads(answer.text()) if answer.status == 200 else {}
    return {"status": answer.status, "title": said.get("info", {}).get("title"), "paths": sorted(said.get("paths", {}))}


def agent_command(home: str, port: int, script: str) -> dict[str, Any]:
    """A shell command run by the agent runtime in an agent's home, and what a caller without its token gets."""
    token = env(home, "agent-runtime")["SHELLCTL_AUTH_TOKEN"]
    root = f"http://127.0.0.1:{port}/v1/jobs"
    body = {"script": script, "timeout": 20}
    stranger = Http("POST", f"{root}/run", body=body).status
    answer = Http("POST", f"{root}/run", token, body)
    text = answer.text()
    said = json.loads(text) if answer.status == 200 else {}
    if job := said.get("job_id"):
        Http("DELETE", f"{root}/{job}?force=true", token).text()
    return {"stranger": stranger, "status": answer.status, "output": said.get("output", text[:500])}


def certificate(home: str, port: int, name: str) -> str:
    """What the gateway shows to browsers that look for this name, as PEM."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # who signed it is for browsers to judge
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=name) as shown,
    ):
        return ssl.DER_cert_to_PEM_cert(shown.getpeercert(binary_form=True) or b"")


def mail(home: str) -> str:
    """Why Dify could not send mail, empty where its server takes the login; asked the way that Dify does."""
    known = env(home, "api")
    if known.get("MAIL_TYPE") != "smtp":
        return ""
    tls, opportunistic = known["SMTP_USE_TLS"] == "true", known["SMTP_OPPORTUNISTIC_TLS"] == "true"
    kind = smtplib.SMTP_SSL if tls and not opportunistic else smtplib.SMTP
    where = f"{known['SMTP_SERVER']}, port {known['SMTP_PORT']}"
    try:
        with kind(known["SMTP_SERVER"], int(known["SMTP_PORT"]), timeout=10) as server:
            if tls and opportunistic:
                server.starttls()
            if known["SMTP_USERNAME"]:
                server.login(known["SMTP_USERNAME"], known["SMTP_PASSWORD"])
            else:
                server.ehlo()
    except smtplib.SMTPAuthenticationError as error:
        return f"{where} refuses the login of {known['SMTP_USERNAME']} ({error.smtp_code})"
    except (OSError, smtplib.SMTPException) as error:
        return f"{where}: {error}"
    return ""


def model(home: str, url: str, name: str, question: str) -> dict[str, Any]:
    """The model service at its address as this host sees it: without a key, its models, and a completion."""
    root = url.removesuffix("/")
    key = env(home, "inference")["VLLM_API_KEY"]
    body = {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 8,
        "temperature": 0,
    }
    without = Http("POST", f"{root}/chat/completions", body=body).status
    models = json.loads(Http("GET", f"{root}/models", key).text())
    answer = Http("POST", f"{root}/chat/completions", key, body)
    text = answer.text()
    content = json.loads(text)["choices"][0]["message"]["content"] if answer.status == 200 else text[:500]
    return {
        "without_key": without,
        "models": [m["id"] for m in models["data"]],
        "status": answer.status,
        "answer": content,
    }


def counted(home: str, endpoint: str, name: str, question: str, picture: bytes = b"") -> int:
    """The engine's count of a question's tokens, asked directly, a PNG before the question; 0 without an answer."""
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts if picture else question}]
    body = {"model": name, "max_tokens": 1, "messages": messages}
    answer = Http("POST", f"{endpoint}/chat/completions", env(home, "inference")["VLLM_API_KEY"], body)
    said = answer.text()
    return int(json.loads(said)["usage"]["prompt_tokens"]) if answer.status == 200 else 0


def tokens(home: str, endpoint: str, name: str, prompt: str) -> int:
    """How many tokens the engine's tokenizer makes of a prompt that its chat template has written already."""
    body = {"model": name, "prompt": prompt, "add_special_tokens": False}
    answer = Http("POST", f"{endpoint.removesuffix('/v1')}/tokenize", env(home, "inference")["VLLM_API_KEY"], body)
    return int(json.loads(answer.text())["count"])


# --- Dify -------------------------------------------------------------------------------------------------------------


def ask(home: str, url: str, question: str) -> dict[str, Any]:
    """The sample app's answer in one piece."""
    body = {"inputs": {}, "query": question, "response_mode": "blocking", "user": "kit-check"}
    answer = Http("POST", f"{url}/v1/chat-messages", env(home, "sample-app")["DIFY_APP_KEY"], body)
    text = answer.text()
    result = json.loads(text) if answer.status == 200 else {}
    usage = result.get("metadata", {}).get("usage", {})
    return {
        "status": answer.status,
        "answer": result.get("answer", text[:500]),
        "tokens": usage.get("completion_tokens"),
        "stranger_status": Http("POST", f"{url}/v1/chat-messages", "app-wrong", body).status,
    }


def picture(home: str, url: str, endpoint: str, name: str, question: str) -> dict[str, Any]:
    """A question with the deploy's picture: through Dify, streamed and in one piece, and asked of the model directly.

    Each of them comes with the engine's own count of the question's tokens.
    """
    picture = Path(home, "etc", "shapes.png").read_bytes()
    app_key = env(home, "sample-app")["DIFY_APP_KEY"]
    boundary = "kit-check-picture"
    fields = f'--{boundary}\r\nContent-Disposition: form-data; name="user"\r\n\r\nkit-check\r\n--{boundary}\r\n'
    head = 'Content-Disposition: form-data; name="file"; filename="shapes.png"\r\nContent-Type: image/png\r\n\r\n'
    form = fields.encode() + head.encode() + picture + f"\r\n--{boundary}--\r\n".encode()
    upload = Http("POST", f"{url}/v1/files/upload", app_key, form, kind=f"multipart/form-data; boundary={boundary}")
    uploaded = upload.text()
    if upload.status != 201:
        return {"status": upload.status, "answer": uploaded[:500]}
    file = {"type": "image", "transfer_method": "local_file", "upload_file_id": json.loads(uploaded)["id"]}
    body = {"inputs": {}, "query": question, "user": "kit-check", "files": [file]}
    blocking = Http("POST", f"{url}/v1/chat-messages", app_key, {**body, "response_mode": "blocking"})
    said = blocking.text()
    if blocking.status != 200:
        return {"status": blocking.status, "answer": said[:500]}
    streamed = Http("POST", f"{url}/v1/chat-messages", app_key, {**body, "response_mode": "streaming"})
    events = [event for _, event in streamed.events()]
    usage: dict[str, Any] = next(
        (event["metadata"]["usage"] for event in events if event["event"] == "message_end"), {}
    )
    return {
        "status": streamed.status,
        "answer": json.loads(said)["answer"],
        "streamed": "".join(event.get("answer") or "" for event in events if event["event"] == "message"),
        "blocking_tokens": json.loads(said)["metadata"]["usage"]["prompt_tokens"],
        "streaming_tokens": usage.get("prompt_tokens"),
        "direct_tokens": counted(home, endpoint, name, question, picture),
        "text_tokens": counted(home, endpoint, name, question),
    }


def stream(home: str, url: str, question: str) -> dict[str, Any]:
    """The sample app's answer piece by piece, with the time between the first piece and the last."""
    body = {"inputs": {}, "query": question, "response_mode": "streaming", "user": "kit-check"}
    answer = Http("POST", f"{url}/v1/chat-messages", env(home, "sample-app")["DIFY_APP_KEY"], body)
    if answer.status != 200:
        return {"status": answer.status, "answer": answer.text()[:500], "pieces": 0, "seconds": 0.0, "last": ""}
    arrived = list(answer.events())
    pieces = [(moment, event["answer"]) for moment, event in arrived if event["event"] == "message"]
    return {
        "status": answer.status,
        "answer": "".join(piece for _, piece in pieces),
        "pieces": len(pieces),
        "seconds": pieces[-1][0] - pieces[0][0] if pieces else 0.0,
        "last": arrived[-1][1]["event"] if arrived else "",
    }


def plugins(home: str, port: int) -> dict[str, Any]:
    """The daemon's health and the plugins that it lists for Dify's workspace."""
    import psycopg

    known = env(home, "api")
    with psycopg.connect(**login(home)) as connection:
        row = connection.execute("SELECT id::text FROM tenants ORDER BY created_at LIMIT 1").fetchone()
    tenant = row[0] if row else ""
    root = f"http://127.0.0.1:{port}"
    daemon = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    daemon.request(
        "GET",
        f"/plugin/{tenant}/management/list?page=1&page_size=100",
        headers={"X-Api-Key": known["PLUGIN_DAEMON_KEY"]},
    )
    listed = json.loads(daemon.getresponse().read())
    entries = (listed.get("data") or {}).get("list") or []
    return {
        "health": Http("GET", f"{root}/health/check").status,
        "plugins": [entry.get("plugin_id") for entry in entries],
        "message": listed.get("message", ""),
    }


def queues(home: str, workers: int) -> dict[str, list[str]]:
    """The queues that each of so many Celery workers consumes, as they say within 10 s. For the API's own Python."""
    from celery import Celery

    known = env(home, "api")
    app = Celery(broker=known["CELERY_BROKER_URL"])
    if roots := known.get("REDIS_SSL_CA_CERTS"):
        app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": roots}
    if prefix := known.get("REDIS_KEY_PREFIX"):
        app.conf.broker_transport_options = {"global_keyprefix": f"{prefix}:"}
    replies = app.control.inspect(timeout=10, limit=workers).active_queues() or {}
    return {worker: [queue["name"] for queue in consumed] for worker, consumed in replies.items()}


def code(home: str, port: int, runs: dict[str, str]) -> dict[str, dict[str, str]]:
    """What code prints in the sandbox (``stdout``, ``error``), by its language, asked as Dify's API asks."""
    key, found = env(home, "api")["CODE_EXECUTION_API_KEY"], {}
    for language, text in runs.items():
        body = {"language": language, "code": text, "preload": "", "enable_network": True}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"X-Api-Key": key, "Content-Type": "application/json"}
        connection.request("POST", "/v1/sandbox/run", json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        found[language] = answer.get("data") or {"stdout": "", "error": str(answer.get("message"))}
    return found


def egress(home: str, urls: list[str]) -> dict[str, str]:
    """What Dify's own client for HTTP nodes and remote files gets at each address. Runs with the API's own Python."""
    become_api(home)
    from core.helper import ssrf_proxy  # type: ignore[import-not-found]  # Dify's own

    found = {}
    for url in urls:
        try:
            answer = ssrf_proxy.get(url, max_retries=0, timeout=20)
        except ssrf_proxy.request_error as error:
            found[url] = str(error)
        else:
            found[url] = f"{answer.status_code} {answer.headers.get('x-smokescreen-error', '')}".strip()
    return found


if __name__ == "__main__":
    question, parameters = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(globals()[question](**parameters)))
