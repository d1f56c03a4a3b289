"""What an OpenAI-compatible server serves and what its models can do. Standard library only: it runs on the hosts.

The provider plugin (inference/provider_plugin/models/server.py) asks the same questions for whoever configures a model
by hand; the kit asks them itself, so that a changed server is seen at once and other providers can be told, too.
"""

from __future__ import annotations

import base64
import json
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.kit_console import ConsoleError, Http

# A trial may wait behind other requests of a busy server.
LIST_SECONDS, TRIAL_SECONDS = 30.0, 300.0
# The context size's name in the lists of vLLM and SGLang, OpenRouter and Together, Groq, Mistral.
CONTEXT_NAMES = ("max_model_len", "context_length", "context_window", "max_context_length")
# As many images as Dify lets people send with one question unless its settings are changed.
MOST_IMAGES = 10
# A grey square of 56 x 56 pixels: the smallest side that Kimi-VL, Qwen-VL and their kind take is 28.
SQUARE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADgAAAA4CAAAAACN7WTCAAAAJElEQVR42u3LMQ0AAAwDoEqv9FpYdsNP+hRR"
    "FEVRFEVRFMWbAclXIFtsqkldAAAAAElFTkSuQmCC"
)
# By which a model begins to think, where its server doesn't keep thoughts apart; and how many tokens show it.
THOUGHTS, FIRST_TOKENS = ("<think>", "◁think▷"), 8
TOOL = {
    "type": "function",
    "function": {"name": "noop", "description": "Does nothing.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class Served:
    """A model by the name to ask for it.

    `context` in tokens, None where the server doesn't tell; `images`: how many it takes with one question as far as
    Dify can send them, 0 where it doesn't see; `tools`: whether it can be told to call them; `reasons`: whether it
    begins its answers by thinking.
    """

    name: str
    context: int | None
    images: int = 0
    tools: bool = False
    reasons: bool = False


class Endpoint:
    """An OpenAI-compatible server at `url` (with its /v1).

    The kit's own is reached directly; one that is `external`, through the proxies of the environment.
    """

    def __init__(self, url: str, api_key: str, ca_file: str | None = None, *, external: bool = False) -> None:
        self.url = url.rstrip("/")
        self.external = external
        self._http = Http(self.url, ca_file, proxies=urllib.request.getproxies() if external else {})
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def models(self) -> list[Served]:
        """What `GET <url>/models` lists. Raises ConsoleError with the way out."""
        try:
            with self._http.open("GET", "/models", headers=self._headers, seconds=LIST_SECONDS) as response:
                said: Any = json.load(response)
            return [Served(str(entry["id"]), self._context(entry)) for entry in said["data"]]
        except ConsoleError as error:
            raise self._explained(error) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConsoleError(
                f"{self.url}/models gives no list of models ({error}).",
                "provider_endpoint must be an OpenAI-compatible server's address, usually ending in /v1.",
            ) from None

    def model(self, name: str) -> Served:
        """The model of this name with what it can do; an empty name means the only (or first) one."""
        found = choose(self.models(), name, self.url)
        plain = {"content": "ping", "max_tokens": FIRST_TOKENS}
        said, refusal = self._tried(found.name, **plain, tools=[TOOL], tool_choice="auto")
        tools = refusal is None
        if not tools:
            said, refusal = self._tried(found.name, **plain)
        if refusal:
            raise ConsoleError(
                f"{found.name} at {self.url} refuses even a short question: {refusal}",
                "it must be a model for chat; `make logs SERVICE=inference` has more about the kit's own.",
            )
        message = (said.get("choices") or [{}])[0].get("message") or {}
        text = str(message.get("content") or "").lstrip()
        reasons = bool(message.get("reasoning_content") or message.get("reasoning")) or text.startswith(THOUGHTS)
        return Served(found.name, found.context, self._images(found.name), tools, reasons)

    def ask(self, model: str, question: str, image: Path | None = None, tokens: int = 1) -> tuple[str, int]:
        """A real answer of at most so many tokens, and how many tokens the question was, as the engine counted."""
        content: str | list[dict[str, Any]] = question
        if image:
            data = base64.b64encode(image.read_bytes()).decode()
            content = [_image(f"data:image/png;base64,{data}"), {"type": "text", "text": question}]
        try:
            said = self._complete(model, content, max_tokens=tokens)
            message = said["choices"][0]["message"]
            # A server that keeps reasoning apart may have got no further than that.
            text = message.get("content") or message.get("reasoning_content") or message.get("reasoning") or ""
            return str(text), int((said.get("usage") or {}).get("prompt_tokens") or 0)
        except ConsoleError as error:
            raise self._explained(error) from None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConsoleError(
                f"{self.url}/chat/completions gives no answer that can be read ({type(error).__name__}: {error}).",
                "provider_endpoint must be an OpenAI-compatible server's address, usually ending in /v1.",
            ) from None

    def _images(self, model: str) -> int:
        """As many as are served, beginning with the most that Dify sends."""
        count = MOST_IMAGES
        while count:
            content = [*[_image(SQUARE)] * count, {"type": "text", "text": "ping"}]
            _, refusal = self._tried(model, content, max_tokens=1)
            if refusal is None:
                return count
            # vLLM tells its limit; other refusals may be about the context or about seeing at all.
            told = re.search(r"at most (\d+) image", refusal, re.IGNORECASE)
            count = min(int(told[1]), count - 1) if told else count // 2
        return 0

    def _tried(self, model: str, content: Any, **options: Any) -> tuple[dict[str, Any], str | None]:
        """The answer to a request, or why it is refused. Raises ConsoleError where the server does neither."""
        try:
            said: dict[str, Any] = self._complete(model, content, **options)
        except ConsoleError as error:
            if error.status in (0, 401, 403, 408, 429, 502, 503, 504):  # these say nothing about the model
                raise self._explained(error) from None
            return {}, str(error.what)
        except ValueError as error:
            raise ConsoleError(
                f"{self.url}/chat/completions gives no answer that can be read ({error}).",
                "provider_endpoint must be an OpenAI-compatible server's address, usually ending in /v1.",
            ) from None
        return said, None

    def _complete(self, model: str, content: Any, **options: Any) -> Any:
        body = {"model": model, "messages": [{"role": "user", "content": content}], **options}
        headers = {**self._headers, "Content-Type": "application/json"}
        data = json.dumps(body).encode()
        with self._http.open("POST", "/chat/completions", data, headers, TRIAL_SECONDS) as response:
            return json.load(response)

    @staticmethod
    def _context(entry: dict[str, Any]) -> int | None:
        return next((int(entry[name]) for name in CONTEXT_NAMES if entry.get(name)), None)

    def _explained(self, error: ConsoleError) -> ConsoleError:
        if error.status in (401, 403):
            remedy = "set provider_api_key, in the site's secrets.yml, to the server's key."
            if not self.external:
                remedy = "its key is kit_secret_inference_api_key: `make deploy` sets it on both sides."
        elif error.status in (408, 429, 502, 503, 504):
            remedy = "the server is starting or has too much to do: run `make deploy` again in a minute."
        elif error.status:
            remedy = "provider_endpoint must be an OpenAI-compatible server's address, usually ending in /v1."
        else:
            host = urlsplit(self.url).hostname
            remedy = "`make logs SERVICE=inference` says why it does not run."
            if self.external:
                remedy = f"start it, or correct provider_endpoint; the host that runs Dify must reach {host}."
        return ConsoleError(f"No model at {self.url}: {error.what}", remedy, error.status)


def choose(models: list[Served], name: str, endpoint: str) -> Served:
    """The model of this name; an empty name means the only (or first) one."""
    if not name and models:
        return models[0]
    for model in models:
        if model.name == name:
            return model
    listed = ", ".join(model.name for model in models) or "nothing"
    raise ConsoleError(f"{endpoint} does not serve {name!r} but {listed}.", "set provider_model to what it serves.")


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}
