"""What the model hubs say: which files a revision has, with sizes and hashes; their content; and why they refuse.

Not through the hubs' own libraries. huggingface_hub (2.4.0) gives up a partial file when its process ends and checks no
hash, so that a fetch that was killed begins its 5 GB files again; modelscope-hub (0.5.1) does both, but for ModelScope
alone. Their routes are few: requests, redirects, proxies and certificates are left to requests.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests
from urllib3.util import Retry

from inference.download import BLOCK, File, Passing, Unavailable
from inference.problem import Problem

TIMEOUT = (10, 60)  # seconds until connected, and without a byte
# The system's certificates: they know a company's own authority, those that come with requests do not.
CA_BUNDLES = "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"
# What an engine reads. Code of a model's repository is never run, so it is not fetched; nor are other formats.
WANTED = re.compile(r"(?!kit-weights\.json)[^/]+\.(safetensors|json|jinja|model|tiktoken|txt)|LICENSE[^/]*|README\.md")


@dataclass(frozen=True)
class Listing:
    """A revision's files; ``revision`` is the commit that the hub made of what was asked for."""

    revision: str
    files: list[File]


class Hub(ABC):
    """One address that speaks a hub's routes."""

    def __init__(self, name: str, address: str, repository: str, token: str = "") -> None:
        if urlsplit(address).scheme not in ("http", "https"):
            raise Problem(
                f"{address!r} is no hub's address. Remedy: one with its scheme, as https://hf-mirror.com "
                "(inference_hub_mirror, HF_ENDPOINT)."
            )
        self.name = name
        self.repository = repository
        self._address = address.rstrip("/")
        self._token = token

    @property
    def address(self) -> str:
        """Without a password, for people and files."""
        parts = urlsplit(self._address)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    @abstractmethod
    def listing(self, revision: str) -> Listing:
        """The files that an engine needs of a revision: a commit, a branch or a tag.

        Raises:
            Passing: a fault that may be gone at the next try.
            Unavailable: there is no such repository or revision, or no such hub.
            Problem: it refuses, and says what must be done.
        """

    @abstractmethod
    def url(self, revision: str, file: File) -> str:
        """Where a file's content is."""

    def open(self, revision: str, file: File, offset: int) -> tuple[int, Iterator[bytes]]:
        """A file's content from a byte on: where it begins, and blocks; raises as :meth:`listing`."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        response = self._request("GET", self.url(revision, file), headers=headers, stream=True)
        begin = offset if response.status_code == 206 else 0

        def blocks() -> Iterator[bytes]:
            with response:
                try:
                    yield from response.iter_content(BLOCK)
                except requests.RequestException as error:
                    raise Passing(f"{file.name} broke off: {_reason(error)}") from None

        return begin, blocks()

    def _request(self, method: str, url: str, **options: Any) -> requests.Response:
        """An answer that is a success; anything else is raised. A session each, as they are not for threads."""
        with requests.Session() as session:
            session.headers.update({"User-Agent": "dify-kit", "Accept-Encoding": "identity"})
            session.verify = os.environ.get("SSL_CERT_FILE") or next(filter(os.path.isfile, CA_BUNDLES), True)
            self._sign(session)
            try:
                response = session.request(method, url, timeout=TIMEOUT, **options)
            except requests.exceptions.SSLError:
                raise Unavailable(
                    f"{self.address} shows a certificate that is not trusted here. Remedy: behind a company's own "
                    "certificate authority, kit_ca_bundle (SSL_CERT_FILE) must name a file that has it."
                ) from None
            except requests.exceptions.InvalidURL as error:
                raise Problem(f"{self.address} is no address: {error}. Remedy: correct inference_hub_mirror.") from None
            except requests.RequestException as error:
                raise Passing(f"{self.name} ({self.address}) does not answer: {_reason(error)}") from None
        if response.status_code >= 400:
            self._refused(response)
        return response

    def _sign(self, session: requests.Session) -> None:
        if self._token:
            session.auth = _Bearer(self._token)

    def _refused(self, response: requests.Response) -> None:
        """Raise what an error status means."""
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        told = response.headers.get("X-Error-Message", "") or _message(response)
        said = f" ({told})" if told else ""
        if status in (408, 429, 500, 502, 503, 504):
            retry = response.headers.get("Retry-After")
            try:
                wait = Retry().parse_retry_after(retry) if retry else None
            except Exception:  # a value that is neither seconds nor a date
                wait = None
            reason = "is asked too often" if status == 429 else "has trouble"
            raise Passing(f"{self.name} {reason}: it answers {status}{said}", wait)
        if status == 416:
            raise Passing(f"{self.name} has less of the file than was fetched of it")
        if status == 404 or code in ("RepoNotFound", "RevisionNotFound", "EntryNotFound"):
            what = {
                "RepoNotFound": f"no repository {self.repository} (or it is private)",
                "RevisionNotFound": f"no such revision of {self.repository}",
            }.get(code, "not what was asked for")
            raise Unavailable(
                f"{self.name} ({self.address}) has {what}: it answers {status}{said}. Remedy: look at "
                f"{self.page}, and correct repository and revision in the model's catalog entry (without a revision "
                "the newest is taken, and recorded)."
            )
        store = urlsplit(response.url).hostname
        if status in (401, 403) and store != urlsplit(self._address).hostname:
            raise Passing(f"{store}, where {self.name} keeps its files, answers {status}{said}")
        if status in (401, 403):
            raise Problem(self._gated(status, said))
        raise Unavailable(f"{self.name} ({self.address}) answers {status}{said}. Remedy: see what {self.page} says.")

    @property
    def page(self) -> str:
        """The repository's page for people."""
        return f"{self.address}/{self.repository}"

    def _gated(self, status: int, said: str) -> str:
        variable = "inference_hub_token or " + self.token_variable
        if self._token:
            return (
                f"{self.name} does not give {self.repository} to this token: it answers {status}{said}. Remedy: log in "
                f"as its owner, accept the licence at {self.page}, wait for the consent if one is needed, and see that "
                f"the token ({variable}) is valid and may read such repositories."
            )
        return (
            f"{self.name} gives {self.repository} only to who has accepted its licence: it answers {status}{said}."
            f" Remedy: log in and accept it at {self.page}, make a token that may read, and give it as {variable}."
        )

    token_variable = "HF_TOKEN"


