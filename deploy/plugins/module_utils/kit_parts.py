"""What Dify and its plugin daemon are told of PostgreSQL, Redis, file storage and vectors, whoever runs them.

``site`` is ``dify_source_site`` or ``plugin_daemon_site`` of the roles: its ``postgres``, ``redis``, ``storage`` and
``vector``, and ``home``. Root certificates for S3 and vector stores are among those of ``kit_network``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

Env = dict[str, Any]

#: Variables of the kit from which these settings follow, in Dify and in the daemon. Which storage and which vector
#: store is a site's to set, too: Dify knows more of them than the kit.
WIRED = {
    "DB_HOST": "postgres_host",
    "DB_PORT": "postgres_port",
    "DB_USERNAME": "postgres_user",
    "DB_PASSWORD": "postgres_password",
    "DB_DATABASE": "postgres_databases",
    "DB_SSL_MODE": "postgres_sslmode",
    "REDIS_HOST": "redis_host",
    "REDIS_PORT": "redis_port",
    "REDIS_USERNAME": "redis_username",
    "REDIS_PASSWORD": "redis_password",
    "REDIS_USE_SSL": "redis_tls",
    "REDIS_SSL_CA_CERTS": "redis_ca",
    "CELERY_BROKER_URL": "redis_host",
    "EVENT_BUS_REDIS_URL": "redis_host",
    "PLUGIN_STORAGE_OSS_BUCKET": "dify_s3",
    "S3_ENDPOINT": "dify_s3",
    "S3_BUCKET_NAME": "dify_s3",
    "S3_ACCESS_KEY": "dify_s3",
    "S3_SECRET_KEY": "dify_s3_secret_key",
    "AWS_ACCESS_KEY": "dify_s3",
    "AWS_SECRET_KEY": "dify_s3_secret_key",
    "QDRANT_URL": "dify_vector_url",
    "QDRANT_API_KEY": "dify_vector_api_key",
    "WEAVIATE_ENDPOINT": "dify_vector_url",
    "WEAVIATE_API_KEY": "dify_vector_api_key",
}


def _postgres_tls(postgres: Mapping[str, Any]) -> Env:
    """TLS for everything that uses libpq or speaks as it does: some of Dify's pools have no setting of their own."""
    mode = postgres["sslmode"]
    if mode == "disable":
        return {}
    # With a root certificate, libpq and Go's driver check the server's even where the mode is `require`.
    return {"PGSSLMODE": mode} | ({"PGSSLROOTCERT": postgres["sslrootcert"]} if mode.startswith("verify") else {})


def _redis(redis: Mapping[str, Any]) -> Env:
    """The settings that Dify and the daemon read under the same names."""
    tls = {"REDIS_USE_SSL": True, "REDIS_SSL_CERT_REQS": "CERT_REQUIRED", "REDIS_SSL_CA_CERTS": redis["ca_file"]}
    return {
        "REDIS_HOST": redis["host"],
        "REDIS_PORT": redis["port"],
        "REDIS_PASSWORD": redis["password"],
        "REDIS_DB": 0,
        **({"REDIS_USERNAME": redis["username"]} if redis["username"] else {}),
        **(tls if redis["tls"] else {}),
    }


def redis_url(redis: Mapping[str, Any], database: int) -> str:
    """The address of one of the server's databases, with the login."""
    login = f"{quote(redis['username'], safe='')}:{quote(str(redis['password']), safe='')}@"
    return f"redis{'s' if redis['tls'] else ''}://{login}{redis['host']}:{redis['port']}/{database}"


def verified_redis_url(redis: Mapping[str, Any], database: int) -> str:
    """The same for a program that has no settings beside the address: with the certificate authority in it."""
    roots = f"?ssl_cert_reqs=required&ssl_ca_certs={quote(str(redis['ca_file']), safe='/')}" if redis["tls"] else ""
    return redis_url(redis, database) + roots


