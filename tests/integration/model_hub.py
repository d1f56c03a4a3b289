"""A model hub on loopback: Hugging Face's and ModelScope's routes over a folder, and every trouble that hubs make.

The routes, headers and error codes are those that huggingface_hub 2.4.0 and modelscope-hub 0.5.1 speak.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

LARGE = ".safetensors"  # what the hub keeps in its store for large files


@dataclass
class Trouble:
    """What the hub does wrong; names are of files."""

    cut: dict[str, int] = field(default_factory=dict)  # once: break off after so many bytes
    stall: dict[str, int] = field(default_factory=dict)  # once: say nothing more after so many bytes until `go_on`
    lie: set[str] = field(default_factory=set)  # other content of the same length, always
    lie_once: set[str] = field(default_factory=set)
    busy: int = 0  # so many answers 429 with `retry_after`
    retry_after: str = "1"
    ignore_range: bool = False
    token: str = ""  # gives nothing without
    names_only: bool = False  # a mirror that lists no sizes and hashes
    sizes: dict[str, int] = field(default_factory=dict)  # claims these


class ModelHub(http.server.ThreadingHTTPServer):
    """Serves ``folder`` as ``commit``, the newest one, of every repository."""

    daemon_threads = True

    def __init__(self, folder: Path, commit: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.commit = commit
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.reset()

    def reset(self) -> None:
        """Make no trouble and forget what was asked."""
        self.trouble = Trouble()
        self.asked: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []  # file, first byte, bytes sent
        self.tokens: Counter[tuple[str, str]] = Counter()  # host and Authorization
        self.stalled = threading.Event()
        self.go_on = threading.Event()

    def sent(self, name: str) -> int:
        """Bytes of a file that went out, over all requests."""
        return sum(count for asked, _, count in self.ranges if asked == name)

    def files(self) -> dict[str, Path]:
        """By their path in the repository."""
        return {str(path.relative_to(self.folder)): path for path in sorted(self.folder.rglob("*")) if path.is_file()}


@contextmanager
def serving(folder: Path, commit: str) -> Iterator[ModelHub]:
    """A hub that answers until the end of the block."""
    hub = ModelHub(folder, commit)
    thread = threading.Thread(target=functools.partial(hub.serve_forever, poll_interval=0.02))
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: ModelHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, trouble = self.server, self.server.trouble
        parts = urlsplit(self.path)  # with a host where the hub is asked as a proxy
        hub.asked.append(self.path)
        authorization = self.headers.get("Authorization", "")
        hub.tokens[(self.headers.get("Host", "").split(":")[0], authorization)] += 1
        if trouble.busy:
            trouble.busy -= 1
            self.refuse(429, {"Retry-After": trouble.retry_after})
            return
        steps = parts.path.strip("/").split("/")
        match steps:
            case ["api", "models", _, _, "revision", revision]:
                self.revision(revision)
            case [_, _, "resolve", revision, *name]:
                self.resolve(revision, "/".join(name), authorization)
            case ["store", name]:
                self.content(name)
            case ["api", "v1", "models", _, _, "repo", "files"]:
                self.modelscope_files(parse_qs(parts.query)["Revision"][0])
            case ["api", "v1", "models", _, _, "repo"]:
                if trouble.token and authorization != f"Bearer {trouble.token}":
                    self.refuse(403, {}, {"Code": 403, "Message": "no permission"})
                    return
                self.content(parse_qs(parts.query)["FilePath"][0])
            case _:
                self.refuse(404, {})

    def revision(self, revision: str) -> None:
        """Hugging Face: /api/models/NAME/revision/REVISION?blobs=true."""
        hub = self.server
        if revision not in (hub.commit, "main"):
            self.refuse(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev: {revision}"})
            return
        siblings = []
        for name, path in hub.files().items():
            data = path.read_bytes()
            size = hub.trouble.sizes.get(name, len(data))
            one: dict[str, object] = {"rfilename": name}
            if not hub.trouble.names_only:
                one |= {"size": size, "blobId": git(data)}
                if name.endswith(LARGE):
                    one["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
            siblings.append(one)
        self.answer({"sha": hub.commit, "gated": "manual" if hub.trouble.token else False, "siblings": siblings})

    def resolve(self, revision: str, name: str, authorization: str) -> None:
        """Hugging Face: small files at once, large ones by a redirect to another host, as its store is."""
        hub = self.server
        path = hub.files().get(name)
        if revision != hub.commit or path is None:
            self.refuse(404, {"X-Error-Code": "EntryNotFound"})
            return
        if hub.trouble.token and authorization != f"Bearer {hub.trouble.token}":
            self.refuse(403 if authorization else 401, {"X-Error-Code": "GatedRepo"})
            return
        data = path.read_bytes()
        if name.endswith(LARGE):
            self.send_response(302)
            self.send_header("Location", f"{hub.url.replace('127.0.0.1', 'localhost')}/store/{name}")
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Repo-Commit", revision)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.content(name)

    def modelscope_files(self, revision: str) -> None:
        """ModelScope: /api/v1/models/NAME/repo/files?Revision=...; it does not always tell the commit."""
        hub = self.server
        if revision not in (hub.commit, "master"):
            self.refuse(404, {}, {"Code": 10010205001, "Success": False, "Message": "revision not found"})
            return
        files: list[dict[str, object]] = [{"Path": "figures", "Type": "tree", "Size": 0, "Sha256": ""}]
        for name, path in hub.files().items():
            data = path.read_bytes()
            files.append({"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()})
        self.answer({"Code": 200, "Success": True, "Data": {"Files": files, "LatestCommitter": {"Id": ""}}})

    def content(self, name: str) -> None:
        """A file, or the part of it that Range asks for."""
        hub, trouble = self.server, self.server.trouble
        data = hub.files()[name].read_bytes()
        if name in trouble.lie or name in trouble.lie_once:
            trouble.lie_once.discard(name)
            data = bytes(byte ^ 1 for byte in data[:64]) + data[64:]
        asked = self.headers.get("Range")
        begin = 0 if not asked or trouble.ignore_range else int(asked.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.send_header("ETag", f'"{git(data)}"')
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, stall = trouble.cut.pop(name, None), trouble.stall.pop(name, None)
        end = begin + cut if cut is not None else len(data)
        sent = 0
        try:
            if stall is not None:
                self.wfile.write(data[begin : begin + stall])
                sent = stall
                hub.stalled.set()
                hub.go_on.wait()
            self.wfile.write(data[begin + sent : end])
            sent = end - begin
        except OSError:  # whoever asked is gone
            self.close_connection = True
        finally:
            hub.ranges.append((name, begin, sent))
        if cut is not None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def answer(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, headers: dict[str, str], body: object = None) -> None:
        self.answer(body or {}, status, headers)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


def git(data: bytes) -> str:
    """The SHA-1 of git's blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
