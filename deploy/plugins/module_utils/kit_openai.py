"""The models that an OpenAI-compatible server serves. Standard library only: it runs on the hosts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ansible.module_utils.kit_console import ConsoleError, Http


@dataclass(frozen=True)
class Served:
    """A model by the name to ask for it; `context` in tokens, None where the server doesn't tell."""

    name: str
    context: int | None


def served_models(endpoint: str, api_key: str, ca_file: str | None = None) -> list[Served]:
    """What `GET <endpoint>/models` lists. Raises ConsoleError with the way out."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with Http(endpoint, ca_file).open("GET", "/models", headers=headers, seconds=30) as response:
            said: Any = json.load(response)
        return [Served(str(entry["id"]), int(entry.get("max_model_len") or 0) or None) for entry in said["data"]]
    except ConsoleError as error:
        if error.status in (401, 403):
            remedy = "set provider_api_key to the server's key; the kit's own is kit_secret_inference_api_key."
        elif error.status:
            remedy = "provider_endpoint must be an OpenAI-compatible server's address, usually ending in /v1."
        else:
            remedy = "start the server (`make logs SERVICE=inference` for the kit's own), or correct provider_endpoint."
        raise ConsoleError(f"No model at {endpoint}: {error.what}", remedy, error.status) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConsoleError(
            f"{endpoint}/models gives no list of models ({error}).",
            "provider_endpoint must be an OpenAI-compatible server's address, usually ending in /v1.",
        ) from None


def choose(models: list[Served], name: str, endpoint: str) -> Served:
    """The model of this name; an empty name means the only (or first) one."""
    if not name and models:
        return models[0]
    for model in models:
        if model.name == name:
            return model
    listed = ", ".join(model.name for model in models) or "nothing"
    raise ConsoleError(f"{endpoint} does not serve {name!r} but {listed}.", "set provider_model to what it serves.")
