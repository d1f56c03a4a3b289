"""Containers whose PostgreSQL, Redis, files and vectors are elsewhere, with TLS; and their move to source mode."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.e2e.containers import containers, user_of_docker
from tests.e2e.test_elsewhere import SECRETS, put_secrets, settings, vector_settings
from tests.elsewhere import PASSWORD, Elsewhere

HOUR = 3600
NAME = "kit-e2e-compose-away"


def bridge() -> str:
    """Where containers and this host find each other."""
    said = subprocess.run(["ip", "-json", "-4", "address", "show", "docker0"], check=True, capture_output=True).stdout
    address: str = json.loads(said)[0]["addr_info"][0]["local"]
    return address


@pytest.mark.long
def test_everything_elsewhere() -> None:
    with user_of_docker(NAME) as person, Elsewhere.made(bridge()) as elsewhere:
        away = settings(elsewhere) | vector_settings(elsewhere, "weaviate")
        person.configure(**away)
        # What is wrong is said of all at once, before anything is there.
        put_secrets(person, dict.fromkeys(SECRETS, "wrong"))
        refused = person.make("deploy", HOUR, title="everything elsewhere, wrong passwords", expect=2)
        for words in ("password authentication failed", "WRONGPASS", "SignatureDoesNotMatch", "Weaviate refuses"):
            assert words in refused.output, refused.tail()
        assert not containers(NAME), "something runs although no server lets Dify in"

        put_secrets(person, dict.fromkeys(SECRETS, PASSWORD))
        person.make("deploy", HOUR, title="containers, everything else elsewhere")
        assert not {"db_postgres", "pgvector", "redis"} & set(containers(NAME))
        answer = person.first_answer()
        outcome = person.make("deploy", 600, title="everything elsewhere, nothing to do")
        assert outcome.changed == 0, f"the second deploy changed something:\n{outcome.tail()}"
        assert " passed" in person.make("check", 600).output

        # Nothing but a few plugins' files is here, and yet it is the other mode's site.
        person.configure(**away, dify_mode="source")
        refused = person.make("deploy", 600, title="another mode, refused", expect=2)
        assert f"PostgreSQL at {elsewhere.host}" in refused.output, refused.tail()
        assert person.answer() == answer
        person.make('deploy ARGS="-e dify_move_data=yes"', HOUR, title="moved to source mode")
        assert not containers(NAME)
        assert person.answer() == answer
        assert " passed" in person.make("check", 600).output
