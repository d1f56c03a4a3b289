"""The egress proxy as the kit builds and starts it: what it lets through, what it refuses."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import socketserver
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible.module_utils import kit_egress

from .conftest import free_port, running

# Names that the test's own name server knows.
NAMES = {
    "loopback.test": "127.0.0.1",
    "metadata.test": "169.254.169.254",
    "private.test": "10.0.0.5",
    "mapped.test": "::ffff:127.0.0.1",
    "local6.test": "::1",
    "unique6.test": "fd00:ec2::254",
    "open.test": "127.0.0.2",
}
REFUSED = [
    "127.0.0.1",
    "127.0.0.3",
    "localhost",
    "0.0.0.0",
    "0.1.2.3",
    "169.254.169.254",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "[::]",
    "[::1]",
    "[::127.0.0.1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[::ffff:7f00:1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
    *(name for name in NAMES if name != "open.test"),
]


class Inside(http.server.BaseHTTPRequestHandler):
    """A service that must not be reached, and at 127.0.0.2 one that the site has opened."""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[len("/to/") :])
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the inside")

    def log_message(self, *_: object) -> None:
        """Quiet."""


class NameServer(socketserver.BaseRequestHandler):
    """Answers for NAMES, A or AAAA, whatever else is asked with no answer."""

    def handle(self) -> None:
        query, sock = self.request
        labels, at = [], 12
        while length := query[at]:
            labels.append(query[at + 1 : at + 1 + length].decode())
            at += length + 1
        kind = struct.unpack(">H", query[at + 1 : at + 3])[0]
        address = NAMES.get(".".join(labels).lower(), "")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        fits = address and kind == {socket.AF_INET: 1, socket.AF_INET6: 28}[family]
        header = query[:2] + struct.pack(">HHHHH", 0x8180, 1, int(bool(fits)), 0, 0)
        data = socket.inet_pton(family, address) if fits else b""
        record = b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 0, len(data)) + data if fits else b""
        sock.sendto(header + query[12 : at + 5] + record, self.client_address)


@contextlib.contextmanager
def serving(server: socketserver.TCPServer | socketserver.UDPServer) -> Iterator[int]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.socket.getsockname()[1])
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def inside() -> Iterator[int]:
    """The port of the service, on every address of the loopback network."""
    with serving(http.server.ThreadingHTTPServer(("0.0.0.0", 0), Inside)) as port:
        yield port


@pytest.fixture(scope="module")
def egress(smokescreen: Path) -> Iterator[int]:
    """The proxy's port; the site has opened 127.0.0.2."""
    port = free_port()
    with serving(socketserver.UDPServer(("127.0.0.1", 0), NameServer)) as dns:
        command = kit_egress.command(str(smokescreen), port, ["127.0.0.2"])
        with running([*command, "--resolver-address", f"127.0.0.1:{dns}"], port):
            yield port


def through(proxy: int, url: str) -> tuple[int, str]:
    """Status and text of what a client that follows redirects gets."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": f"http://127.0.0.1:{proxy}"}))
    try:
        with opener.open(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def tunnel(proxy: int, address: str) -> int:
    """Status of CONNECT, by which clients ask for https and anything else that speaks TCP."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy, timeout=20)
    connection.request("CONNECT", address, headers={"Host": address})
    status = connection.getresponse().status
    connection.close()
    return status


def test_it_listens_on_loopback_alone(egress: int) -> None:
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    local = [line.split()[1] for table in tables for line in table.splitlines()[1:] if line.split()[3] == "0A"]
    assert [address for address in local if address.endswith(f":{egress:04X}")] == [f"0100007F:{egress:04X}"]


@pytest.mark.parametrize("host", REFUSED)
def test_the_inside_is_refused(egress: int, inside: int, host: str) -> None:
    status, text = through(egress, f"http://{host}:{inside}/")
    assert status == 407, text
    assert "egress_allow" in text
    assert tunnel(egress, f"{host}:{inside}") == 407


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0"])
def test_other_spellings_of_loopback_lead_nowhere(egress: int, inside: int, host: str) -> None:
    assert through(egress, f"http://{host}:{inside}/")[0] in (407, 502, 504)
    assert tunnel(egress, f"{host}:{inside}") in (407, 502, 504)


def test_what_the_site_opened_is_reached_and_nothing_beside_it(egress: int, inside: int) -> None:
    assert through(egress, f"http://127.0.0.2:{inside}/") == (200, "the inside")
    assert through(egress, f"http://open.test:{inside}/") == (200, "the inside")
    assert tunnel(egress, f"127.0.0.2:{inside}") == 200
    assert through(egress, f"http://127.0.0.1:{inside}/")[0] == 407


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "[::1]", "private.test"])
def test_a_redirect_to_the_inside_is_refused(egress: int, inside: int, host: str) -> None:
    status, text = through(egress, f"http://127.0.0.2:{inside}/to/http://{host}:{inside}/")
    assert status == 407, text


def test_it_does_not_ask_itself(egress: int) -> None:
    assert through(egress, f"http://127.0.0.1:{egress}/")[0] == 407


def test_a_client_cannot_choose_a_proxy_inside(egress: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        connection = http.client.HTTPConnection("127.0.0.1", egress, timeout=20)
        headers = {"Host": "127.0.0.2:1", "X-Upstream-Https-Proxy": f"http://127.0.0.1:{chosen.getsockname()[1]}"}
        connection.request("CONNECT", "127.0.0.2:1", headers=headers)
        assert connection.getresponse().status == 502
        connection.close()
        chosen.settimeout(0)
        with pytest.raises(BlockingIOError):
            chosen.accept()


def test_the_sites_proxy_gets_what_is_allowed(smokescreen: Path) -> None:
    asked: list[str] = []

    class Upstream(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers['Proxy-Authorization']}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"from outside")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    port = free_port()
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)) as upstream:
        proxy = f"http://me:secret@127.0.0.1:{upstream}"
        command = kit_egress.command(str(smokescreen), port, ["10.9.9.9"], [proxy])
        with running(command, port, HTTP_PROXY=proxy, HTTPS_PROXY=proxy, NO_PROXY="127.0.0.1"):
            assert through(port, "http://10.9.9.9/x") == (200, "from outside")
            assert through(port, "http://10.9.9.8/x")[0] == 407
    assert asked == ["http://10.9.9.9/x Basic bWU6c2VjcmV0"]
