"""A few words of PostgreSQL's, Redis' and S3's protocols, with the standard library.

For hosts that have no client library yet: a server that the kit does not run is asked before anything is installed.
Nothing here writes to a server.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import hmac
import secrets
import socket
import ssl
import struct
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from .kit_network import opener
from .kit_report import Problem

SECONDS = 8.0


class Refused(Exception):
    """One thing that is wrong with a server."""

    def __init__(self, what: str, where: str, remedy: str) -> None:
        super().__init__(what)
        self.problem = Problem(what, where, remedy)


# --- A connection -----------------------------------------------------------------------------------------------------


def connect(name: str, variable: str, host: str, port: int) -> socket.socket:
    """A TCP connection.

    Raises:
        Refused: nobody answers at that address.
    """
    where = f"{variable}_host, {variable}_port"
    try:
        return socket.create_connection((host, port), timeout=SECONDS)
    except socket.gaierror as error:
        raise Refused(
            f"{name}'s host name {host} is not known on this host: {error.strerror}.",
            where,
            f"correct {variable}_host, or let this host's resolver know the name (/etc/resolv.conf, /etc/hosts).",
        ) from None
    except OSError as error:
        reason = f"no answer within {SECONDS:.0f} s" if isinstance(error, TimeoutError) else error.strerror or error
        raise Refused(
            f"{name} cannot be reached at {host}:{port}: {reason}.",
            where,
            "correct the address; on the server, see that it listens there, and that no firewall is in between.",
        ) from None


def tls_context(ca_file: str, variable: str, name: str) -> ssl.SSLContext:
    """TLS that trusts the roots in a file.

    Raises:
        Refused: the file is no bundle of certificates.
    """
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise Refused(
            f"The root certificates for {name} cannot be read: {error.strerror or error}.",
            ca_file,
            f"set {variable} to a PEM file on the host with the certificate authority of the server.",
        ) from None


def wrap(plain: socket.socket, context: ssl.SSLContext, name: str, host: str, ca_file: str, ca: str) -> socket.socket:
    """The connection inside TLS.

    Raises:
        Refused: the certificate is not trusted or not for this host name, or there is no TLS.
    """
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except ssl.SSLError as error:
        raise tls_refusal(error, name, host, ca_file, ca) from None
    except OSError as error:
        raise Refused(
            f"{name} at {host} breaks off when TLS begins: {error.strerror or error}.",
            host,
            "correct the port: servers often speak TLS at another one.",
        ) from None


def tls_refusal(error: ssl.SSLError, name: str, host: str, ca_file: str, ca: str) -> Refused:
    """Why TLS did not come about, as a person can mend it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == 62 or "mismatch" in error.verify_message.lower():
            return Refused(
                f"{name}'s certificate is not for {host}: {error.verify_message}",
                host,
                "write the host name that stands in the certificate, or have one made for this name.",
            )
        return Refused(
            f"{name}'s certificate is not trusted: {error.verify_message}.",
            f"{host}, {ca_file}",
            f"set {ca} to a PEM file on the host with the certificate authority that signed it.",
        )
    return Refused(
        f"{name} at {host} does not speak TLS: {error.reason or error}.",
        host,
        "correct the port (servers often speak TLS at another one), or switch TLS on at the server.",
    )


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


