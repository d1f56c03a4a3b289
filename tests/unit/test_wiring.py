"""What one role's variables become in another: deploy/group_vars/all.yml and the roles' vars, rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.module_utils import kit_dify

ROOT = Path(__file__).resolve().parents[2]
WIRING: dict[str, Any] = yaml.safe_load((ROOT / "deploy/group_vars/all.yml").read_text())
INFERENCE: dict[str, Any] = yaml.safe_load((ROOT / "roles/inference/vars/main.yml").read_text())


def render(template: str, **variables: Any) -> str:
    """As Ansible would, for templates of plain Jinja."""
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(template).render(variables)


@pytest.mark.parametrize(
    ("bind", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("10.0.0.5", "10.0.0.5"),
        ("::", "[::1]"),
        ("fd00::5", "[fd00::5]"),
    ],
)
def test_dify_asks_the_model_where_it_listens(bind: str, host: str) -> None:
    url = render(INFERENCE["inference_url"], inference_bind=bind, inference_port=18007)
    assert url == f"http://{host}:18007/v1"
    endpoint = WIRING["provider_endpoint"]
    assert render(endpoint, inference_endpoint="kit", inference_url=url) == url
    assert render(endpoint, inference_endpoint="external", inference_url=url) == ""


def test_without_dify_none_of_its_services_stays() -> None:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters["regex_replace"] = lambda value, _, prefix: f"{prefix}{value}"

    def value(name: str, **variables: object) -> Any:
        template = WIRING[name].strip().removeprefix("{{").removesuffix("}}")
        return environment.compile_expression(template)(**variables)

    services = value("dify_source_all_services")
    assert {"websocket", "agent-backend", "agent-runtime", *kit_dify.RUNNERS} <= set(services)
    own: dict[str, Any] = {"inference_endpoint": "kit", "postgres_source": "wheel", "redis_source": "system"}
    own |= {"dify_source_all_services": services, "dify_compose_take_over": {}}
    assert value("services_unwanted", dify_mode="skip", **own) == services
    assert value("services_unwanted", dify_mode="source", **own) == []
    assert value("services_unwanted", dify_mode="compose", **own) == [*services, "postgres", "redis"]
    # Until the containers have their data, they run.
    moving = own | {"dify_compose_take_over": {"databases": ["dify"]}}
    assert value("services_unwanted", dify_mode="compose", **moving) == []
    elsewhere = own | {"postgres_source": "external", "redis_source": "external"}
    assert value("services_unwanted", dify_mode="source", **elsewhere) == ["postgres", "redis"]


def test_the_kits_key_is_never_shown_to_another_server() -> None:
    key = WIRING["provider_api_key"]
    assert render(key, inference_endpoint="kit", inference_api_key="secret") == "secret"
    assert render(key, inference_endpoint="external", inference_api_key="secret") == ""


@pytest.mark.parametrize(("part", "variable"), [("postgres", "postgres_password"), ("redis", "redis_password")])
def test_the_generated_passwords_are_never_shown_to_another_server(part: str, variable: str) -> None:
    def password(source: str) -> str:
        return render(WIRING[variable], **{f"{part}_source": source, f"kit_secret_{part}": "secret"})

    assert password("wheel") == password("system") == "secret"
    assert password("external") == ""


def test_the_generated_password_of_the_superuser_is_the_kits_own_alone() -> None:
    names = [name for name, value in WIRING.items() if "kit_secret_postgres_admin" in str(value)]
    assert names == ["postgres_admin_password"]