def _postgres(postgres: Mapping[str, Any]) -> Env:
    """The database of Dify or of the daemon: both call it the same."""
    return {
        "DB_TYPE": "postgresql",
        "DB_HOST": postgres["host"],
        "DB_PORT": postgres["port"],
        "DB_USERNAME": postgres["user"],
        "DB_PASSWORD": postgres["password"],
        "DB_DATABASE": postgres["database"],
        **_postgres_tls(postgres),
    }


def _s3_client(storage: Mapping[str, Any]) -> Env:
    """What AWS' libraries of any language read."""
    if not storage["endpoint"]:
        return {}
    # Since 2025 they add checksums that servers other than AWS' own often refuse.
    return {
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


def api_env(site: Mapping[str, Any]) -> Env:
    """For api, worker, beat and ``flask``."""
    postgres, redis = site["postgres"], site["redis"]
    env: Env = {
        **_postgres(postgres),
        **_redis(redis),
        "CELERY_BACKEND": "redis",
        "CELERY_BROKER_URL": redis_url(redis, 1),
        # In whatever store new knowledge goes: what was indexed with pgvector before stays there, and is found.
        "PGVECTOR_HOST": postgres["host"],
        "PGVECTOR_PORT": postgres["port"],
        "PGVECTOR_USER": postgres["user"],
        "PGVECTOR_PASSWORD": postgres["password"],
        "PGVECTOR_DATABASE": postgres["vector_database"],
    }
    if redis["tls"]:
        # Dify makes this address of the others, but leaves the certificate authority out.
        env["EVENT_BUS_REDIS_URL"] = verified_redis_url(redis, 0)
    return env | _files(site) | _vectors(site)


def _files(site: Mapping[str, Any]) -> Env:
    storage = site["storage"]
    if storage["kind"] == "fs":
        return {"STORAGE_TYPE": "opendal", "OPENDAL_SCHEME": "fs", "OPENDAL_FS_ROOT": f"{site['home']}/var/storage"}
    return {
        "STORAGE_TYPE": "s3",
        "S3_ENDPOINT": storage["endpoint"] or None,
        "S3_REGION": storage["region"],
        "S3_BUCKET_NAME": storage["bucket"],
        "S3_ACCESS_KEY": storage["access_key"],
        "S3_SECRET_KEY": storage["secret_key"],
        "S3_ADDRESS_STYLE": storage["address_style"],
        **_s3_client(storage),
    }


def _vectors(site: Mapping[str, Any]) -> Env:
    vector = site["vector"]
    kind = vector["kind"]
    env: Env = {"VECTOR_STORE": kind}
    if kind == "qdrant":
        env |= {"QDRANT_URL": vector["url"], "QDRANT_API_KEY": vector["api_key"] or None}
    elif kind == "weaviate":
        env |= {"WEAVIATE_ENDPOINT": vector["url"], "WEAVIATE_API_KEY": vector["api_key"] or None}
    return env


def daemon_env(site: Mapping[str, Any]) -> Env:
    """For the plugin daemon and its command line."""
    postgres, storage = site["postgres"], site["storage"]
    env: Env = {
        **_postgres(postgres),
        # It knows these two only; a root certificate (PGSSLROOTCERT) makes it check the server's, without its name.
        "DB_SSL_MODE": "disable" if postgres["sslmode"] == "disable" else "require",
        **_redis(site["redis"]),
    }
    if storage["kind"] == "fs":
        return env | {
            "PLUGIN_STORAGE_TYPE": "local",
            "PLUGIN_STORAGE_LOCAL_ROOT": f"{site['home']}/var/plugins/storage",
        }
    return env | {
        "PLUGIN_STORAGE_TYPE": "aws_s3",
        "PLUGIN_STORAGE_OSS_BUCKET": storage["bucket"],
        # AWS' library with its settings; the other way that the daemon has reads none of them.
        "S3_USE_AWS": True,
        "S3_ENDPOINT": storage["endpoint"] or None,
        "S3_USE_PATH_STYLE": storage["address_style"] == "path",
        "AWS_REGION": storage["region"],
        "AWS_ACCESS_KEY": storage["access_key"],
        "AWS_SECRET_KEY": storage["secret_key"],
        **_s3_client(storage),
    }
