"""The site's secrets: strong, distinct, and no edit of a person's is lost."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
import yaml
from ansible.module_utils import kit_secrets

ROOT = Path(__file__).resolve().parents[2]


def all_values() -> dict[str, str]:
    return {name: kit_secrets.generate(name) for name in kit_secrets.SECRETS}


def test_every_secret_of_the_wiring_is_made_and_nothing_else() -> None:
    used = set(re.findall(r"kit_secret_\w+", (ROOT / "deploy/group_vars/all.yml").read_text()))
    assert used == set(kit_secrets.SECRETS)


def test_values_are_distinct_url_safe_and_long() -> None:
    values = all_values()
    assert len(set(values.values())) == len(values)
    for name, value in values.items():
        assert re.fullmatch(r"[A-Za-z0-9_-]+", value), name
        assert len(value) >= (20 if name == kit_secrets.ADMIN_PASSWORD else 43), name


def test_the_admin_password_suits_dify_and_people() -> None:
    for _ in range(200):
        password = kit_secrets.generate(kit_secrets.ADMIN_PASSWORD)
        assert re.search(r"[A-Za-z]", password)
        assert re.search(r"\d", password)
        assert not set(password) & set("0O1lI")


def test_a_new_file_loads_to_what_was_generated() -> None:
    values = all_values()
    text = kit_secrets.fill("", values)
    assert yaml.safe_load(text) == values
    assert text.startswith("# Secrets of this site")


@pytest.mark.parametrize("blank", ["", ' ""', " ''", " null", " ~", '   ""  # to be filled', "  # to be filled"])
def test_blanks_are_filled_where_they_stand(blank: str) -> None:
    text = f"# mine\nkit_secret_redis:{blank}\nkit_secret_postgres: kept # by hand\n"
    filled = kit_secrets.fill(text, {"kit_secret_redis": "new"})
    assert yaml.safe_load(filled) == {"kit_secret_redis": "new", "kit_secret_postgres": "kept"}
    assert filled.count("kit_secret_redis") == 1
    assert "# mine" in filled
    assert "kept # by hand" in filled


def test_values_that_are_there_are_never_touched() -> None:
    text = 'kit_secret_redis: "present"'  # no newline at the end
    filled = kit_secrets.fill(text, {"kit_secret_postgres": "new"})
    assert yaml.safe_load(filled) == {"kit_secret_redis": "present", "kit_secret_postgres": "new"}


def test_a_name_that_begins_like_another_is_told_apart() -> None:
    filled = kit_secrets.fill('kit_secret_postgres_admin: ""\n', {"kit_secret_postgres": "new"})
    assert yaml.safe_load(filled) == {"kit_secret_postgres_admin": "", "kit_secret_postgres": "new"}


def test_blanks_are_those_that_any_host_lacks() -> None:
    complete: dict[str, object] = dict(all_values())
    assert kit_secrets.blanks([complete]) == []
    assert kit_secrets.blanks([complete, {**complete, "kit_secret_redis": ""}]) == ["kit_secret_redis"]
    assert kit_secrets.blanks([{}]) == list(kit_secrets.SECRETS)


def test_the_file_is_its_owners_only_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "group_vars" / "kit" / "secrets.yml"
    kit_secrets.write(path, "first")
    path.chmod(0o644)
    kit_secrets.write(path, "second")
    assert path.read_text() == "second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_secrets_are_recovered_from_the_hosts_files() -> None:
    text = "LOG_LEVEL='INFO'\nSECRET_KEY='a-b_c'\nDB_PASSWORD='it'\\''s'\nREDIS_PASSWORD=''\n"
    assert kit_secrets.recover("api.env", text) == {
        "kit_secret_dify_secret_key": "a-b_c",
        "kit_secret_postgres": "it's",
    }


def test_all_but_the_admin_password_can_be_recovered() -> None:
    recoverable = {name for names in kit_secrets.ON_HOST.values() for name in names.values()}
    assert set(kit_secrets.SECRETS) - recoverable == {kit_secrets.ADMIN_PASSWORD}


def test_the_password_of_another_server_is_not_recovered_as_the_kits() -> None:
    text = "DB_HOST='db.example.com'\nDB_PASSWORD='theirs'\nREDIS_HOST='127.0.0.1'\nREDIS_PASSWORD='ours'\n"
    assert kit_secrets.recover("api.env", text) == {"kit_secret_redis": "ours"}