class PostgresError(Exception):
    """What the server refused; ``code`` is its SQLSTATE."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__(fields.get("M", "no reason given"))
        self.code = fields.get("C", "")


class PostgresSession:
    """One login with protocol 3, for simple queries.

    ``server`` has host, port, user, password, sslmode (as libpq: disable, require, verify-ca, verify-full) and
    sslrootcert.

    Raises:
        Refused: not reached, or no TLS as it is wanted.
        PostgresError: the server refuses the login.
    """

    def __init__(self, server: Mapping[str, Any], database: str) -> None:
        self._password = str(server["password"])
        self._user = str(server["user"])
        host, mode = str(server["host"]), str(server["sslmode"])
        self._socket = connect("PostgreSQL", "postgres", host, int(server["port"]))
        try:
            if mode != "disable":
                self._start_tls(host, mode, str(server["sslrootcert"]))
            self._stream = self._socket.makefile("rb")
            words = ["user", self._user, "database", database, "application_name", "dify-kit-precheck"]
            body = struct.pack("!i", 196608) + b"".join(word.encode() + b"\0" for word in words) + b"\0"
            self._socket.sendall(struct.pack("!i", len(body) + 4) + body)
            self._log_in()
        except OSError as error:
            self.close()
            raise Refused(
                f"PostgreSQL at {host} breaks off: {error.strerror or error}.",
                "postgres_host, postgres_port",
                "see whether another kind of server listens there, and the server's log.",
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _start_tls(self, host: str, mode: str, ca_file: str) -> None:
        self._socket.sendall(struct.pack("!ii", 8, 80877103))
        if self._socket.recv(1) != b"S":
            raise Refused(
                f"PostgreSQL at {host} offers no TLS, but postgres_sslmode is {mode}.",
                "postgres_sslmode",
                "switch it on there (ssl = on); or, on a network that you trust, postgres_sslmode: disable",
            )
        if mode == "require":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        else:
            context = tls_context(ca_file, "postgres_sslrootcert", "PostgreSQL")
            context.check_hostname = mode == "verify-full"
        self._socket = wrap(self._socket, context, "PostgreSQL", host, ca_file, "postgres_sslrootcert")

    def _send(self, kind: bytes, body: bytes) -> None:
        self._socket.sendall(kind + struct.pack("!i", len(body) + 4) + body)

    def _receive(self) -> tuple[bytes, bytes]:
        head = self._stream.read(5)
        if len(head) < 5:
            raise ConnectionError("it hangs up")
        (length,) = struct.unpack("!i", head[1:])
        body = self._stream.read(length - 4)
        if head[:1] == b"E":
            parts = [part.decode(errors="replace") for part in body.split(b"\0") if part]
            raise PostgresError({part[0]: part[1:] for part in parts})
        return head[:1], body

    def _log_in(self) -> None:
        scram: Scram | None = None
        while True:
            kind, body = self._receive()
            if kind == b"Z":
                return
            if kind != b"R":
                continue  # parameters, the key to cancel with, notices
            (step,) = struct.unpack("!i", body[:4])
            if step == 3:
                self._send(b"p", self._password.encode() + b"\0")
            elif step == 5:
                inner = hashlib.md5((self._password + self._user).encode()).hexdigest()
                self._send(b"p", b"md5" + hashlib.md5(inner.encode() + body[4:8]).hexdigest().encode() + b"\0")
            elif step == 10:
                scram = Scram(self._password)
                first = scram.first().encode()
                self._send(b"p", b"SCRAM-SHA-256\0" + struct.pack("!i", len(first)) + first)
            elif step == 11 and scram:
                self._send(b"p", scram.final(body[4:].decode()).encode())
            elif step == 12 and scram:
                scram.verify(body[4:].decode())
            elif step:
                raise PostgresError({"M": f"it wants a kind of login ({step}) that Dify's clients don't all have"})

    def rows(self, query: str) -> list[list[str | None]]:
        """The rows of a simple query, as text."""
        self._send(b"Q", query.encode() + b"\0")
        found: list[list[str | None]] = []
        while True:
            kind, body = self._receive()
            if kind == b"Z":
                return found
            if kind == b"D":
                row, at = [], 2
                for _ in range(struct.unpack("!h", body[:2])[0]):
                    (length,) = struct.unpack("!i", body[at : at + 4])
                    at += 4
                    row.append(None if length < 0 else body[at : at + length].decode())
                    at += max(length, 0)
                found.append(row)


class Scram:
    """The client's half of SCRAM-SHA-256 (RFC 5802, 7677), without channel binding."""

    def __init__(self, password: str) -> None:
        self._password = unicodedata.normalize("NFKC", password).encode()
        self._nonce = base64.b64encode(secrets.token_bytes(18)).decode()
        self._bare = f"n=,r={self._nonce}"
        self._signature = b""

    def first(self) -> str:
        """The client's first message."""
        return "n,," + self._bare

    def final(self, server_first: str) -> str:
        """The proof, for the server's salt and count."""
        said = dict(part.split("=", 1) for part in server_first.split(","))
        if not said["r"].startswith(self._nonce):
            raise PostgresError({"M": "its login answers to another nonce than ours"})
        salted = hashlib.pbkdf2_hmac("sha256", self._password, base64.b64decode(said["s"]), int(said["i"]))
        without_proof = f"c=biws,r={said['r']}"
        message = ",".join([self._bare, server_first, without_proof]).encode()
        key = hmac.digest(salted, b"Client Key", "sha256")
        mask = hmac.digest(hashlib.sha256(key).digest(), message, "sha256")
        self._signature = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), message, "sha256")
        proof = bytes(one ^ other for one, other in zip(key, mask, strict=True))
        return f"{without_proof},p={base64.b64encode(proof).decode()}"

    def verify(self, server_final: str) -> None:
        """The server has known the password, too."""
        if base64.b64decode(server_final.partition("v=")[2]) != self._signature:
            raise PostgresError({"M": "the server does not prove that it knows the password"})


