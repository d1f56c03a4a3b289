"""TLS at the gateway, in a real Caddy: a certificate of the site's own, and one from a real ACME server (Pebble)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import kit_network
from cryptography import x509

from tests import go_programs

from .conftest import Home, self_signed
from .test_gateway import ROLE, Gateway, Upstream

# Let's Encrypt's own server for tests of clients; the version is the pin, its module's hash is in Go's sum database.
PEBBLE = ("github.com/letsencrypt/pebble/v2", "v2.10.1")
NAME = "dify.kit.test"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def ready(gateway: Gateway, port: int) -> subprocess.CompletedProcess[str]:
    """What kit_services asks until the gateway is ready."""
    command = [sys.executable, "-IS", str(ROLE / "files/gateway_ready.py"), str(gateway.port), str(port), NAME]
    return subprocess.run(command, capture_output=True, text=True)


def ask(port: int, context: ssl.SSLContext, path: str = "/v1/x") -> tuple[dict[str, Any], x509.Certificate]:
    """An answer through TLS as a browser gets it, whatever the name resolves to here; and the certificate."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=NAME) as tls,
    ):
        shown = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
        connection = http.client.HTTPConnection(NAME, port)
        connection.sock = tls
        connection.request("GET", path)
        return json.loads(connection.getresponse().read()), shown


@pytest.fixture
def own(home: Home, tmp_path: Path) -> Iterator[tuple[Gateway, int, ssl.SSLContext]]:
    """A gateway with a certificate of the site's own."""
    folder = home.root / "etc/tls"
    folder.mkdir()
    self_signed(folder / "gateway.crt", folder / "gateway.key", f"DNS:{NAME}")
    api, port = Upstream("api"), free_port()
    settings = {"gateway_tls": "files", "gateway_https_port": port, "gateway_public_url": f"https://{NAME}"}
    # Every address of the machine: the redirect is for those who come to another than loopback's.
    with Gateway(home, gateway_api=api.address, gateway_bind="0.0.0.0", **settings) as gateway:
        yield gateway, port, ssl.create_default_context(cafile=str(folder / "gateway.crt"))
    api.server.shutdown()
    api.server.server_close()


def test_a_certificate_of_the_sites_own(own: tuple[Gateway, int, ssl.SSLContext]) -> None:
    gateway, port, context = own
    assert gateway.validate().returncode == 0
    assert ready(gateway, port).returncode == 0
    answer, _ = ask(port, context)
    assert (answer["who"], answer["X-Forwarded-Proto"]) == ("api", "https")
    # No browser with an older protocol, and nobody who asks for another name.
    old = ssl.create_default_context()
    old.check_hostname, old.verify_mode, old.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, OSError)):
        ask(port, old)


def test_plain_http_is_for_this_hosts_services_alone(own: tuple[Gateway, int, ssl.SSLContext]) -> None:
    gateway, _, _ = own
    assert gateway.ask("/v1/x")["X-Forwarded-Proto"] == "http"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))  # sends nothing; tells which address of ours would
        address = route.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback's; one in any network would enable this")
    for method in ("GET", "POST"):
        connection = http.client.HTTPConnection(address, gateway.port, timeout=10)
        connection.request(method, "/v1/x?a=1")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Location")) == (308, f"https://{NAME}/v1/x?a=1")
        connection.close()


# --- ACME ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pebble() -> Path:
    """A folder with Pebble and its DNS server (half a minute when they are built)."""
    for name in ("pebble", "pebble-challtestsrv"):
        program = go_programs.build(*PEBBLE, f"cmd/{name}")
    return program.parent