class HuggingFace(Hub):
    """Hugging Face and every mirror with its routes (hf-mirror, Artifactory, Nexus, Olah ...)."""

    def listing(self, revision: str) -> Listing:
        """See :meth:`Hub.listing`. One question tells everything, unless a mirror leaves hashes out."""
        url = f"{self._address}/api/models/{self.repository}/revision/{quote(revision, safe='')}"
        answer = _json(self, self._request("GET", url, params={"blobs": "true"}))
        try:
            commit = str(answer["sha"])
            files = [self._file(commit, raw) for raw in answer["siblings"] if WANTED.fullmatch(raw["rfilename"])]
        except (KeyError, TypeError) as error:
            raise Unavailable(_odd(self, f"without {error}")) from None
        return Listing(commit, files)

    def url(self, revision: str, file: File) -> str:
        """See :meth:`Hub.url`."""
        return f"{self._address}/{self.repository}/resolve/{revision}/{quote(file.name)}"

    def _file(self, commit: str, raw: dict[str, Any]) -> File:
        name, lfs = raw["rfilename"], raw.get("lfs") or {}
        if lfs.get("sha256"):
            return File(name, int(lfs["size"]), sha256=lfs["sha256"])
        if raw.get("blobId") and raw.get("size") is not None:
            return File(name, int(raw["size"]), git=raw["blobId"])
        # A mirror that lists names only tells the rest in the headers of each file.
        headers = self._request("HEAD", self.url(commit, File(name, 0)), allow_redirects=False).headers
        tag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
        if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", tag):
            raise Unavailable(
                f"{self.name} ({self.address}) names no hash of {name}, so that nothing could be checked. "
                "Remedy: choose another source (inference_weights_source)."
            )
        count = int(headers.get("X-Linked-Size") or headers["Content-Length"])
        return File(name, count, sha256=tag if len(tag) == 64 else "", git=tag if len(tag) == 40 else "")


