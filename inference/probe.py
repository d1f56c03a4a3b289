"""Whether an OpenAI-compatible endpoint answers. Standard library only: it is asked often while a service starts."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from inference.problem import Problem

QUESTION = "Say hello."
PAUSE_SECONDS = 0.5


class Silent(Problem):
    """Nobody listens: the only problem that goes away by waiting."""


def ready(url: str, model: str, wait: float = 0, timeout: float = 60) -> str:
    """Ask one real question with the key from VLLM_API_KEY; returns a line that says so.

    Args:
        url: the endpoint with its /v1.
        model: the name under which the model is served.
        wait: seconds to wait for a server that does not listen yet. Waiting here costs nothing, while starting this
            program again and again would take the processor from the very server that it waits for.
        timeout: seconds for the answer.

    Raises:
        Problem: no answer, with its reason.
    """
    end = time.monotonic() + wait
    while True:
        try:
            return _ask(url, model, timeout)
        except Silent:
            if time.monotonic() + PAUSE_SECONDS > end:
                raise
            time.sleep(PAUSE_SECONDS)


def _ask(url: str, model: str, timeout: float) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 8,
        "temperature": 0,
    }
    begin = time.monotonic()
    answer = post(f"{url}/chat/completions", body, timeout)
    try:
        text, tokens = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
    except (KeyError, IndexError, TypeError):
        raise Problem(
            f"{url} answered, but not in the way of OpenAI's API: {json.dumps(answer)[:300]}. "
            "Remedy: name the address of an OpenAI-compatible server, with its /v1."
        ) from None
    if not (text or "").strip() or not tokens:
        raise Problem(f"{model} at {url} gave an empty answer. Remedy: read `make logs SERVICE=inference`.")
    return f"{model} answered {text.strip()!r} in {time.monotonic() - begin:.1f} s"


def post(url: str, body: dict[str, Any], timeout: float) -> Any:
    """The answer to a JSON body, with the key from VLLM_API_KEY.

    Raises:
        Problem: no answer, with its reason; `Silent` where nobody listens.
    """
    request = urllib.request.Request(
        url,
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '')}"},
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace")
        remedy = {
            401: "the key is not the one the service was started with: run `make deploy`",
            404: "check inference_model, and that the address ends in /v1",
        }.get(error.code, "read `make logs SERVICE=inference`")
        raise Problem(f"{url} said {error.code}: {said}. Remedy: {remedy}.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionRefusedError):
            raise Silent(f"Nobody listens at {url}. Remedy: `make restart SERVICE=inference`, then its log.") from None
        raise Problem(f"{url} does not answer: {reason}. Remedy: read `make logs SERVICE=inference`.") from None
