"""A workflow of all that upstream's containers do for one: knowledge, HTTP, code, a template, a model that sees."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.kit_console import CONSOLE, Console, ConsoleError, Http, Service

KNOWLEDGE = {
    "ports": "The harbour of Gdynia opened in 1926 and its first crane carried coal.",
    "cooking": "Dumplings are boiled until they float, then fried in butter with onions.",
}
QUESTION = "When did the harbour of Gdynia open?"
SEEN = "harbour of Gdynia opened in 1926"
PYTHON = """
import hashlib
def main(found: str, fetched: str) -> dict:
    return {"digest": hashlib.sha256((found + fetched).encode()).hexdigest()[:12]}
"""
JAVASCRIPT = """
function main({digest}) {
  return {letters: digest.split('').reverse().join('')}
}
"""
TEMPLATE = "{% for text in texts %}{{ text.content }};{% endfor %} {{ fetched | upper }} {{ letters }}"


def address() -> str:
    """This machine's own address that is not loopback, where others would be reached; empty without one.

    It leaves out links that are down, and IPv6.
    """
    links = json.loads(subprocess.run(["ip", "-j", "-4", "address"], capture_output=True, text=True, check=True).stdout)
    found = [entry["local"] for link in links for entry in link["addr_info"] if entry["scope"] == "global"]
    return found[0] if found else ""


class Greeting(http.server.BaseHTTPRequestHandler):
    """What an HTTP node of a workflow asks."""

    def do_GET(self) -> None:
        body = b"hello from beside"
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: who asked is seen in the answer."""


