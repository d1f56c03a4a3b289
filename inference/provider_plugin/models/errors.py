"""A model server's refusals as the SDK's errors, each saying what to do: Dify shows the text to whoever asked."""

import json
import re

import requests
from dify_plugin.errors.model import (
    InvokeAuthorizationError,
    InvokeBadRequestError,
    InvokeConnectionError,
    InvokeError,
    InvokeRateLimitError,
    InvokeServerUnavailableError,
)

# How the SDK's base class words a refusal; it keeps the status nowhere else.
_REFUSAL = re.compile(r"API request failed with status code (\d{3}): (.*)", re.DOTALL)


def explained(error: Exception, endpoint: str, seconds: float) -> InvokeError:
    """`error` of a request to `endpoint`, which was given up after `seconds`, as what it means for people."""
    if isinstance(error, InvokeError) and (refusal := _REFUSAL.match(str(error))):
        return refused(int(refusal[1]), refusal[2], endpoint)
    if isinstance(error, InvokeError):
        return error
    if isinstance(error, requests.ReadTimeout):
        return InvokeConnectionError(
            f"{endpoint} gave no answer for {seconds:.0f} s. Ask for a shorter answer, or again when fewer people ask."
        )
    if isinstance(error, (requests.exceptions.ChunkedEncodingError, requests.ConnectionError)):
        return InvokeConnectionError(
            f"The connection to {endpoint} failed: {innermost(error)}. Ask again in a minute; if that doesn't help, "
            "the model server's log says why it stopped (`make logs SERVICE=inference` for the kit's own)."
        )
    # What a server says in the middle of a stream reaches us as the SDK's ValueError.
    said = words(json.dumps(error.args[0] if error.args else "no reason"))
    return InvokeServerUnavailableError(f"{endpoint} broke off its answer: {said}. The model server's log has more.")


def refused(status: int, body: str, endpoint: str) -> InvokeError:
    """A refusal with HTTP's `status` and what was said with it."""
    said = words(body)
    if status in (401, 403):
        return InvokeAuthorizationError(
            f"{endpoint} refuses the API key ({status}). Enter the server's key in Settings, Model Provider; "
            "`make deploy` does it for the kit's own server."
        )
    if status == 404:
        return InvokeBadRequestError(
            f"{endpoint} does not know the model (404: {said}). Choose a model that it serves; `make deploy` "
            "registers the kit's own."
        )
    if status == 429:
        return InvokeRateLimitError(f"{endpoint} has too many requests at the moment (429: {said}). Ask again later.")
    if status >= 500:
        return InvokeServerUnavailableError(
            f"{endpoint} failed ({status}: {said}). Ask again; if it happens again, read the model server's log "
            "(`make logs SERVICE=inference` for the kit's own)."
        )
    if "maximum context length" in said or "context_length_exceeded" in body:
        advice = "Begin a new conversation, ask for a shorter answer (Max Tokens), or send less text or fewer images."
    elif status == 413:
        advice = "Send a smaller image or a shorter text."
    else:
        advice = "Change the question, or the model's parameters in the app."
    return InvokeBadRequestError(f"The model's server refuses the question ({status}): {said} {advice}")


def words(body: str) -> str:
    """What a server says went wrong, out of the several forms of JSON that servers say it in; at most 500 characters.

    >>> words('{"error": {"message": "Too long.", "code": 400}}')
    'Too long.'
    """
    said: object = body
    try:
        said = json.loads(body)
        while isinstance(said, dict):
            said = next(said[key] for key in ("error", "message", "detail") if key in said)
    except (ValueError, StopIteration):
        said = body
    return " ".join(str(said).split())[:500]


def innermost(error: BaseException) -> str:
    """The reason of a requests error, which wraps it several times over."""
    return str(getattr(error.args[0] if error.args else error, "reason", error)).rpartition(": ")[2]
