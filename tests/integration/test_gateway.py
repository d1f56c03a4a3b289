"""The gateway's configuration in a real Caddy, before stand-ins for Dify's processes."""

from __future__ import annotations

import http.client
import http.server
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dashboard
import pytest
import yaml
from ansible.module_utils import kit_gateway
from jinja2 import Environment

from .conftest import REPO, Home, missing

ROLE = REPO / "roles" / "gateway"


class Upstream:
    """A process of Dify as the gateway sees it: says who it is, and can stream."""

    def __init__(self, name: str) -> None:
        self.connections = 0
        self.client_left = threading.Event()
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                upstream.connections += 1
                super().setup()

            def do_GET(self) -> None:
                if self.path.startswith("/v1/stream"):
                    return self.stream()
                return self.reply(dict(self.headers))

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                received = 0
                while received < length and (chunk := self.rfile.read(min(1 << 20, length - received))):
                    received += len(chunk)
                self.reply({"received": received})

            def reply(self, value: dict[str, Any]) -> None:
                body = json.dumps({"who": name, "path": self.path, **value}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    for number in range(100):
                        self.wfile.write(f"data: {number} {time.time()}\n\n".encode())
                        time.sleep(0.1)
                except OSError:
                    upstream.client_left.set()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Gateway:
    """A running Caddy with the role's template and defaults."""

    def __init__(self, home: Home, **settings: Any) -> None:
        with socket.socket() as sock, socket.socket() as other:
            sock.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, self.metrics_port = int(sock.getsockname()[1]), int(other.getsockname()[1])
        variables = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
        variables |= {"kit_home": str(home.root), "gateway_port": self.port, "gateway_metrics_port": self.metrics_port}
        variables |= settings
        self.file = home.root / "etc" / "Caddyfile"
        self.file.write_text(render(variables))
        self.log = home.root / "var" / "log" / "gateway.log"
        caddy = next(Path(home.python).parents[1].rglob("scripts/caddy"))
        self.command = [str(home.root / "runtime/bin/kit-exec"), f"XDG_DATA_HOME={home.root}", "--", str(caddy)]

    def validate(self) -> subprocess.CompletedProcess[str]:
        arguments = ["validate", "--adapter", "caddyfile", "--config", str(self.file)]
        return subprocess.run([*self.command, *arguments], capture_output=True, text=True)

    def __enter__(self) -> Gateway:
        arguments = ["run", "--adapter", "caddyfile", "--config", str(self.file)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*self.command, *arguments], stdout=log, stderr=log)
        end = time.monotonic() + 30
        while True:
            try:
                if self.get("/healthz")[0] == 200:
                    return self
            except OSError:
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def ask(self, path: str, **headers: str) -> dict[str, Any]:
        status, text = self.get(path, **headers)
        assert status == 200, text
        result: dict[str, Any] = json.loads(text)
        return result


def render(variables: dict[str, Any]) -> str:
    """As ansible.builtin.template: trim_blocks, and the filters that the template uses."""
    environment = Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"bool": bool, "kit_listen": kit_gateway.listen}
    variables |= {"gateway_host": urlsplit(variables["gateway_public_url"]).hostname}
    return environment.from_string((ROLE / "templates/Caddyfile.j2").read_text()).render(variables)


@pytest.fixture
def dify() -> Iterator[dict[str, Upstream]]:
    upstreams = {name: Upstream(name) for name in ("api", "websocket", "web", "plugin_daemon")}
    yield upstreams
    for upstream in upstreams.values():
        upstream.server.shutdown()
        upstream.server.server_close()


@pytest.fixture
def gateway(home: Home, dify: dict[str, Upstream]) -> Iterator[Gateway]:
    with Gateway(home, **{f"gateway_{name}": upstream.address for name, upstream in dify.items()}) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "who"),
    [
        *((path, "api") for path in ("/console/api/setup", "/api/site", "/v1/chat-messages", "/files/x/preview")),
        *((path, "api") for path in ("/mcp/server/x", "/triggers/plugin/x", "/openapi/v1/x", "/v1")),
        ("/socket.io/?EIO=4", "websocket"),
        *(
            (path, "web")
            for path in ("/", "/signin", "/apps", "/explore/apps", "/_next/static/x.js", "/apiary", "/env")
        ),
        ("/e/hook-id/path?a=1", "plugin_daemon"),
    ],
)
def test_routes(gateway: Gateway, path: str, who: str) -> None:
    answer = gateway.ask(path)
    assert (answer["who"], answer["path"]) == (who, path)


def test_plugins_learn_the_address_they_were_called_by(gateway: Gateway) -> None:
    answer = gateway.ask("/e/hook-id/path?a=1", Host="kit.example:8080")
    assert answer["Dify-Hook-Url"] == "http://kit.example:8080/e/hook-id/path?a=1"
    assert "Dify-Hook-Url" not in gateway.ask("/v1/x")


def test_plugins_learn_the_public_address(home: Home, dify: dict[str, Upstream]) -> None:
    address = dify["plugin_daemon"].address
    with Gateway(home, gateway_plugin_daemon=address, gateway_public_url="https://dify.example") as gateway:
        assert gateway.ask("/e/hook-id?a=1")["Dify-Hook-Url"] == "https://dify.example/e/hook-id?a=1"


