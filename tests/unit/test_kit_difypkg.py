"""What kit_difypkg knows of a plugin without the daemon's tool; that it packages and signs is for a deploy to show."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import pytest
from ansible.modules import kit_difypkg

MANIFEST = 'version: 0.0.63\ntype: plugin\nauthor: "langgenius"\nname: "openai_api_compatible"\n'


def package(files: dict[str, str]) -> bytes:
    """A plugin package: a zip archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def test_a_package_tells_who_it_is() -> None:
    content = package({"manifest.yaml": MANIFEST, "main.py": ""})
    assert kit_difypkg.identity(kit_difypkg.manifest_of(content)) == "langgenius/openai_api_compatible:0.0.63"


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", package({"main.py": ""})])
def test_something_else_than_a_package(content: bytes) -> None:
    with pytest.raises(kit_difypkg.PackageError, match=r"no plugin package(.|\n)*Remedy: name a \.difypkg"):
        kit_difypkg.manifest_of(content)


def test_a_manifest_without_a_name() -> None:
    with pytest.raises(kit_difypkg.PackageError, match="lacks name"):
        kit_difypkg.identity("version: 1\nauthor: a\n")


@pytest.mark.parametrize("other", [({"a": b"1", "b": b"3"}, b"key"), ({"a": b"1", "c": b"2"}, b"key"), None])
def test_content_and_key_name_the_result(other: Any) -> None:
    first = kit_difypkg.fingerprint({"a": b"1", "b": b"2"}, b"key")
    files, key = other or ({"a": b"1", "b": b"2"}, b"another")
    assert kit_difypkg.fingerprint(files, key) != first
    assert kit_difypkg.fingerprint({"b": b"2", "a": b"1"}, b"key") == first
