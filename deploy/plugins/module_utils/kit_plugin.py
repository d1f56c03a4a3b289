"""What a Dify plugin's package (.difypkg, a zip archive) says of itself. Standard library only: runs on the hosts."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

#: org/name of a plugin; what Dify's daemon accepts as well.
PLUGIN_ID = re.compile(r"[a-z0-9_-]{1,64}/[a-z0-9_-]{1,255}")
VERSION = re.compile(r"\d+(\.\d+){1,3}(-\w{1,16})?")


class PackageError(Exception):
    """The plugin could not be read or packaged; the text says what to do."""


def identity(manifest: str) -> str:
    """`author/name:version` of a manifest."""
    # Three top-level lines do not need a YAML library on the host.
    found = {name: re.search(rf"^{name}:\s*['\"]?([\w.-]+)", manifest, re.M) for name in ("author", "name", "version")}
    missing = [name for name, match in found.items() if not match]
    if missing:
        raise PackageError(f"manifest.yaml lacks {', '.join(missing)}.\nRemedy: add it.")
    author, name, version = (match[1] for match in found.values() if match)
    return f"{author}/{name}:{version}"


def describe(package: Path | bytes, name: str) -> tuple[str, int]:
    """Identity and unpacked size in bytes of a package; `name` is what a person calls it.

    Raises:
        PackageError: it is none.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(package) if isinstance(package, bytes) else package) as archive:
            manifest = archive.read("manifest.yaml").decode()
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise PackageError(
            f"{name} is no plugin package ({error}).\n"
            "Remedy: name a .difypkg, as the marketplace's page of the plugin or `dify plugin package` gives it."
        ) from None
    return identity(manifest), size