class Authority:
    """Pebble: a certificate authority for names that its DNS server sends to this machine."""

    def __init__(self, programs: Path, folder: Path, http_port: int, tls_port: int) -> None:
        self.directory = f"https://127.0.0.1:{free_port()}/dir"
        listen, management, dns = self.directory.split("/")[2], free_port(), free_port()
        self.management = f"https://127.0.0.1:{management}"
        self_signed(folder / "ca", folder / "key", "IP:127.0.0.1")
        self.bundle = folder / "ca"
        values = {
            "listenAddress": listen,
            "managementListenAddress": f"127.0.0.1:{management}",
            "certificate": str(folder / "ca"),
            "privateKey": str(folder / "key"),
            "httpPort": http_port,
            "tlsPort": tls_port,
        }
        (folder / "config").write_text(json.dumps({"pebble": values}))
        names = [f"-dnsserver=127.0.0.1:{dns}", "-defaultIPv4=127.0.0.1", "-defaultIPv6=", "-http01=", "-https01="]
        names += ["-tlsalpn01=", "-doh=", f"-management=127.0.0.1:{free_port()}"]
        commands = [
            [str(programs / "pebble-challtestsrv"), *names],
            [str(programs / "pebble"), "-config", str(folder / "config"), "-dnsserver", f"127.0.0.1:{dns}", "-strict"],
        ]
        self.log = folder / "log"
        with self.log.open("w") as log:
            quick = {**os.environ, "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0"}
            self.running = [subprocess.Popen(command, stdout=log, stderr=log, env=quick) for command in commands]

    def root(self) -> str:
        """The certificate that it signs with, as PEM; it makes a new one at each start."""
        context = ssl.create_default_context(cafile=str(self.bundle))
        end = time.monotonic() + 60
        while True:
            try:
                opener = urllib.request.build_opener(
                    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
                )
                with opener.open(f"{self.management}/roots/0", timeout=5) as response:
                    return str(response.read().decode())
            except OSError:
                assert time.monotonic() < end, self.log.read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
            process.wait(10)


@contextlib.contextmanager
def fetched_by_acme(home: Home, pebble: Path, folder: Path, reached: str) -> Iterator[tuple[Gateway, int, str]]:
    """A gateway that asks Pebble for its certificate; ``reached``: the port at which Pebble reaches it."""
    port, plain, nowhere = free_port(), free_port(), free_port()
    authority = Authority(
        pebble,
        folder,
        plain if reached == "http" else nowhere,
        port if reached == "tls" else nowhere,
    )
    try:
        root = authority.root()
        settings = {"gateway_tls": "acme", "gateway_https_port": port, "gateway_public_url": f"https://{NAME}"}
        settings |= {"gateway_acme_directory": authority.directory, "gateway_acme_email": "me@example.com"}
        gateway = Gateway(home, **settings)
        # The port that Pebble knows of.
        gateway.file.write_text(gateway.file.read_text().replace(str(gateway.port), str(plain)))
        gateway.port = plain
        environment = kit_network.environment(str(authority.bundle))
        gateway.command[1:1] = [f"{name}={value}" for name, value in environment.items()]
        with gateway:
            yield gateway, port, root
    finally:
        authority.stop()


@pytest.mark.parametrize("reached", ["http", "tls"])
def test_a_certificate_is_fetched(home: Home, pebble: Path, tmp_path: Path, reached: str) -> None:
    with fetched_by_acme(home, pebble, tmp_path, reached) as (gateway, port, root):
        assert gateway.validate().returncode == 0
        end = time.monotonic() + 90
        while (problem := ready(gateway, port)).returncode:
            assert time.monotonic() < end, problem.stderr + gateway.log.read_text()
            time.sleep(0.2)
        context = ssl.create_default_context(cadata=root)
        with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain, server_hostname=NAME):
            pass  # signed by Pebble, for this name
        keys = list((home.root / "caddy").rglob("*.key"))
        assert keys
        assert all(key.stat().st_mode & 0o077 == 0 for key in keys)


def test_an_authority_that_cannot_reach_the_gateway_is_named(home: Home, pebble: Path, tmp_path: Path) -> None:
    with fetched_by_acme(home, pebble, tmp_path, "nowhere") as (gateway, port, _):
        end = time.monotonic() + 60
        while "urn:ietf:params:acme:error" not in gateway.log.read_text():
            assert time.monotonic() < end, gateway.log.read_text()
            time.sleep(0.2)
        failed = ready(gateway, port)
        assert failed.returncode == 1
        assert f"no certificate for {NAME} yet" in failed.stderr
        assert f"port 80 (passed on to {gateway.port})" in failed.stderr.replace("\n", " ")
