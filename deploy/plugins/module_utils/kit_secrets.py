"""The site's secrets: which are blank, what they become, and how they get into a file that a person may also edit."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import string
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

PREFIX = "kit_secret_"
ADMIN_PASSWORD = "kit_secret_admin_password"
#: Every secret of a site and what it is for; the order is the file's.
SECRETS = {
    "kit_secret_admin_password": "Dify's first account (dify_admin_email)",
    "kit_secret_inference_api_key": "the model service's API key",
    "kit_secret_postgres_admin": "PostgreSQL's superuser",
    "kit_secret_postgres": "PostgreSQL's role dify",
    "kit_secret_redis": "Redis",
    "kit_secret_dify_secret_key": "signs Dify's sessions and protects what it stores; never change it",
    "kit_secret_plugin_daemon_key": "what the API shows to the plugin daemon",
    "kit_secret_inner_api_key": "what the plugin daemon shows to the API",
    "kit_secret_agent_key": "protects the tokens of agents' commands",
    "kit_secret_agent_runtime_token": "what the agent backend shows to the agent runtime",
    "kit_secret_sandbox": "what the API shows to the sandbox",
    "kit_secret_pgvector": "the vector database of dify_mode compose",
}
#: Stored data cannot be used with another value of these.
BOUND_TO_DATA = ADMIN_PASSWORD, "kit_secret_postgres_admin", "kit_secret_postgres", "kit_secret_dify_secret_key"
# Letters that look alike in most fonts are left out of what people type.
TYPABLE = "".join(sorted(set(string.ascii_letters + string.digits) - set("0O1lI")))
HEADER = """\
# Secrets of this site, made by `make deploy`; it fills in blanks and changes nothing that is here. Keep a copy: data on
# the hosts cannot be used without them. Not in git; `ansible-vault encrypt` of this file is welcome.
"""
#: Where a deployed host has them: file in etc/env -> its variable -> the site's name for it.
ON_HOST = {
    "api.env": {
        "DB_PASSWORD": "kit_secret_postgres",
        "INNER_API_KEY_FOR_PLUGIN": "kit_secret_inner_api_key",
        "PLUGIN_DAEMON_KEY": "kit_secret_plugin_daemon_key",
        "REDIS_PASSWORD": "kit_secret_redis",
        "SECRET_KEY": "kit_secret_dify_secret_key",
    },
    "agent-backend.env": {
        "DIFY_AGENT_SERVER_SECRET_KEY": "kit_secret_agent_key",
        "DIFY_AGENT_SHELLCTL_AUTH_TOKEN": "kit_secret_agent_runtime_token",
    },
    "inference.env": {"VLLM_API_KEY": "kit_secret_inference_api_key"},
    "sandbox.env": {"API_KEY": "kit_secret_sandbox"},
    "dify.env": {
        "DB_PASSWORD": "kit_secret_postgres",
        "DIFY_AGENT_SERVER_SECRET_KEY": "kit_secret_agent_key",
        "DIFY_AGENT_SHELLCTL_AUTH_TOKEN": "kit_secret_agent_runtime_token",
        "PGVECTOR_PASSWORD": "kit_secret_pgvector",
        "PLUGIN_DAEMON_KEY": "kit_secret_plugin_daemon_key",
        "PLUGIN_DIFY_INNER_API_KEY": "kit_secret_inner_api_key",
        "REDIS_PASSWORD": "kit_secret_redis",
        "SANDBOX_API_KEY": "kit_secret_sandbox",
        "SECRET_KEY": "kit_secret_dify_secret_key",
    },
    "postgres-admin.env": {"PGPASSWORD": "kit_secret_postgres_admin"},
}


def recover(file_name: str, text: str) -> dict[str, str]:
    """The site's secrets in one of a host's env files (lines of KEY='value')."""
    wanted = ON_HOST[file_name]
    known: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        words = shlex.split(value) if separator else []
        known[key] = words[0] if words else ""
    # A server that the kit does not run has a password of its own.
    foreign = {f"{part}_PASSWORD" for part in ("DB", "REDIS") if known.get(f"{part}_HOST", "127.0.0.1") != "127.0.0.1"}
    return {name: known[key] for key, name in wanted.items() if known.get(key) and key not in foreign}


def generate(name: str) -> str:
    """A new secret: URL-safe, 256 bits; for people 20 letters and digits that are easy to type (116 bits)."""
    if name != ADMIN_PASSWORD:
        return secrets.token_urlsafe(32)
    while True:
        password = "".join(secrets.choice(TYPABLE) for _ in range(20))
        if re.search("[A-Za-z]", password) and re.search(r"\d", password):
            return password


def blanks(known: Iterable[Mapping[str, object]]) -> list[str]:
    """Names that at least one host has no value for."""
    hosts = list(known)
    return [name for name in SECRETS if any(not host.get(name) for host in hosts)]


def fill(text: str, values: Mapping[str, str]) -> str:
    """The file's new text: blank lines of these names get a value, absent ones are added; all else stays."""
    for name, value in values.items():
        line = f'{name}: "{value}"'
        blank = rf"""^{name}:[ \t]*(?:""|''|~|null)?[ \t]*(?:#.*)?$"""
        text, found = re.subn(blank, line, text, count=1, flags=re.MULTILINE)
        if not found:
            text = (text.rstrip("\n") + "\n" if text else HEADER + "---\n") + f"# {SECRETS[name]}\n{line}\n"
    return text


def write(path: Path, text: str) -> None:
    """Replace the file in one step; only its owner may read it, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