def test_a_stranger_cannot_forge_where_he_comes_from(gateway: Gateway) -> None:
    forged = {"X-Forwarded-For": "10.9.8.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example"}
    answer = gateway.ask("/v1/x", **forged)
    assert (answer["X-Forwarded-For"], answer["X-Forwarded-Proto"]) == ("127.0.0.1", "http")
    assert answer["X-Forwarded-Host"] == f"127.0.0.1:{gateway.port}"


def test_a_trusted_proxy_is_believed(home: Home, dify: dict[str, Upstream]) -> None:
    with Gateway(home, gateway_api=dify["api"].address, gateway_trusted_proxies=["127.0.0.0/8"]) as gateway:
        answer = gateway.ask("/v1/x", **{"X-Forwarded-For": "10.9.8.7", "X-Forwarded-Proto": "https"})
        assert (answer["X-Forwarded-For"], answer["X-Forwarded-Proto"]) == ("10.9.8.7, 127.0.0.1", "https")


def test_streams_arrive_as_they_are_made(gateway: Gateway) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    connection.request("GET", "/v1/stream")
    answer = connection.getresponse()
    late = []
    for _ in range(5):
        line = answer.readline().decode().split()
        late.append(time.time() - float(line[2]))
        answer.readline()
    connection.close()
    assert max(late) < 1, late  # the stream as a whole takes 10 s


def test_a_client_that_leaves_frees_its_place(gateway: Gateway, dify: dict[str, Upstream]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    connection.request("GET", "/v1/stream")
    connection.getresponse().readline()
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert dify["api"].client_left.wait(5)


def test_no_idle_connection_stays_at_the_api(gateway: Gateway, dify: dict[str, Upstream]) -> None:
    """Each would hold one of gunicorn's few places (facts/serving.md: clients starved)."""
    for _ in range(3):
        assert gateway.ask("/v1/x")["Connection"] == "close"
        gateway.ask("/")
    assert dify["api"].connections == 3
    assert dify["web"].connections == 1


def test_uploads_up_to_the_limit(home: Home, dify: dict[str, Upstream]) -> None:
    mebibyte = 1 << 20
    with Gateway(home, gateway_api=dify["api"].address, gateway_max_body_mb=2, gateway_plugin_package_mb=5) as gateway:

        def upload(size: int, path: str = "/console/api/files/upload") -> int:
            connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
            connection.request("POST", path, body=b"x" * size)
            answer = connection.getresponse()
            if answer.status == 200:
                assert json.load(answer)["received"] == size
            connection.close()
            return answer.status

        assert upload(2 * mebibyte + 4096) == 200  # the largest file in its form
        assert upload(4 * mebibyte) == 413
        # A plugin that carries its wheels is larger than any file.
        packages = "/console/api/workspaces/current/plugin/upload/pkg"
        assert upload(5 * mebibyte + 4096, packages) == 200
        assert upload(7 * mebibyte, packages) == 413


def test_has_the_figures_that_the_dashboard_asks_for(gateway: Gateway) -> None:
    for path in ("/v1/x", "/", "/e/x"):
        gateway.ask(path)
    connection = http.client.HTTPConnection("127.0.0.1", gateway.metrics_port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert missing(dashboard.asked(dashboard.ROWS["Gateway (Caddy)"]), text) == []
    # Not through the door for people.
    assert "caddy_http" not in gateway.get("/metrics")[1]


def test_a_part_that_is_down_is_explained_and_the_log_keeps_secrets(
    gateway: Gateway, dify: dict[str, Upstream]
) -> None:
    dify["api"].server.shutdown()
    dify["api"].server.server_close()
    status, text = gateway.get("/v1/x?token=s3cret-query", Authorization="s3cret-header", Cookie="s3cret-cookie")
    assert status == 502
    assert "behind /v1/x does not answer" in text
    assert "kitctl status" in text
    assert gateway.get("/healthz")[0] == 200
    log = gateway.log.read_text()
    assert "connection refused" in log
    assert "/v1/x" in log
    assert "s3cret" not in log


def test_listens_on_loopback_only_unless_asked(gateway: Gateway, home: Home) -> None:
    hexadecimal = f"{gateway.port:04X}"
    tables = [Path(name) for name in ("/proc/net/tcp", "/proc/net/tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    assert [f[1] for f in lines if f[3] == "0A" and f[1].endswith(":" + hexadecimal)] == ["0100007F:" + hexadecimal]
    assert "bind 127.0.0.1 10.1.2.3\n" in Gateway(home, gateway_bind="10.1.2.3").file.read_text()
    everywhere = Gateway(home, gateway_bind="0.0.0.0")
    assert "bind 0.0.0.0\n" in everywhere.file.read_text()
    assert everywhere.validate().returncode == 0
    assert Gateway(home, gateway_bind="::").validate().returncode == 0


def test_without_dify_says_so(home: Home) -> None:
    text = "Model service on port 7.\nDify is `not` deployed {here}."
    with Gateway(home, gateway_dify=False, gateway_without_dify=text) as gateway:
        assert gateway.get("/") == gateway.get("/v1/chat-messages") == (200, text + "\n")


def test_a_wrong_setting_is_refused_before_it_lands(home: Home) -> None:
    refused = Gateway(home, gateway_trusted_proxies=["not-a-network"]).validate()
    assert refused.returncode != 0
    assert "not-a-network" in refused.stderr
