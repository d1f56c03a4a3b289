"""A site whose PostgreSQL, Redis, files and vectors are elsewhere, with TLS there and at its own door."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.e2e.harness import Person
from tests.elsewhere import PASSWORD, Elsewhere

HOUR = 3600
SECRETS = ("postgres_password", "redis_password", "dify_s3_secret_key", "dify_vector_api_key")


@pytest.fixture(scope="module", params=["weaviate", "qdrant"])
def vectors(request: pytest.FixtureRequest) -> str:
    """The kind of vector store."""
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def elsewhere(vectors: str) -> Iterator[Elsewhere]:
    with Elsewhere.made() as servers:
        yield servers


@pytest.fixture(scope="module")
def person(elsewhere: Elsewhere, vectors: str) -> Iterator[Person]:
    person = Person("kit-e2e-away", settings=settings(elsewhere) | vector_settings(elsewhere, vectors))
    try:
        for kind in ("pem", "key"):
            shutil.copy(elsewhere.root / f"localhost.{kind}", person.home / f"site.{kind}")
        people = person.settings.get("kit_port_base", 17800) + 18
        person.configure(
            dify_public_url=f"https://localhost:{people}",
            gateway_tls="files",
            gateway_tls_certificate=str(person.home / "site.pem"),
            gateway_tls_key=str(person.home / "site.key"),
        )
        person.own(person.home)
        person.lend_cache()
        yield person
    finally:
        person.remove()


def settings(elsewhere: Elsewhere) -> dict[str, Any]:
    """What a site says of servers that are there already."""
    postgres, _ = elsewhere.postgres()
    redis, _ = elsewhere.redis()
    bucket, _ = elsewhere.s3()
    return {
        "kit_ca_bundle": str(elsewhere.bundle()),
        "postgres_source": "external",
        "postgres_host": elsewhere.host,
        "postgres_port": postgres,
        "postgres_sslmode": "verify-full",
        "redis_source": "external",
        "redis_host": elsewhere.host,
        "redis_port": redis,
        "redis_username": "dify",
        "redis_tls": True,
        "dify_storage": "s3",
        "dify_s3": {"endpoint": f"https://{elsewhere.host}:{bucket}", "bucket": "kit", "access_key": "kit-key"},
    }


def vector_settings(elsewhere: Elsewhere, kind: str) -> dict[str, Any]:
    """The same for vectors."""
    if kind == "qdrant":
        return {"dify_vector_store": kind, "dify_vector_url": f"http://{elsewhere.host}:{elsewhere.qdrant()}"}
    port, grpc = elsewhere.weaviate()
    return {
        "dify_vector_store": kind,
        "dify_vector_url": f"http://{elsewhere.host}:{port}",
        "dify_source_env": {"WEAVIATE_GRPC_ENDPOINT": f"grpc://{elsewhere.host}:{grpc}"},
    }


def put_secrets(person: Person, secrets: dict[str, str]) -> None:
    """Adds to the site's secrets, as a person does with an editor."""
    file = person.secrets
    there = yaml.safe_load(file.read_text()) if file.exists() else {}
    file.write_text(yaml.safe_dump({**there, **secrets}))
    file.chmod(0o600)
    person.own(file)


@pytest.mark.long
def test_everything_elsewhere(person: Person, vectors: str) -> None:
    if not person.dify:
        pytest.skip("Dify's source cannot be had here, see above")
    # What is wrong is said of all at once, before anything is there.
    put_secrets(person, dict.fromkeys(SECRETS, "wrong"))
    refused = person.make("deploy", HOUR, title="everything elsewhere, wrong passwords", expect=2)
    refusal = f"{vectors.capitalize()} refuses"
    for words in ("password authentication failed", "WRONGPASS", "SignatureDoesNotMatch", refusal):
        assert words in refused.output, refused.tail()
    assert not (person.home / "dify-kit/current").exists(), "something was installed although no server lets Dify in"

    put_secrets(person, dict.fromkeys(SECRETS, PASSWORD))
    person.make("deploy", 2 * HOUR, title="everything elsewhere, with cache")
    assert not {"postgres", "redis"} & set(person.facts["services"])
    answer = person.first_answer()
    outcome = person.make("deploy", 600, title="everything elsewhere, nothing to do")
    assert outcome.changed == 0, f"the second deploy changed something:\n{outcome.tail()}"
    assert person.answer() == answer
    # Among what is checked: Dify's own code finds a vector in it, and its keys in the bucket.
    person.make("check", 600, title="make check, everything elsewhere")
    for log in sorted((person.home / "dify-kit/var/log").glob("*.log")):
        assert PASSWORD not in log.read_text(errors="replace"), f"a password is in {log}"