@contextlib.contextmanager
def greeting(host: str) -> Iterator[str]:
    """A web server at an address of this machine; its URL."""
    with http.server.ThreadingHTTPServer((host, 0), Greeting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{host}:{server.server_port}/"
        server.shutdown()


class Workflow:
    """The workflow and its knowledge in a deployed Dify, made by its console as people do."""

    def __init__(self, url: str, email: str, password: str) -> None:
        self.url = url
        self.console = Console(url)
        self.console.login(email, password)
        chosen = self.console.default_model()
        assert chosen, "Dify has no default model"
        app = self.console.import_app(dsl(self._know(), *chosen))
        self.console.request(
            "POST", f"{CONSOLE}/apps/{app}/workflows/publish", {"marked_name": "", "marked_comment": ""}
        )
        self.key = self.console.make_app_key(app)

    def _know(self) -> str:
        """Two documents, searched by keywords: that needs no embedding model; the knowledge's id."""
        key = self.console.request("POST", f"{CONSOLE}/datasets/api-keys")["token"]
        http = Http(self.url)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

        def call(method: str, path: str, body: Any = None) -> Any:
            data = json.dumps(body).encode() if body is not None else None
            with http.open(method, path, data, headers) as response:
                return json.load(response)

        dataset = str(
            call("POST", "/v1/datasets", {"name": f"kit e2e {time.time_ns()}", "indexing_technique": "economy"})["id"]
        )
        for name, text in KNOWLEDGE.items():
            document = {
                "name": name,
                "text": text,
                "indexing_technique": "economy",
                "process_rule": {"mode": "automatic"},
            }
            batch = call("POST", f"/v1/datasets/{dataset}/document/create-by-text", document)["batch"]
            deadline = time.monotonic() + 120
            while True:
                [status] = call("GET", f"/v1/datasets/{dataset}/documents/{batch}/indexing-status")["data"]
                if status["indexing_status"] == "completed":
                    break
                assert status["indexing_status"] != "error", status
                assert time.monotonic() < deadline, f"not indexed: {status}"
                time.sleep(1)
        return dataset

    def run(self, url: str, picture: Path) -> dict[str, Any]:
        """Its outputs for a picture and the page at ``url``.

        Raises:
            ConsoleError: it did not succeed; the message is Dify's, with the node that failed.
        """
        service = Service(self.url, self.key, "kit-e2e")
        file = {"type": "image", "transfer_method": "local_file", "upload_file_id": service.upload(picture)}
        body = {
            "inputs": {"question": QUESTION, "url": url, "picture": file},
            "response_mode": "blocking",
            "user": "kit-e2e",
        }
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        with Http(self.url).open("POST", "/v1/workflows/run", json.dumps(body).encode(), headers, 300) as response:
            said = json.load(response)["data"]
        if said["status"] != "succeeded":
            raise ConsoleError(f"the workflow {said['status']}: {said['error']}", "read the run in Dify", 500)
        # The rest of it are prices and times.
        return {**said["outputs"], "usage": said["outputs"]["usage"]["prompt_tokens"]}

    def expect(self, wanted: dict[str, Any], url: str, picture: Path, within: float) -> float:
        """Waits until its outputs are these; the seconds it took."""
        begun = time.monotonic()
        while True:
            try:
                found: Any = self.run(url, picture)
            except (ConsoleError, OSError) as error:
                found = error
            if found == wanted:
                return time.monotonic() - begun
            assert time.monotonic() - begun < within, f"after {within:.0f} s: {found}, not {wanted}"
            time.sleep(1)


def dsl(dataset: str, provider: str, model: str) -> dict[str, Any]:
    """The app, as Dify exports one."""
    none = {"max_retries": 0, "retry_enabled": False, "retry_interval": 100}
    nodes: dict[str, dict[str, Any]] = {
        "start": {
            "type": "start",
            "variables": [
                {
                    "variable": "question",
                    "label": "question",
                    "type": "text-input",
                    "max_length": 256,
                    "required": True,
                },
                {"variable": "url", "label": "url", "type": "text-input", "max_length": 256, "required": True},
                {
                    "variable": "picture",
                    "label": "picture",
                    "type": "file",
                    "required": True,
                    "allowed_file_types": ["image"],
                    "allowed_file_upload_methods": ["local_file"],
                    "allowed_file_extensions": [],
                },
            ],
        },
        "search": {
            "type": "knowledge-retrieval",
            "query_variable_selector": ["start", "question"],
            "dataset_ids": [dataset],
            "retrieval_mode": "multiple",
            "multiple_retrieval_config": {"top_k": 1, "score_threshold": None, "reranking_enable": False},
        },
        "fetch": {
            "type": "http-request",
            "method": "get",
            "url": "{{#start.url#}}",
            "authorization": {"type": "no-auth", "config": None},
            "headers": "",
            "params": "",
            "body": {"type": "none", "data": []},
            "timeout": {"connect": 10, "read": 30, "write": 30},
            "retry_config": none,
        },
        "python": {
            "type": "code",
            "code_language": "python3",
            "code": PYTHON,
            "variables": [
                {"variable": "found", "value_selector": ["start", "question"]},
                {"variable": "fetched", "value_selector": ["fetch", "body"]},
            ],
            "outputs": {"digest": {"type": "string", "children": None}},
        },
        "javascript": {
            "type": "code",
            "code_language": "javascript",
            "code": JAVASCRIPT,
            "variables": [{"variable": "digest", "value_selector": ["python", "digest"]}],
            "outputs": {"letters": {"type": "string", "children": None}},
        },
        "template": {
            "type": "template-transform",
            "template": TEMPLATE,
            "variables": [
                {"variable": "texts", "value_selector": ["search", "result"]},
                {"variable": "fetched", "value_selector": ["fetch", "body"]},
                {"variable": "letters", "value_selector": ["javascript", "letters"]},
            ],
        },
        "model": {
            "type": "llm",
            "model": {
                "provider": provider,
                "name": model,
                "mode": "chat",
                "completion_params": {"temperature": 0, "max_tokens": 8},
            },
            "prompt_template": [{"role": "user", "text": "{{#template.output#}} {{#start.question#}}"}],
            "context": {"enabled": False, "variable_selector": []},
            "vision": {"enabled": True, "configs": {"variable_selector": ["start", "picture"], "detail": "high"}},
        },
        "end": {
            "type": "end",
            "outputs": [
                {"variable": "text", "value_selector": ["template", "output"], "value_type": "string"},
                {"variable": "answer", "value_selector": ["model", "text"], "value_type": "string"},
                {"variable": "status", "value_selector": ["fetch", "status_code"], "value_type": "number"},
                {"variable": "usage", "value_selector": ["model", "usage"], "value_type": "object"},
            ],
        },
    }
    order = list(nodes)
    return {
        "app": {"name": "kit e2e workflow", "mode": "workflow", "icon_type": "emoji", "icon": "🔧", "description": ""},
        "kind": "app",
        "version": "0.6.0",
        "dependencies": [],
        "workflow": {
            "conversation_variables": [],
            "environment_variables": [],
            "features": {"file_upload": {"enabled": False}, "retriever_resource": {"enabled": False}},
            "graph": {
                "nodes": [
                    {
                        "id": name,
                        "type": "custom",
                        "data": {"title": name, "desc": "", "selected": False, **data},
                        "position": {"x": 80 + 300 * place, "y": 280},
                        "width": 244,
                        "height": 90,
                    }
                    for place, (name, data) in enumerate(nodes.items())
                ],
                "edges": [
                    {
                        "id": f"{one}-{other}",
                        "type": "custom",
                        "source": one,
                        "sourceHandle": "source",
                        "target": other,
                        "targetHandle": "target",
                        "data": {"sourceType": nodes[one]["type"], "targetType": nodes[other]["type"]},
                    }
                    for one, other in itertools.pairwise(order)
                ],
            },
        },
    }
