"""Packages and signs a Dify plugin on the host. The action plugin of the same name sends the files."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
import zipfile
import zlib
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: kit_difypkg
short_description: Packages and signs a Dify plugin
description:
  - Does it with the plugin daemon's own command line tool, once for each content and key.
  - The result's name is made from both, so an unchanged plugin is the same file.
  - A package that is there already is taken as it is if Dify's makers signed it, and signed with the site's key if not.
  - Returns C(package), its path, and C(identifier), by which Dify and its plugin daemon know it
    (C(author/name:version@checksum of the content)).
options:
  source: {type: path, description: The plugin's folder on the controller.}
  package: {type: path, description: "Instead of a folder, a package on the host."}
  cli: {type: path, required: true, description: "The plugin daemon's command line tool, on the host."}
  signing_key: {type: path, required: true, description: "The site's private key, on the host."}
  cache: {type: path, required: true, description: "Folder for the results, on the host."}
author: [Dify deployment kit]
"""


class PackageError(Exception):
    """The plugin could not be packaged; the text says what to do."""


def fingerprint(files: dict[str, bytes], key: bytes) -> str:
    """Names a content signed with a key."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    digest.update(hashlib.sha256(key).digest())
    return digest.hexdigest()[:24]


def identity(manifest: str) -> str:
    """`author/name:version` of a manifest."""
    # Three top-level lines do not need a YAML library on the host.
    found = {name: re.search(rf"^{name}:\s*['\"]?([\w.-]+)", manifest, re.M) for name in ("author", "name", "version")}
    missing = [name for name, match in found.items() if not match]
    if missing:
        raise PackageError(f"manifest.yaml lacks {', '.join(missing)}.\nRemedy: add it.")
    author, name, version = (match[1] for match in found.values() if match)
    return f"{author}/{name}:{version}"


def run(cli: Path, *arguments: str) -> str:
    """What the tool says; PackageError with its words if it fails."""
    # The tool writes its files with mode 0644 unless told otherwise.
    done = subprocess.run(
        [str(cli), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
        umask=0o077,
    )
    if done.returncode:
        raise PackageError(
            f"`{cli.name} {' '.join(arguments[:2])}` failed ({done.returncode}): {done.stdout.strip()[-1000:]}\n"
            "Remedy: correct what it names in inference/provider_plugin, or remove the tool so that it is built anew."
        )
    return done.stdout


def build(files: dict[str, bytes], cli: Path, key: Path, target: Path) -> None:
    """Writes the signed package of a plugin's files to `target`."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        plugin, package = Path(folder, "plugin"), Path(folder, "plugin.difypkg")
        for name, content in files.items():
            path = plugin / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        run(cli, "plugin", "package", str(plugin), "-o", str(package))
        sign(package, cli, key, target)


def sign(package: Path, cli: Path, key: Path, target: Path) -> None:
    """Signs a package with the site's key; `package` is alone in its folder."""
    # Not one of Dify's own: the daemon trusts it for the site's key, not for this word.
    run(cli, "signature", "sign", str(package), "-p", str(key), "-c", "community")
    os.replace(package.with_name(f"{package.stem}.signed.difypkg"), target)


def adopt(content: bytes, cli: Path, key: Path, target: Path) -> None:
    """Writes somebody's package to `target`: as it is if Dify's makers signed it, else signed with the site's key."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        package = Path(folder, "plugin.difypkg")
        package.write_bytes(content)
        official = subprocess.run([str(cli), "signature", "verify", str(package)], capture_output=True, check=False)
        if official.returncode == 0:
            os.replace(package, target)
        else:
            sign(package, cli, key, target)


def manifest_of(content: bytes) -> str:
    """The manifest.yaml of a package."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.read("manifest.yaml").decode()
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise PackageError(
            f"provider_package is no plugin package ({error}).\n"
            "Remedy: name a .difypkg, as the marketplace's page of the plugin or `dify plugin package` gives it."
        ) from None


def checksum(cli: Path, package: Path) -> str:
    """The daemon's checksum of the package's content."""
    said = run(cli, "plugin", "checksum", str(package))
    found = re.search(r"checksum=([0-9a-f]{64})", said)
    if not found:
        raise PackageError(f"The tool tells no checksum: {said.strip()[-300:]}\nRemedy: report it with the release.")
    return found[1]


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "payload": {"type": "str", "no_log": True},
            "package": {"type": "path"},
            "cli": {"type": "path", "required": True},
            "signing_key": {"type": "path", "required": True, "no_log": False},
            "cache": {"type": "path", "required": True},
        },
        supports_check_mode=True,
        required_one_of=[("payload", "package")],
    )
    cli, key, cache = (Path(module.params[name]) for name in ("cli", "signing_key", "cache"))
    try:
        if module.params["package"]:
            given = Path(module.params["package"])
            if module.check_mode and not given.is_file():
                module.exit_json(changed=True, package="", identifier="", msg=f"{given} would be sent first")
            files = {"": given.read_bytes()}
            name = identity(manifest_of(files[""]))
        else:
            packed = json.loads(zlib.decompress(base64.b64decode(module.params["payload"])))
            files = {name: base64.b64decode(content) for name, content in packed.items()}
            name = identity(files["manifest.yaml"].decode())
        for path in (cli, key):
            if not path.is_file():
                if module.check_mode:
                    module.exit_json(changed=True, package="", identifier="", msg=f"{path} would be made first")
                raise PackageError(f"{path} is missing.\nRemedy: `make deploy` makes it in the step plugin_daemon.")
        stem = f"{name.replace('/', '-').replace(':', '-')}-{fingerprint(files, key.read_bytes())}"
        package, record = cache / f"{stem}.difypkg", cache / f"{stem}.id"
        changed = not (package.is_file() and record.is_file())
        if changed and module.check_mode:
            module.exit_json(changed=True, package=str(package), identifier="")
        if changed:
            if module.params["package"]:
                adopt(files[""], cli, key, package)
            else:
                build(files, cli, key, package)
            record.write_text(f"{name}@{checksum(cli, package)}\n")
        module.exit_json(changed=changed, package=str(package), identifier=record.read_text().strip())
    except PackageError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error}\nRemedy: give the kit's user that path and room on its disk, then run again.")


if __name__ == "__main__":
    main()
