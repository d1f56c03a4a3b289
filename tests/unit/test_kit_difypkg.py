"""What kit_difypkg knows without the daemon's tool; that it packages and signs is for tests with a daemon to show."""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.kit_plugin import PackageError, describe, identity
from ansible.modules import kit_difypkg
from filter.kit_dify import plugin_parts

MANIFEST = 'version: 0.0.63\ntype: plugin\nauthor: "langgenius"\nname: "openai_api_compatible"\n'
NAME = "langgenius/openai_api_compatible:0.0.63"


def package(files: dict[str, str]) -> bytes:
    """A plugin package: a zip archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def test_a_package_tells_who_it_is() -> None:
    assert describe(package({"manifest.yaml": MANIFEST, "main.py": "12345"}), "x") == (NAME, len(MANIFEST) + 5)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", package({"main.py": ""}), Path("/no/such")])
def test_something_else_than_a_package(content: bytes | Path) -> None:
    with pytest.raises(PackageError, match=r"x is no plugin package(.|\n)*Remedy: name a \.difypkg"):
        describe(content, "x")


def test_a_manifest_without_a_name() -> None:
    with pytest.raises(PackageError, match="lacks name"):
        identity("version: 1\nauthor: a\n")


@pytest.mark.parametrize("other", [({"a": b"1", "b": b"3"}, b"key"), ({"a": b"1", "c": b"2"}, b"key"), None])
def test_content_and_key_name_the_result(other: Any) -> None:
    first = kit_difypkg.fingerprint({"a": b"1", "b": b"2"}, b"key")
    files, key = other or ({"a": b"1", "b": b"2"}, b"another")
    assert kit_difypkg.fingerprint(files, key) != first
    assert kit_difypkg.fingerprint({"b": b"2", "a": b"1"}, b"key") == first


# The daemon's tool as far as these tests need it: nothing here is signed by Dify's makers.
TOOL = """#!/bin/sh
case "$1 $2" in
"signature verify") exit 1 ;;
"signature sign") cp "$3" "${3%.difypkg}.signed.difypkg" ;;
"plugin checksum") echo "checksum=$(sha256sum "$3" | cut -c1-64)" ;;
esac
"""


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[Any]:
    """Makes one run of the module; the marketplace is a server of the test's that knows one plugin."""
    (tmp_path / "cli").write_text(TOOL)
    (tmp_path / "cli").chmod(0o755)
    (tmp_path / "key").write_text("key")

    class Marketplace(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/api/v1/plugins/langgenius/openai_api_compatible/0.0.63/download"
            body = package({"manifest.yaml": MANIFEST}) if known else b"<html>"
            self.send_response(404 if "/0.0.1/" in self.path else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Marketplace)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def run(*, check: bool = False, **changes: Any) -> kit_difypkg.Packages:
        parameters = {
            "cli": str(tmp_path / "cli"),
            "signing_key": str(tmp_path / "key"),
            "cache": str(tmp_path / "cache"),
            "marketplace": f"http://127.0.0.1:{server.server_port}",
        }
        return kit_difypkg.Packages({**parameters, **changes}, check=check)

    yield run
    server.shutdown()
    server.server_close()


def test_a_file_is_sent_once(packages: Any, tmp_path: Path) -> None:
    wanted = {"name": NAME, "sha256": "a" * 64}
    asked = packages()
    asked.one(wanted)
    assert asked.needed == ["a" * 64]
    (tmp_path / "sent").write_bytes(package({"manifest.yaml": MANIFEST}))
    made = packages().one({**wanted, "sent": str(tmp_path / "sent")})
    assert made["identifier"].startswith(f"{NAME}@")
    again = packages()
    assert (again.one(wanted), again.changed, again.needed) == (made, False, [])
    other_key = packages(signing_key=str(tmp_path / "cli"))
    other_key.one(wanted)
    assert other_key.needed


def test_a_check_makes_and_asks_nothing(packages: Any, tmp_path: Path) -> None:
    for wanted in ({"name": NAME, "sha256": "a" * 64}, {"id": "langgenius/x", "version": "1.0"}):
        looking = packages(check=True)
        assert looking.one(wanted)["identifier"] == ""
        assert (looking.changed, looking.needed) == (True, [])
    looking = packages(check=True, cli="/not/built/yet")
    assert looking.one({"id": "langgenius/x", "version": "1.0"}) == {"package": "", "identifier": ""}
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"id": "langgenius/openai_api_compatible", "version": "0.0.63"}, "not signed by Dify's makers"),
        ({"id": "langgenius/openai_api_compatible", "version": "0.0.1"}, "says HTTP Error 404(.|\n)*such a version"),
        ({"id": "langgenius/other", "version": "0.0.2"}, "is no plugin package"),
    ],
)
def test_what_the_marketplace_gives_is_not_believed(
    packages: Any, tmp_path: Path, wanted: dict[str, str], expected: str
) -> None:
    with pytest.raises(PackageError, match=expected):
        packages().one(wanted)
    assert list((tmp_path / "cache").glob("*")) == []


def test_preflight_asks_for_what_was_not_fetched_yet(packages: Any, tmp_path: Path) -> None:
    wanted = {"id": "langgenius/openai_api_compatible", "version": "0.0.63"}
    [part] = plugin_parts([wanted, {"file": "/x.difypkg"}], str(tmp_path))
    # The same name as the module gives it.
    looking = packages(check=True, cache=str(tmp_path / "provider-plugin"))
    assert part["present"] == [looking.one(wanted)["package"].replace(".difypkg", ".id")]


def test_a_marketplace_out_of_reach(packages: Any) -> None:
    with pytest.raises(PackageError, match=r"refused(.|\n)*kit_https_proxy(.|\n)*make plugin-package"):
        packages(marketplace="http://127.0.0.1:9").one({"id": "a/b", "version": "1.0"})
