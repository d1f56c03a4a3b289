"""PostgreSQL, Redis, S3 and Qdrant that the kit does not run, each for real: what the precheck says of them."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Any

import pytest
from ansible.module_utils import kit_external, kit_wire

from tests.elsewhere import PASSWORD, Elsewhere


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    with Elsewhere.made() as site:
        yield site


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
    """Databases as Dify needs them, and some as it does not."""
    port, login = elsewhere.postgres()
    with login() as admin:
        admin.execute(f"CREATE ROLE plain LOGIN PASSWORD '{PASSWORD}'")
        admin.execute(f"SET password_encryption = md5; CREATE ROLE old LOGIN PASSWORD '{PASSWORD}'")
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
    """With TLS; without, at another port."""
    port, plain = elsewhere.redis()
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
    """A bucket and one key."""
    port, put = elsewhere.s3()
    server = {
        "endpoint": f"https://localhost:{port}",
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


# --- Vectors; Weaviate's server takes minutes to build, so it is for tests/e2e/test_elsewhere.py ----------------------


@pytest.fixture(scope="module")
def qdrant(elsewhere: Elsewhere) -> dict[str, Any]:
    """A Qdrant with a key."""
    url = f"http://localhost:{elsewhere.qdrant()}"
    return {"kind": "qdrant", "url": url, "api_key": PASSWORD, "ca_file": "", "environment": {}}


def test_a_sound_qdrant_has_no_problem(qdrant: dict[str, Any]) -> None:
    assert problems("vector", qdrant) == []
    assert problems("vector", {**qdrant, "url": f"{qdrant['url']}/"}) == []


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        ({"api_key": "wrong"}, "Qdrant refuses the site's key", "dify_vector_api_key in the site's secrets.yml"),
        ({"api_key": ""}, "Qdrant refuses the site's key", "dify_vector_api_key in the site's secrets.yml"),
        ({"url": "http://localhost:9"}, "Qdrant cannot be reached at http://localhost:9", "kit_no_proxy"),
        ({"kind": "weaviate"}, "is no Weaviate", "correct dify_vector_url"),
    ],
)
def test_what_is_wrong_with_qdrant_is_named(
    qdrant: dict[str, Any], changes: dict[str, Any], what: str, remedy: str
) -> None:
    said = only("vector", {**qdrant, **changes})
    assert what in said
    assert remedy in said


def test_everything_that_is_wrong_comes_at_once(
    postgres: dict[str, Any], redis: dict[str, Any], bucket: dict[str, Any]
) -> None:
    servers = {"postgres": postgres, "redis": redis, "storage": bucket}
    closed = {"host": "localhost", "port": 9, "endpoint": "http://localhost:9"}
    found = kit_external.examine({name: {**server, **closed} for name, server in servers.items()})
    assert [problem.what.split(" cannot")[0] for problem in found.problems] == ["PostgreSQL", "Redis", "The S3 server"]
