"""What is said of vector stores that the kit does not run, and of data that a changed setting would leave behind."""

from __future__ import annotations

import datetime
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from ansible.module_utils import kit_external, kit_wire

KEY = "vector-key"


class Answering(http.server.BaseHTTPRequestHandler):
    """Says to GET what Qdrant 1.15 and Weaviate 1.27 say, to whoever has the key."""

    said: ClassVar = {
        "/collections": {"result": {"collections": []}, "status": "ok", "time": 1e-05},
        "/v1/meta": {"hostname": "http://[::]:8080", "modules": {}, "version": "1.27.0"},
        "/old/v1/meta": {"version": "1.19.6"},
    }

    def do_GET(self) -> None:
        allowed = KEY in (
            self.headers.get("api-key"),
            (self.headers.get("Authorization") or "").removeprefix("Bearer "),
        )
        status = 401 if not allowed else 200 if self.path in self.said else 404
        body = json.dumps(self.said.get(self.path, {})).encode() if status == 200 else b"no"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "qdrant"}, ""),
        ({"kind": "weaviate"}, ""),
        ({"kind": "qdrant", "api_key": "wrong"}, "Qdrant refuses the site's key (status 401)."),
        ({"kind": "weaviate", "api_key": ""}, "Weaviate refuses the site's key (status 401)."),
        ({"kind": "weaviate", "path": "/old"}, "The server is Weaviate 1.19.6; Dify's client needs 1.27."),
        (
            {"kind": "weaviate", "grpc": "grpc://127.0.0.1:9"},
            "Weaviate's port for gRPC cannot be reached at 127.0.0.1:9",
        ),
        ({"kind": "qdrant", "path": "/elsewhere"}, "What answers there (status 404) is no Qdrant."),
        ({"kind": "qdrant", "url": "http://127.0.0.1:9"}, "Qdrant cannot be reached at http://127.0.0.1:9"),
    ],
)
def test_a_vector_store_is_asked(url: str, changes: dict[str, str], expected: str) -> None:
    server: dict[str, Any] = {
        "url": url + changes.get("path", ""),
        "api_key": KEY,
        "ca_file": "",
        "environment": {},
        "grpc": url.removeprefix("http://"),
    }
    found = kit_external.examine({"vector": {**server, **changes}}).problems
    assert [problem.what.startswith(expected) and bool(problem.remedy) for problem in found] == [True] * bool(expected)


@pytest.mark.parametrize(
    ("url", "grpc", "address"),
    [
        ("http://store:8080", "", ("store", 50051)),
        ("https://store", "", ("store", 443)),
        ("http://store:8080", "other", ("other", 50051)),
        ("http://store:8080", "grpcs://other", ("other", 443)),
        ("http://store:8080", "other:7", ("other", 7)),
    ],
)
def test_where_difys_client_looks_for_grpc(url: str, grpc: str, address: tuple[str, int]) -> None:
    """As WeaviateVector of release 1.16.0 reads both settings."""
    assert kit_external.grpc_address(url, grpc) == address


def test_a_port_behind_a_proxy_is_not_knocked_at(url: str) -> None:
    server = {"kind": "weaviate", "url": url, "api_key": KEY, "ca_file": "", "grpc": "grpc://127.0.0.1:9"}
    environment = {"http_proxy": url, "no_proxy": ""}
    kit_external._check_weaviate_grpc({**server, "environment": environment}, found := kit_external.Answers())
    assert found.problems == []


OWN = {"host": "127.0.0.1", "port": 5, "database": "dify"}
THERE = {"host": "db", "port": 5432, "database": "dify"}
FILES, BUCKET = {"kind": "fs"}, {"kind": "s3", "bucket": "b"}
BEFORE_OWN = {"DB_HOST": "127.0.0.1", "DB_PORT": "5", "DB_DATABASE": "dify", "STORAGE_TYPE": "opendal"}
BEFORE_THERE = {**BEFORE_OWN, "DB_HOST": "db", "DB_PORT": "5432", "STORAGE_TYPE": "s3", "S3_BUCKET_NAME": "b"}


@pytest.mark.parametrize(
    ("before", "postgres", "storage", "moved"),
    [
        ({}, THERE, BUCKET, []),
        (BEFORE_OWN, OWN, FILES, []),
        (BEFORE_OWN, {**OWN, "port": 7}, FILES, []),  # another kit_port_base
        (BEFORE_OWN, THERE, FILES, ["postgres"]),
        (BEFORE_OWN, OWN, BUCKET, ["storage"]),
        (BEFORE_THERE, THERE, BUCKET, []),
        (BEFORE_THERE, {**THERE, "port": 5433}, BUCKET, ["postgres"]),
        (BEFORE_THERE, OWN, FILES, ["postgres", "storage"]),
        (BEFORE_THERE, THERE, {**BUCKET, "bucket": "c"}, ["storage"]),
        ({**BEFORE_OWN, "STORAGE_TYPE": "azure-blob"}, OWN, FILES, []),  # the site's own business
    ],
)
def test_what_a_setting_would_leave_behind(
    before: dict[str, str], postgres: dict[str, Any], storage: dict[str, str], moved: list[str]
) -> None:
    wanted = {"postgres": postgres, "storage": storage, "external": postgres["host"] == "db"}
    assert list(kit_external.moves(before, "/home", wanted)) == moved


def test_a_signature_is_aws_own_example() -> None:
    """A listing of AWS' documentation, "Signature Calculations: Transferring Payload in a Single Chunk"."""
    server = {
        "endpoint": "https://s3.amazonaws.com",
        "region": "us-east-1",
        "bucket": "examplebucket",
        "access_key": "AKIAIOSFODNN7EXAMPLE",
        "secret_key": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "address_style": "virtual",
    }
    then = datetime.datetime(2013, 5, 24, tzinfo=datetime.timezone.utc)
    request = kit_wire.signed(server, {"max-keys": "2", "prefix": "J"}, then)
    assert request.full_url == "https://examplebucket.s3.amazonaws.com/?max-keys=2&prefix=J"
    authorization = str(request.get_header("Authorization"))
    assert authorization.endswith("Signature=34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7")
