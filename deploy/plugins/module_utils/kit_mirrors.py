"""``kit_mirrors: auto``: which mirror a host reads fastest, measured once and then kept.

Runs on the host, standard library only: what counts is its way to the mirrors, with its proxy and its certificates.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from .kit_fetch import wheel_url
from .kit_network import opener

PAGE_SECONDS, FILE_SECONDS = 8.0, 4.0
FILE_BYTES = 1 << 20
#: Mirrors whose downloads are measured, of those that gave the page first; the source's always is.
FINALISTS = 2
#: What a typical fetch is taken to be, in bytes.
TYPICAL_BYTES = 4 << 20
#: A mirror is taken when it is that much faster: the source is newer, and nobody stands between.
FACTOR = 2.0


@dataclass(frozen=True)
class Measured:
    """How fast one address was: seconds until the page was there, bytes a second of the file; ``fault``: why not."""

    address: str
    seconds: float = 0.0
    rate: float = 0.0
    fault: str = ""

    @property
    def estimate(self) -> float:
        """Seconds that a typical fetch takes."""
        return self.seconds + TYPICAL_BYTES / self.rate if self.rate and not self.fault else float("inf")

    def __str__(self) -> str:
        if self.fault:
            return f"{self.address} ({self.fault})"
        return f"{self.address} ({self.seconds:.2f} s, {self.rate / 1e6:.1f} MB/s)"


def _page(address: str, known: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[Measured, str]:
    """How long the page took, and the address of the file."""
    url = f"{address}/{known['page']}"
    begin = time.monotonic()
    try:
        with opener(url, environment).open(url, timeout=PAGE_SECONDS) as response:
            text = response.read(FILE_BYTES).decode("utf-8", "replace")
            file: str | None = f"{address}/{known['file']}" if "file" in known else None
            if "link" in known and not (file := wheel_url(response.url, text, known["link"])):
                return Measured(address, fault=f"has no {known['link']}"), ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Measured(address, fault=_reason(error)), ""
    return Measured(address, time.monotonic() - begin), str(file)


def _file(page: Measured, url: str, environment: Mapping[str, str]) -> Measured:
    """The page's measurement with the file's rate: its beginning, for some seconds at most."""
    begin, size = time.monotonic(), 0
    try:
        with opener(url, environment).open(url, timeout=PAGE_SECONDS) as response:
            begin = time.monotonic()
            while size < FILE_BYTES and time.monotonic() - begin < FILE_SECONDS and (block := response.read1(1 << 16)):
                size += len(block)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Measured(page.address, fault=_reason(error))
    return Measured(page.address, page.seconds, size / max(time.monotonic() - begin, 1e-3))


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"answers {error.code}"
    reason = getattr(error, "reason", error)
    return "no answer in time" if isinstance(reason, TimeoutError) else str(getattr(reason, "strerror", "") or reason)


def measure(known: Mapping[str, Any], environment: Mapping[str, str]) -> list[Measured]:
    """The source first, then its mirrors. Pages side by side, files one by one: they would share the line."""
    addresses = [known["source"], *known["mirrors"]]
    with ThreadPoolExecutor(max_workers=len(addresses)) as pool:
        pages = list(pool.map(lambda address: _page(address, known, environment), addresses))
    mirrors = sorted((page for page, _ in pages[1:] if not page.fault), key=lambda page: page.seconds)
    finalists = {addresses[0], *(page.address for page in mirrors[:FINALISTS])}
    return [
        page if page.fault or page.address not in finalists else _file(page, url, environment) for page, url in pages
    ]


def choose(measured: Iterable[Measured]) -> Measured | None:
    """The source, or a mirror that is much faster; None where nobody answered."""
    source, *mirrors = measured
    best = min(mirrors, key=lambda one: one.estimate, default=source)
    if best.estimate * FACTOR < source.estimate:
        return best
    return None if source.estimate == float("inf") else source


class Mirrors:
    """The mirrors of one run: named by the site, chosen by an earlier run, or measured now.

    ``parameters``: ``mode`` (named or auto), ``named`` (kind -> address, may be empty), ``recorded`` (kind -> an
    earlier choice), ``kinds`` that this host needs, ``known`` (deploy/mirrors.yml).
    """

    def __init__(self, parameters: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.named, self.known = parameters["named"], parameters["known"]
        self.environment = environment
        auto = parameters["mode"] == "auto"
        self.kinds = [kind for kind in parameters["kinds"] if auto and not self.named.get(kind)]
        self.recorded = {kind: parameters["recorded"][kind] for kind in self.kinds if kind in parameters["recorded"]}
        self.chosen: dict[str, dict[str, Any]] = {}
        self.notices: list[str] = []

    def address(self, kind: str) -> str:
        """Where things of that kind come from."""
        choice = self.chosen.get(kind) or self.recorded.get(kind) or {}
        # Of a GOPROXY list the first that is an address counts.
        named = next((part for part in str(self.named.get(kind, "")).split(",") if "://" in part), "")
        return str(named or choice.get("address") or self.known[kind]["source"]).rstrip("/")

    def open_kinds(self) -> list[str]:
        """Kinds that nothing has been chosen for."""
        return [kind for kind in self.kinds if kind not in self.recorded and kind not in self.chosen]

    def decide(self, kind: str) -> bool:
        """Measure and choose; whether anybody answered."""
        measured = measure(self.known[kind], self.environment)
        best = choose(measured)
        others = ", ".join(str(one) for one in measured if one is not best)
        if best is None:
            return False
        self.chosen[kind] = asdict(best) | {"measured": time.strftime("%Y-%m-%d")}
        self.notices.append(f"kit_mirrors measured for {kind}, chosen: {best}; others: {others}")
        return True

    def may_decide_again(self, kind: str) -> bool:
        """Whether the choice is an earlier run's, so that it may have gone bad since."""
        return kind in self.recorded and kind not in self.chosen

    def summary(self) -> list[str]:
        """What was chosen, for people: in full when it was measured now."""
        kept = [f"{kind} {choice['address']}" for kind, choice in self.recorded.items() if kind not in self.chosen]
        return self.notices + ([f"kit_mirrors, chosen by an earlier run: {', '.join(kept)}"] if kept else [])
