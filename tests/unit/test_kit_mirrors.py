"""`kit_mirrors: auto`, against servers that are as fast as they are told to be."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import kit_mirrors, kit_mirrors_file
from ansible.module_utils.kit_mirrors import Measured, Mirrors

SIZE = 1 << 18


class Registry:
    """Has a page and a file; waits before each answer, and sends the file at a rate (bytes a second)."""

    def __init__(self, wait: float = 0.0, rate: float = 1e9) -> None:
        self.asked: list[str] = []
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                time.sleep(wait)
                body = b'<a href="/files/a-1.whl#sha256=0">a-1.whl</a>' if self.path == "/simple/a/" else bytes(SIZE)
                found = self.path in ("/simple/a/", "/files/a-1.whl")
                self.send_response(200 if found else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for start in range(0, len(body), 1 << 15):
                    piece = body[start : start + (1 << 15)]
                    time.sleep(len(piece) / rate)
                    self.wfile.write(piece)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/simple"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def registries() -> Iterator[dict[str, Registry]]:
    made = {"slow": Registry(0.5, 1.5e5), "quick": Registry(), "far": Registry(0.8), "thin": Registry(0, 1e5)}
    yield made
    for registry in made.values():
        registry.close()


def known(source: Registry, *mirrors: Registry) -> dict[str, Any]:
    addresses = [mirror.address for mirror in mirrors]
    return {"source": source.address, "mirrors": addresses, "page": "a/", "link": "a-1.whl"}


def mirrors(known_: dict[str, Any], mode: str = "auto", **changes: Any) -> Mirrors:
    given = {"mode": mode, "named": {}, "recorded": {}, "kinds": ["pypi"], "known": {"pypi": known_}}
    return Mirrors(given | changes, {})


def test_what_is_measured_is_how_fast_a_server_is(registries: dict[str, Registry]) -> None:
    slow, quick = kit_mirrors.measure(known(registries["slow"], registries["quick"]), {})
    assert slow.seconds >= 0.2
    assert slow.rate <= 3.2e5
    assert quick.rate > 2 * slow.rate
    assert (slow.fault, quick.fault) == ("", "")


def test_the_much_faster_mirror_is_chosen_and_the_figures_are_said(registries: dict[str, Registry]) -> None:
    used = mirrors(known(registries["slow"], registries["thin"], registries["quick"]))
    assert used.open_kinds() == ["pypi"]
    assert used.decide("pypi")
    assert used.address("pypi") == used.chosen["pypi"]["address"] == registries["quick"].address
    (line,) = used.summary()
    assert f"chosen: {registries['quick'].address} (" in line
    assert line.count("MB/s") == 3


@pytest.mark.parametrize(
    ("source", "mirror", "taken"),
    [
        (Measured("s", 0.1, 1e6), Measured("m", 0.1, 1.9e6), "s"),
        (Measured("s", 0.1, 1e6), Measured("m", 0.1, 2.2e6), "m"),
        (Measured("s", fault="no answer in time"), Measured("m", 3, 1e4), "m"),
        (Measured("s", 0.1, 1e4), Measured("m", fault="answers 404"), "s"),
        (Measured("s", 0.1, 1e4), Measured("m", 0.01), "s"),
        (Measured("s", fault="x"), Measured("m", fault="y"), None),
    ],
)
def test_the_source_unless_a_mirror_is_twice_as_fast(source: Measured, mirror: Measured, taken: str | None) -> None:
    chosen = kit_mirrors.choose([source, mirror])
    assert (chosen and chosen.address) == taken


def test_a_dead_mirror_is_no_candidate(registries: dict[str, Registry]) -> None:
    registries["quick"].close()
    used = mirrors(known(registries["slow"], registries["quick"]))
    assert used.decide("pypi")
    assert used.address("pypi") == registries["slow"].address
    assert "Connection refused" in used.summary()[0]
    registries["quick"] = Registry()  # for the fixture to close


def test_a_choice_stays_and_nobody_is_asked_again(registries: dict[str, Registry], tmp_path: Path) -> None:
    file = tmp_path / "mirrors.json"
    first = mirrors(known(registries["slow"], registries["quick"]))
    first.decide("pypi")
    kit_mirrors_file.record(file, "one", first.chosen)
    before = len(registries["quick"].asked)
    again = mirrors(known(registries["quick"], registries["slow"]), recorded=kit_mirrors_file.read(file, "one"))
    assert (again.open_kinds(), again.address("pypi")) == ([], registries["quick"].address)
    assert len(registries["quick"].asked) == before
    assert again.summary() == [f"kit_mirrors, chosen by an earlier run: pypi {registries['quick'].address}"]
    assert again.may_decide_again("pypi")
    assert again.decide("pypi")
    assert not again.may_decide_again("pypi")


def test_what_the_site_names_is_not_measured() -> None:
    used = mirrors({"source": "https://s"}, named={"pypi": "https://mine/simple/"})
    assert (used.kinds, used.address("pypi")) == ([], "https://mine/simple")
    assert mirrors({"source": "https://s"}, mode="named").kinds == []
    assert mirrors({"source": "https://s"}, named={"pypi": "off,https://g,direct"}).address("pypi") == "https://g"


def test_the_tools_are_told_of_the_choice(tmp_path: Path) -> None:
    file, sources = tmp_path / "mirrors.json", {"pypi": "https://p", "go": "https://g", "npm": "https://n"}
    kit_mirrors_file.record(file, "one", {"pypi": {"address": "https://p"}, "go": {"address": "https://mg"}})
    kit_mirrors_file.record(file, "one", {"npm": {"address": "https://mn"}})
    kit_mirrors_file.record(file, "two", {"pypi": {"address": "https://mp"}})
    named = {"pypi": "", "go": "", "npm": "https://mine", "git": ""}
    used = kit_mirrors_file.used(named, "auto", str(file), "one", sources)
    assert used == {"pypi": "", "go": "https://mg,direct", "npm": "https://mine", "git": ""}
    assert kit_mirrors_file.used(named, "named", str(file), "one", sources) == named
    file.write_text("{")
    assert kit_mirrors_file.used(named, "auto", str(file), "one", sources) == named