# --- Redis ------------------------------------------------------------------------------------------------------------


class RedisError(Exception):
    """What the server refused."""


class RedisSession:
    """One connection with protocol 2; ``server`` has host, port, username, password, tls and ca_file.

    Raises:
        Refused: not reached, or no TLS as it is wanted.
    """

    def __init__(self, server: Mapping[str, Any]) -> None:
        host, port = str(server["host"]), int(server["port"])
        self._socket = connect("Redis", "redis", host, port)
        if server["tls"]:
            try:
                context = tls_context(str(server["ca_file"]), "redis_ca", "Redis")
                self._socket = wrap(self._socket, context, "Redis", host, str(server["ca_file"]), "redis_ca")
            except BaseException:
                self._socket.close()
                raise
        self._stream = self._socket.makefile("rb")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def call(self, *words: str) -> Any:
        """The answer to a command.

        Raises:
            RedisError: the server refuses it.
            OSError: it broke off.
        """
        parts = [word.encode() for word in words]
        head = b"*%d\r\n" % len(parts)
        self._socket.sendall(head + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
        return self._answer()

    def _answer(self) -> Any:
        line = self._stream.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("it hangs up")
        kind, rest = line[:1], line[1:-2].decode(errors="replace")
        if kind == b"-":
            raise RedisError(rest)
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == "-1" else self._stream.read(int(rest) + 2)[:-2].decode(errors="replace")
        if kind == b"*":
            return [self._answer() for _ in range(max(int(rest), 0))]
        raise ConnectionError("it answers in another protocol than Redis'")


# --- HTTP: S3 and vector stores ---------------------------------------------------------------------------------------


def open_url(request: urllib.request.Request, environment: Mapping[str, str], ca_file: str) -> tuple[int, bytes]:
    """Status and body of an answer, through the site's proxy unless it is left out for this host.

    Raises:
        OSError: no answer; ``urllib.error.URLError`` has the reason.
    """
    way = opener(request.full_url, {**environment, "SSL_CERT_FILE": ca_file})
    try:
        with way.open(request, timeout=SECONDS) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def ask(name: str, variable: str, request: urllib.request.Request, server: Mapping[str, Any]) -> tuple[int, bytes]:
    """``open_url`` for a server of the site.

    Raises:
        Refused: nobody answers, or the certificate is not trusted.
    """
    url = urlsplit(request.full_url)
    try:
        return open_url(request, server["environment"], server["ca_file"])
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            raise tls_refusal(error.reason, name, url.hostname or "", server["ca_file"], "kit_ca_bundle") from None
        reason = error.reason.strerror if isinstance(error.reason, OSError) else error.reason
    except OSError as error:
        reason = f"no answer within {SECONDS:.0f} s" if isinstance(error, TimeoutError) else error.strerror
    raise Refused(
        f"{name} cannot be reached at {url.scheme}://{url.netloc}: {reason or 'no answer'}.",
        variable,
        "correct the address, let this host reach it, or name its host in kit_no_proxy where the proxy is in the way.",
    )


def signed(
    server: Mapping[str, Any], query: Mapping[str, str], now: datetime.datetime | None = None
) -> urllib.request.Request:
    """A GET of the bucket, signed as AWS wants it (version 4).

    ``server`` has endpoint (empty for AWS), region, bucket, access_key, secret_key and address_style (path, virtual).
    """
    endpoint = urlsplit(server["endpoint"] or f"https://s3.{server['region']}.amazonaws.com")
    virtual = server["address_style"] == "virtual"
    host = f"{server['bucket']}.{endpoint.netloc}" if virtual else endpoint.netloc
    path = endpoint.path.rstrip("/") + ("/" if virtual else f"/{server['bucket']}")
    words = "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in sorted(query.items()))
    stamp = (now or datetime.datetime.now(datetime.timezone.utc)).strftime("%Y%m%dT%H%M%SZ")
    empty = hashlib.sha256(b"").hexdigest()
    headers = {"host": host, "x-amz-content-sha256": empty, "x-amz-date": stamp}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    canonical = "\n".join(["GET", quote(path), words, lines, names, empty])
    scope = f"{stamp[:8]}/{server['region']}/s3/aws4_request"
    key = ("AWS4" + server["secret_key"]).encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"Credential={server['access_key']}/{scope}"
    headers["Authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
    return urllib.request.Request(f"{endpoint.scheme}://{host}{quote(path)}?{words}", headers=headers)