class ModelScope(Hub):
    """ModelScope."""

    token_variable = "MODELSCOPE_API_TOKEN"

    def listing(self, revision: str) -> Listing:
        """See :meth:`Hub.listing`. The commit of a branch is not always told; the files' hashes are."""
        url = f"{self._address}/api/v1/models/{self.repository}/repo/files"
        answer = _json(self, self._request("GET", url, params={"Revision": revision, "Recursive": "False"}))
        if not answer.get("Success", True):
            raise Unavailable(
                f"{self.name} has no {self.repository} at {revision}: {answer.get('Message')}. Remedy: look at "
                f"{self.page}, and correct repository and revision in the model's catalog entry."
            )
        try:
            data = answer["Data"]
            files = [
                File(raw["Path"], int(raw["Size"]), sha256=raw["Sha256"])
                for raw in data["Files"]
                if raw.get("Type") != "tree" and WANTED.fullmatch(raw["Path"])
            ]
        except (KeyError, TypeError) as error:
            raise Unavailable(_odd(self, f"without {error}")) from None
        return Listing((data.get("LatestCommitter") or {}).get("Id") or revision, files)

    def url(self, revision: str, file: File) -> str:
        """See :meth:`Hub.url`."""
        query = f"Revision={quote(revision, safe='')}&FilePath={quote(file.name, safe='')}"
        return f"{self._address}/api/v1/models/{self.repository}/repo?{query}"

    @property
    def page(self) -> str:
        """See :attr:`Hub.page`."""
        return f"{self.address}/models/{self.repository}"

    def _sign(self, session: requests.Session) -> None:
        super()._sign(session)
        if self._token:  # its older routes look for this cookie instead
            session.cookies.set("m_session_id", self._token, domain=urlsplit(self._address).hostname or "")


class _Bearer(requests.auth.AuthBase):
    """The token as a header; requests does not take it along to another host (the hubs redirect to their stores)."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def read_token(path: Path) -> str:
    """A token from a file that only its owner can read.

    Raises:
        Problem: it cannot be read, or others can read it too.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise Problem(f"Others can read the token in {path}. Remedy: chmod 600 {path}")
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise Problem(f"The token in {path} cannot be read: {error.strerror}. Remedy: write it there.") from None


def _json(hub: Hub, response: requests.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise Unavailable(_odd(hub, "that is no JSON")) from None


def _odd(hub: Hub, how: str) -> str:
    return (
        f"{hub.name} ({hub.address}) gives an answer {how}. Remedy: see with a browser whether a proxy's page or "
        "something else than a hub answers there."
    )


def _message(response: requests.Response) -> str:
    """What a JSON body says about an error."""
    try:
        body = response.json()
        return str(body.get("error") or body.get("Message") or "")[:200]
    except (ValueError, AttributeError, requests.RequestException):
        return ""


def _reason(error: BaseException) -> str:
    """The fault at the bottom of requests' and urllib3's wrapping."""
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy does not let it through"
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"not connected within {TIMEOUT[0]} s"
    if isinstance(error, requests.exceptions.ReadTimeout) or "Read timed out" in str(error):
        return f"nothing came for {TIMEOUT[1]} s"
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and not isinstance(cause, requests.RequestException) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return (
        "the connection broke" if isinstance(error, requests.exceptions.ChunkedEncodingError) else type(error).__name__
    )
