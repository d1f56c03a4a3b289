"""Questions to a host, asked by the tests beside this file: `python -c <this file> <question> <arguments as JSON>`.

Runs on the host as the service user with the kit's runtime, so that it reads the keys where the services read them
and listens where only this host can. Prints the answer as JSON. A secret never leaves it.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shlex
import socket
import ssl
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.", "::1", "::ffff:127.")


def env(home: str, name: str) -> dict[str, str]:
    """The variables of etc/env/<name>.env."""
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


def leaks(home: str, secrets_file: str | None) -> dict[str, Any]:
    """Where a secret stands in a log or in a process's arguments, by the secret's name; `known` counts the secrets."""
    known = secrets(home, secrets_file)
    places = {f"arguments of process {pid}": text for pid, text in arguments()}
    for file in Path(home, "var").rglob("*"):
        if file.suffix in (".log", ".json", ".pid") or ".log." in file.name:
            places[str(file)] = file.read_bytes()
    found = [
        f"{name} in {place}"
        for place, text in places.items()
        for name, value in known.items()
        if value.encode() in text
    ]
    return {"known": len(known), "found": found}


def arguments() -> Iterator[tuple[str, bytes]]:
    """The arguments of every process on this host, the kit's or not."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield entry.name, (entry / "cmdline").read_bytes()
            except OSError:
                continue


def modes(home: str) -> dict[str, str]:
    """What others than the service user may open, of that which must be private: path and mode."""
    private = [Path(home), *(Path(home, name) for name in ("etc", "var"))]
    private += [path for path in Path(home, "etc").rglob("*") if not path.is_symlink()]
    private += [path for path in Path(home, "var").iterdir() if not path.is_symlink()]
    return {str(p): oct(p.stat().st_mode & 0o777) for p in private if p.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)}


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
        "refuses_strangers": refused,
    }


def bucket(home: str) -> list[str]:
    """The first of the keys that Dify keeps in its bucket, by the library that it uses. Runs with the API's Python."""
    import boto3
    from botocore.config import Config

    known = env(home, "api")
    os.environ |= {name: value for name, value in known.items() if name.startswith("AWS_")}
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


def model(home: str, port: int, name: str, question: str) -> dict[str, Any]:
    """The model service without a key, its models, and a completion."""
    root = f"http://127.0.0.1:{port}/v1"
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


def queues(home: str) -> dict[str, list[str]]:
    """The queues that each Celery worker consumes, as the workers say. Runs with the API's own Python."""
    from celery import Celery

    known = env(home, "api")
    app = Celery(broker=known["CELERY_BROKER_URL"])
    if roots := known.get("REDIS_SSL_CA_CERTS"):
        app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": roots}
    if prefix := known.get("REDIS_KEY_PREFIX"):
        app.conf.broker_transport_options = {"global_keyprefix": f"{prefix}:"}
    replies = app.control.inspect(timeout=5, limit=1).active_queues() or {}
    return {worker: [queue["name"] for queue in consumed] for worker, consumed in replies.items()}


if __name__ == "__main__":
    question, parameters = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(globals()[question](**parameters)))
