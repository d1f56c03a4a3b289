"""What Dify's processes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import kit_dify

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ENV_KEYS: dict[str, list[str]] = yaml.safe_load((DEPLOY / "releases/env-keys/1.16.0.yml").read_text())
POSTGRES = {
    "host": "127.0.0.1",
    "port": 5,
    "user": "dify",
    "password": "pg-secret",
    "database": "dify",
    "vector_database": "v",
    "sslmode": "disable",
    "sslrootcert": "/ca.pem",
}
REDIS = {
    "host": "127.0.0.1",
    "port": 6,
    "username": "",
    "password": "re/dis@secret",
    "tls": False,
    "ca_file": "/redis-ca.pem",
}
S3 = {
    "kind": "s3",
    "endpoint": "https://s3.example.com",
    "region": "eu-1",
    "bucket": "b",
    "access_key": "id",
    "secret_key": "s3-secret",
    "address_style": "path",
}
COMMON: dict[str, Any] = {
    "home": "/h",
    "ca_bundle": "/ca.pem",
    "http_proxy": "",
    "https_proxy": "",
    "no_proxy": "",
    "postgres": POSTGRES,
    "redis": REDIS,
    "storage": {"kind": "fs"},
    "vector": {"kind": "pgvector", "url": "", "api_key": ""},
    "inner_api_key": "inner-secret",
    "request_timeout": 900,
    "env": {},
    "env_keys": ENV_KEYS,
    "api_url": "http://127.0.0.1:1",
}


def dify(**changes: Any) -> dict[str, Any]:
    own = {
        "public_url": "",
        "internal_files_url": "http://127.0.0.1:0",
        "web_port": 2,
        "secret_key": "secret-key",
        "plugin_daemon_url": "http://127.0.0.1:3",
        "plugin_daemon_key": "daemon-secret",
        "plugin_daemon_debug_port": 4,
        "sizing": {"pool": 30, "overflow": 10},
        "marketplace": False,
    }
    return COMMON | own | changes


def daemon(**changes: Any) -> dict[str, Any]:
    own = {
        "pypi_index": "",
        "port": 3,
        "debug_port": 4,
        "key": "daemon-secret",
        "python": "/h/python",
        "uv": "/h/uv",
        "require_signatures": True,
        "trusted_keys": ["/h/site.public.pem", "/other.pem"],
    }
    return COMMON | own | changes


# --- Pairs that must match ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_api", "of_daemon"),
    [
        ("PLUGIN_DAEMON_KEY", "SERVER_KEY"),
        ("INNER_API_KEY_FOR_PLUGIN", "DIFY_INNER_API_KEY"),
        ("PLUGIN_DAEMON_TIMEOUT", "PLUGIN_MAX_EXECUTION_TIMEOUT"),
        ("PLUGIN_MAX_PACKAGE_SIZE", "MAX_PLUGIN_PACKAGE_SIZE"),
        ("PLUGIN_REMOTE_INSTALL_PORT", "PLUGIN_REMOTE_INSTALLING_PORT"),
    ],
)
def test_api_and_daemon_agree(of_api: str, of_daemon: str) -> None:
    assert kit_dify.api_env(dify())[of_api] == kit_dify.daemon_env(daemon())[of_daemon]


def test_one_timeout_reaches_browser_and_plugin() -> None:
    assert kit_dify.web_env(dify())["TEXT_GENERATION_TIMEOUT_MS"] == 900_000
    assert kit_dify.daemon_env(daemon())["DIFY_BACKWARDS_INVOCATION_READ_TIMEOUT"] == 900_000


# Of the libraries beneath: libpq, AWS', gRPC.
LIBRARIES = {"PGSSLMODE", "PGSSLROOTCERT", "AWS_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"}
LIBRARIES |= {"AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"}
ELSEWHERE: dict[str, Any] = {
    "postgres": {**POSTGRES, "host": "db.example.com", "sslmode": "verify-full"},
    "redis": {**REDIS, "host": "redis.example.com", "username": "dify", "tls": True},
    "storage": S3,
}


@pytest.mark.parametrize("make", [kit_dify.api_env, kit_dify.web_env])
@pytest.mark.parametrize("kind", ["pgvector", "qdrant", "weaviate"])
@pytest.mark.parametrize("parts", [{}, ELSEWHERE])
def test_every_setting_of_dify_is_one_that_the_release_reads(make: Any, kind: str, parts: Any) -> None:
    known = {key for keys in ENV_KEYS.values() for key in keys} | LIBRARIES
    system = {"FLASK_APP", "PYTHONDONTWRITEBYTECODE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "TIKTOKEN_CACHE_DIR"}
    system |= {"NODE_ENV", "HOSTNAME", "SCARF_NO_ANALYTICS", "CREATORS_PLATFORM_FEATURES_ENABLED"}
    site = dify(**parts, vector={"kind": kind, "url": "https://v", "api_key": "k"})
    assert set(make(site)) - known - system == set()


@pytest.mark.parametrize("parts", [{}, ELSEWHERE])
def test_every_setting_of_the_daemon_is_one_that_it_reads(parts: Any) -> None:
    system = {"GIN_MODE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"} | LIBRARIES
    env = kit_dify.daemon_env(daemon(pypi_index="https://mirror/simple", **parts))
    assert set(env) - set(ENV_KEYS["plugin_daemon"]) - system == set()


# --- Secrets and addresses ------------------------------------------------------------------------------------------


def test_the_web_server_knows_no_secret() -> None:
    assert not [key for key, value in kit_dify.web_env(dify()).items() if "secret" in str(value)]


def test_a_password_is_escaped_in_an_address() -> None:
    assert kit_dify.api_env(dify())["CELERY_BROKER_URL"] == "redis://:re%2Fdis%40secret@127.0.0.1:6/1"


def test_servers_elsewhere_are_told_to_both_with_tls() -> None:
    api, plugins = kit_dify.api_env(dify(**ELSEWHERE)), kit_dify.daemon_env(daemon(**ELSEWHERE))
    for env in (api, plugins):
        assert (env["DB_HOST"], env["PGSSLROOTCERT"]) == ("db.example.com", "/ca.pem")
        assert (env["REDIS_USERNAME"], env["REDIS_USE_SSL"]) == ("dify", True)
        assert (env["REDIS_SSL_CERT_REQS"], env["REDIS_SSL_CA_CERTS"]) == ("CERT_REQUIRED", "/redis-ca.pem")
        assert env["AWS_CA_BUNDLE"] == "/ca.pem"
    assert api["PGSSLMODE"] == "verify-full"
    assert api["CELERY_BROKER_URL"] == "rediss://dify:re%2Fdis%40secret@redis.example.com:6/1"
    assert api["EVENT_BUS_REDIS_URL"].endswith("/0?ssl_cert_reqs=required&ssl_ca_certs=/redis-ca.pem")
    assert (api["STORAGE_TYPE"], api["S3_BUCKET_NAME"], api["S3_ADDRESS_STYLE"]) == ("s3", "b", "path")
    assert plugins["DB_SSL_MODE"] == "require"
    assert (plugins["PLUGIN_STORAGE_TYPE"], plugins["PLUGIN_STORAGE_OSS_BUCKET"]) == ("aws_s3", "b")
    assert plugins["S3_USE_PATH_STYLE"] is True


def test_old_knowledge_is_found_when_new_goes_elsewhere() -> None:
    env = kit_dify.api_env(dify(vector={"kind": "qdrant", "url": "http://q:6333", "api_key": ""}))
    assert (env["VECTOR_STORE"], env["QDRANT_URL"], env["PGVECTOR_DATABASE"]) == ("qdrant", "http://q:6333", "v")
    assert env["QDRANT_API_KEY"] is None


def test_a_site_may_choose_what_only_dify_knows() -> None:
    env = kit_dify.api_env(dify(env={"VECTOR_STORE": "milvus", "STORAGE_TYPE": "azure-blob"}))
    assert (env["VECTOR_STORE"], env["STORAGE_TYPE"]) == ("milvus", "azure-blob")


def test_without_a_public_url_every_address_is_relative_but_those_of_this_host() -> None:
    env = kit_dify.api_env(dify()) | kit_dify.web_env(dify())
    assert env["CONSOLE_API_URL"] == env["FILES_URL"] == env["TRIGGER_URL"] == ""
    assert env["ENDPOINT_URL_TEMPLATE"] == "/e/{hook_id}"
    assert env["INTERNAL_FILES_URL"] == "http://127.0.0.1:0"
    assert env["SERVER_CONSOLE_API_URL"] == "http://127.0.0.1:1"


def test_a_public_url_is_in_every_address_that_browsers_see() -> None:
    env = kit_dify.api_env(dify(public_url="https://dify.example.com"))
    urls = {
        key: value for key, value in env.items() if key.endswith("_URL") and "127.0.0.1" not in str(value) and value
    }
    assert urls == dict.fromkeys(
        [
            "CONSOLE_API_URL",
            "CONSOLE_WEB_URL",
            "SERVICE_API_URL",
            "APP_API_URL",
            "APP_WEB_URL",
            "FILES_URL",
            "TRIGGER_URL",
        ],
        "https://dify.example.com",
    )
    assert env["ENDPOINT_URL_TEMPLATE"] == "https://dify.example.com/e/{hook_id}"


def test_the_hosts_own_services_are_never_behind_the_proxy() -> None:
    env = kit_dify.api_env(dify(https_proxy="http://proxy:3128", no_proxy="10.0.0.0/8"))
    assert env["HTTPS_PROXY"] == env["https_proxy"] == "http://proxy:3128"
    assert env["NO_PROXY"].split(",") == ["10.0.0.0/8", "127.0.0.1", "localhost"]
    assert "NO_PROXY" not in kit_dify.api_env(dify())


def test_signatures_stay_on_and_the_sites_key_counts() -> None:
    env = kit_dify.daemon_env(daemon())
    assert env["FORCE_VERIFYING_SIGNATURE"] is True
    assert env["THIRD_PARTY_SIGNATURE_VERIFICATION_PUBLIC_KEYS"] == "/h/site.public.pem,/other.pem"


# --- A site's own settings ------------------------------------------------------------------------------------------


def test_a_sites_setting_wins_and_reaches_only_who_reads_it() -> None:
    site = dify(env={"UPLOAD_FILE_SIZE_LIMIT": 50, "TOP_K_MAX_VALUE": 20})
    assert kit_dify.api_env(site)["UPLOAD_FILE_SIZE_LIMIT"] == 50
    assert "UPLOAD_FILE_SIZE_LIMIT" not in kit_dify.web_env(site)
    assert kit_dify.web_env(site)["TOP_K_MAX_VALUE"] == 20


def test_all_problems_of_a_sites_settings_are_named_at_once() -> None:
    with pytest.raises(kit_dify.SettingsProblem) as error:
        kit_dify.api_env(dify(env={"UPLOAD_FILE_SIZE_LIMITS": 1, "SECRET_KEY": "x", "LOG_LEVEL": ["DEBUG"]}))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "did you mean UPLOAD_FILE_SIZE_LIMIT?" in lines[0]
    assert "set dify_source_secret_key instead" in lines[1]
    assert "LOG_LEVEL" in lines[2]


def test_the_daemons_settings_are_checked_too() -> None:
    with pytest.raises(kit_dify.SettingsProblem, match=r"plugin_daemon_env\.SERVER_KEY.*plugin_daemon_key"):
        kit_dify.daemon_env(daemon(env={"SERVER_KEY": "x"}))


# --- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "memory", "workers", "connections"),
    [(1, 4_000, 1, 10), (2, 24_000, 2, 10), (4, 32_000, 4, 10), (8, 64_000, 6, 20), (32, 256_000, 16, 20)],
)
def test_workers_follow_the_cores(cores: int, memory: int, workers: int, connections: int) -> None:
    found = kit_dify.size(cores, memory)
    assert (found.workers, found.connections) == (workers, connections)


def test_a_host_with_little_memory_gets_fewer_workers() -> None:
    assert kit_dify.size(8, 6_000).workers == 3


@pytest.mark.parametrize("cores", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("connections", [0, 1, 50, 200])
def test_pools_cover_the_requests_and_the_database_covers_the_pools(cores: int, connections: int) -> None:
    found = kit_dify.size(cores, 64_000, connections=connections)
    assert found.pool + found.overflow >= 2.5 * found.connections
    assert found.max_connections >= (found.workers + 1) * (found.pool + found.overflow) + kit_dify.DAEMON_POOL
    assert kit_dify.size(2, 24_000).max_connections == 200  # what was measured
