"""What an OpenAI-compatible server says about a model: context size, images, tools.

Most servers' lists of models (`GET /v1/models`) tell the context size. What a model accepts is in no list, so it is
tried with one-token requests: a server that cannot read images, so many of them, or tools refuses (400).
"""

import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import requests

# (connect, read) in seconds. A trial may wait behind other requests of a busy server.
LIST_TIMEOUT = (5, 15)
TRIAL_TIMEOUT = (5, 120)
# These say nothing about the model.
BUSY = (408, 429, 502, 503, 504)
# How long an answer counts without reading the list again, and without trying again, in seconds.
FRESH_SECONDS, TRIED_SECONDS = 300.0, 3600.0
# The context size's name in the lists of vLLM and SGLang, OpenRouter and Together, Groq, Mistral.
CONTEXT_NAMES = ("max_model_len", "context_length", "context_window", "max_context_length")
# As many as Dify lets people send with one question unless its settings are changed.
MOST_IMAGES = 10
# A grey square of 56 x 56 pixels: the smallest side that Kimi-VL, Qwen-VL and their kind take is 28.
SQUARE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADgAAAA4CAAAAACN7WTCAAAAJElEQVR42u3LMQ0AAAwDoEqv9FpYdsNP+hRR"
    "FEVRFEVRFMWbAclXIFtsqkldAAAAAElFTkSuQmCC"
)
TOOL = {
    "type": "function",
    "function": {"name": "noop", "description": "Does nothing.", "parameters": {"type": "object", "properties": {}}},
}


class ServerProblem(Exception):
    """The server cannot be used as it is; the text says why and what to do, `status` is HTTP's (0: no answer)."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Facts:
    """What a server says about one of its models. `context` is None where the server doesn't tell (tokens).

    `images`: how many it takes with one question, as far as Dify can send them; 0 where the model doesn't see.
    """

    context: int | None
    images: int
    tools: bool
    weights: str = ""


class Server:
    """An OpenAI-compatible server at `endpoint`, with or without `/v1` at its end."""

    # Answers of this process by endpoint, key and model, and those of earlier ones: a model is not gone from Dify's
    # lists because its server is starting. The file lies in the plugin's folder, which outlives the process.
    _known: ClassVar[dict[tuple[str, str, str], tuple[float, float, Facts]]] = {}
    memory: ClassVar[Path] = Path("learnt.json")

    def __init__(self, endpoint: str, api_key: str = "") -> None:
        endpoint = endpoint.strip().rstrip("/")
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ServerProblem(f"The endpoint {endpoint!r} is no http(s) address. Write it like http://host:8000/v1.")
        self.endpoint = endpoint if parts.path else f"{endpoint}/v1"
        self.api_key = (api_key or "").strip()

    def facts(self, model: str, *, anew: bool = False) -> Facts:
        """What the server says about `model`; `anew` tries everything again.

        Raises ServerProblem where the server doesn't answer and never did, refuses the key or lacks the model.
        """
        key = (self.endpoint, self.api_key, model)
        asked, tried, known = self._known.get(key, (0.0, 0.0, None))
        if known and not anew and time.monotonic() - asked < FRESH_SECONDS:
            return known
        try:
            context, weights = self._listed(model)
            if known and not anew and known.weights == weights and time.monotonic() - tried < TRIED_SECONDS:
                facts = Facts(context, known.images, known.tools, weights)
            else:
                tools = self._refusal(model, tools=[TOOL], tool_choice="auto") is None
                facts = Facts(context, self._images(model), tools, weights)
                tried = time.monotonic()
        except requests.RequestException as error:
            remembered = known or self._recall(model)
            if anew or remembered is None:
                # requests wraps the reason several times over; people need the innermost.
                reason = str(getattr(error.args[0] if error.args else error, "reason", error)).rpartition(": ")[2]
                if isinstance(error, requests.HTTPError):
                    reason = f"it says {error.response.status_code} {error.response.reason}"
                raise ServerProblem(
                    f"{self.endpoint} does not answer: {reason}. Start the model server, or correct the endpoint."
                ) from error
            return remembered
        self._known[key] = (time.monotonic(), tried, facts)
        self._remember(model, facts)
        return facts

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def _listed(self, model: str) -> tuple[int | None, str]:
        """Context size and weights of `model` as `GET /v1/models` has them."""
        response = requests.get(f"{self.endpoint}/models", headers=self._headers(), timeout=LIST_TIMEOUT)
        status = response.status_code
        if status in (401, 403):
            raise ServerProblem(f"{self.endpoint} refuses the API key (status {status}). Enter its key.", status)
        if status in BUSY:
            response.raise_for_status()
        try:
            response.raise_for_status()
            entries = {str(entry["id"]): entry for entry in response.json()["data"]}
        except (requests.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ServerProblem(
                f"{self.endpoint}/models gives no list of models (status {status}: {response.text[:200]!r}). "
                "The endpoint must be an OpenAI-compatible server's, usually ending in /v1.",
                status,
            ) from error
        if model not in entries:
            served = ", ".join(entries) or "none"
            raise ServerProblem(f"{self.endpoint} does not serve {model!r}. It serves: {served}.", 404)
        entry = entries[model]
        context = next((int(entry[name]) for name in CONTEXT_NAMES if entry.get(name)), None)
        return context, str(entry.get("root") or "")

    def _images(self, model: str) -> int:
        """How many images one question may hold: as many as are served, beginning with the most that Dify sends."""
        count = MOST_IMAGES
        while count:
            refusal = self._refusal(model, images=count)
            if refusal is None:
                return count
            # vLLM tells its limit; other refusals may be about the context or about seeing at all.
            told = re.search(r"at most (\d+) image", refusal, re.IGNORECASE)
            count = min(int(told[1]), count - 1) if told else count // 2
        return 0

    def _refusal(self, model: str, images: int = 0, **options: Any) -> str | None:
        """Why a one-token request with so many images and these options is refused; None where it is served."""
        picture = {"type": "image_url", "image_url": {"url": SQUARE}}
        content = [picture] * images + [{"type": "text", "text": "ping"}] if images else "ping"
        body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": content}], **options}
        url = f"{self.endpoint}/chat/completions"
        response = requests.post(url, json=body, headers=self._headers(), timeout=TRIAL_TIMEOUT)
        if response.status_code in BUSY:
            response.raise_for_status()
        return None if response.ok else response.text

    def _recall(self, model: str) -> Facts | None:
        try:
            return Facts(**json.loads(self.memory.read_text())[self._id(model)])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self, model: str, facts: Facts) -> None:
        try:
            known = json.loads(self.memory.read_text())
        except (OSError, ValueError):
            known = {}
        if known.get(self._id(model)) != asdict(facts):
            known[self._id(model)] = asdict(facts)
            self.memory.write_text(json.dumps(known, indent=1))

    def _id(self, model: str) -> str:
        return hashlib.sha256(f"{self.endpoint}\n{model}".encode()).hexdigest()
