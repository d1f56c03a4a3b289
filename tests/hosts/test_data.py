"""PostgreSQL, Redis and file storage answer, whoever runs them; the kit's own refuse strangers."""

import pytest

from tests.hosts.kit_host import KitHost


@pytest.mark.mode("!compose")  # see test_containers.py
def test_postgres_answers(kit: KitHost) -> None:
    answer = kit.probe("postgres", databases=kit.databases)
    for database, found in answer["databases"].items():
        assert found["answer"] == 42, f"{database}: SELECT 6 * 7 gave {found['answer']}"
        assert found["encoding"] == "UTF8", f"{database} is encoded as {found['encoding']}, Dify needs UTF8"
        if "postgres" in kit.services:
            assert found["checksums"] == "on", f"{database} has no data checksums"
    if kit.facts.get("vector_store", "pgvector") == "pgvector":
        extensions = answer["databases"][kit.databases[2]]["extensions"]
        # Dify creates it in somebody else's database itself, with the first knowledge.
        assert "vector" in extensions or "postgres" not in kit.services, (
            f"{kit.databases[2]} has {extensions} but not vector. Run `make deploy`."
        )


@pytest.mark.service("postgres")
def test_postgres_refuses_a_wrong_password(kit: KitHost) -> None:
    answer = kit.probe("postgres", databases=[])
    assert answer["refuses_wrong_password"], f"PostgreSQL let a wrong password in. Look at {kit.home}/etc/pg_hba.conf."


@pytest.mark.deep
@pytest.mark.service("api")
@pytest.mark.service("postgres")
def test_postgres_has_room_for_every_pool(kit: KitHost) -> None:
    services = {name: program.pid for name, program in kit.supervised.items() if program.pid}
    found = kit.probe("connections", databases=kit.databases, services=services)
    allowed, total = found["allowed"], sum(found["allowed"].values())
    assert min(allowed.values()) > 0, f"a database has no limit: {allowed}. Run `make deploy`."
    assert total + found["reserved"] < found["max"], (
        f"the processes may open {allowed}, PostgreSQL allows {found['max']}, {found['reserved']} of them for its "
        "superuser: 'too many clients' under load. Run `make deploy`; lower postgres_settings' max_connections no more."
    )
    beyond = {name: count for name, count in found["open"].items() if count > allowed.get(name, total)}
    assert not beyond, f"open {beyond}, though the pools allow {allowed}: somebody connects past them"


@pytest.mark.mode("!compose")
def test_redis_answers_and_refuses_strangers(kit: KitHost) -> None:
    answer = kit.probe("redis", port=kit.ports.get("redis", 0))
    assert answer["pong"] is True
    if "redis" not in kit.services:
        return
    assert answer["refuses_strangers"], (
        f"Redis answers without a password. Look for requirepass in {kit.home}/etc/redis.conf."
    )
    assert answer["aof"] == 1, "Redis' append-only file is off: a crash loses queued work. Run `make deploy`."
    assert answer["last_save"] == "ok", (
        "Redis could not save its data. Is the disk full, or memory? `make logs SERVICE=redis`"
    )
    assert answer["aof_last_write"] == "ok", "Redis could not write its append-only file. Is the disk full?"


@pytest.mark.service("api")
def test_dify_finds_its_files_in_the_bucket(kit: KitHost) -> None:
    if kit.facts.get("storage", "fs") == "s3":
        keys = kit.probe("bucket", python="current/api/.venv/bin/python")
        assert keys, "the bucket does not hold the workspace's key pair: stored credentials could not be read"


@pytest.mark.service("api")
def test_database_is_at_the_release_schema(kit: KitHost) -> None:
    answer = kit.probe("schema")
    assert answer["heads"], f"no migrations found under {kit.home}/current/api/migrations"
    assert answer["current"] == answer["heads"], (
        f"the database is at {answer['current']}, the release needs {answer['heads']}. Run `make deploy`."
    )


@pytest.mark.deep
@pytest.mark.service("api")
def test_dify_finds_what_is_near_a_vector(kit: KitHost) -> None:
    answer = kit.probe("vectors", python="current/api/.venv/bin/python")
    assert answer["kind"] == kit.facts.get("vector_store", "pgvector")
    assert answer["found"] == ["red"], f"{answer['kind']} has {answer['found']} next to it: knowledge is not found"
