"""Packages and signs Dify plugins on the host. The action plugin of the same name sends the files."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.kit_plugin import PackageError, describe, identity

DOCUMENTATION = r"""
module: kit_difypkg
short_description: Packages and signs Dify plugins
description:
  - Does it with the plugin daemon's own command line tool, once for each content and key.
  - The result's name is made from both, so an unchanged plugin is the same file and nothing is sent again.
  - A package that is there already is taken as it is if Dify's makers signed it, and signed with the site's key if not.
    One of the marketplace must be signed by them.
  - Returns C(plugins), for each a dict with C(package), its path, and C(identifier), by which Dify and its plugin
    daemon know it (C(author/name:version@checksum of the content)). In check mode both are empty for a new one.
options:
  plugins:
    type: list
    elements: dict
    required: true
    description:
      - C(source), a plugin's folder on the controller; or C(file), a package on the controller; or C(id) and
        C(version), a plugin of the marketplace.
  marketplace: {type: str, default: "", description: "The marketplace's address, for plugins with an id."}
  cli: {type: path, required: true, description: "The plugin daemon's command line tool, on the host."}
  signing_key: {type: path, required: true, description: "The site's private key, on the host."}
  cache: {type: path, required: true, description: "Folder for the results, on the host."}
author: [Dify deployment kit]
"""

# A package of the marketplace is at most that large.
DOWNLOAD_BYTES = 500 * 1024 * 1024


def fingerprint(files: dict[str, bytes], key: bytes) -> str:
    """Names a content signed with a key."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    digest.update(hashlib.sha256(key).digest())
    return digest.hexdigest()[:24]


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
            "Remedy: correct what it names in the plugin, or remove the tool so that it is built anew."
        )
    return done.stdout


def build(files: dict[str, bytes], cli: Path, key: Path, target: Path) -> None:
    """Writes the signed package of a plugin's files to `target`."""
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


def adopt(content: bytes, cli: Path, key: Path | None, target: Path) -> None:
    """Writes somebody's package to `target`: as it is if Dify's makers signed it, else signed with the site's key.

    Raises:
        PackageError: there is no key to sign with, and Dify's makers have not.
    """
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        package = Path(folder, "plugin.difypkg")
        package.write_bytes(content)
        official = subprocess.run([str(cli), "signature", "verify", str(package)], capture_output=True, check=False)
        if official.returncode == 0:
            os.replace(package, target)
        elif key:
            sign(package, cli, key, target)
        else:
            raise PackageError(
                "What the marketplace gave is not signed by Dify's makers; it was not kept.\n"
                "Remedy: find out who answers there. A package that you trust can be named as a file in dify_plugins."
            )


def download(marketplace: str, plugin_id: str, version: str) -> bytes:
    """A package of the marketplace; proxies and certificates come from the environment."""
    url = f"{marketplace.rstrip('/')}/api/v1/plugins/{plugin_id}/{version}/download"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content: bytes = answer.read(DOWNLOAD_BYTES)
            return content
    except (OSError, ValueError) as error:
        there = isinstance(error, urllib.error.HTTPError)
        raise PackageError(
            f"{plugin_id} {version} cannot be had from the marketplace: {url} says {error}.\nRemedy: "
            + (
                f"is there such a version? See {marketplace.rstrip('/')}/plugins/{plugin_id}"
                if there
                else "let the host reach it, or name a proxy (kit_https_proxy)."
            )
            + " Or give the package as a file in dify_plugins; `make plugin-package` packs one that needs no network."
        ) from None


def checksum(cli: Path, package: Path) -> str:
    """The daemon's checksum of the package's content."""
    said = run(cli, "plugin", "checksum", str(package))
    found = re.search(r"checksum=([0-9a-f]{64})", said)
    if not found:
        raise PackageError(f"The tool tells no checksum: {said.strip()[-300:]}\nRemedy: report it with the release.")
    return found[1]


class Packages:
    """Makes what is wanted and not there yet."""

    def __init__(self, parameters: dict[str, Any], *, check: bool) -> None:
        self.cli, self.key, self.cache = (Path(parameters[name]) for name in ("cli", "signing_key", "cache"))
        self.marketplace: str = parameters["marketplace"]
        self.check = check
        self.changed = False
        self.needed: list[str] = []

    def one(self, wanted: dict[str, Any]) -> dict[str, str]:
        """Path and identifier of a plugin's package. Notes in `needed` a file that the controller must send first."""
        for path in (self.cli, self.key):
            if not path.is_file():
                if self.check:
                    self.changed = True
                    return {"package": "", "identifier": ""}
                raise PackageError(f"{path} is missing.\nRemedy: `make deploy` makes it in the step plugin_daemon.")
        files: dict[str, bytes] = {}
        if "payload" in wanted:
            packed = json.loads(zlib.decompress(base64.b64decode(wanted["payload"])))
            files = {name: base64.b64decode(content) for name, content in packed.items()}
            name, mark = identity(files["manifest.yaml"].decode()), fingerprint(files, self.key.read_bytes())
        elif "id" in wanted:
            name, mark = f"{wanted['id']}:{wanted['version']}", "marketplace"
        else:
            name, mark = wanted["name"], fingerprint({"": wanted["sha256"].encode()}, self.key.read_bytes())
        stem = f"{name.replace('/', '-').replace(':', '-')}-{mark}"
        package, record = self.cache / f"{stem}.difypkg", self.cache / f"{stem}.id"
        if package.is_file() and record.is_file():
            return {"package": str(package), "identifier": record.read_text().strip()}
        self.changed = True
        if self.check:
            return {"package": str(package), "identifier": ""}
        if "sha256" in wanted and "sent" not in wanted:
            self.needed.append(wanted["sha256"])
            return {"package": "", "identifier": ""}
        self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if files:
            build(files, self.cli, self.key, package)
        elif "id" in wanted:
            content = download(self.marketplace, wanted["id"], wanted["version"])
            found = describe(content, f"What the marketplace gave as {name}")[0]
            if found != name:
                raise PackageError(f"The marketplace gave {found} as {name}.\nRemedy: find out who answers there.")
            adopt(content, self.cli, None, package)
        else:
            adopt(Path(wanted["sent"]).read_bytes(), self.cli, self.key, package)
        record.write_text(f"{name}@{checksum(self.cli, package)}\n")
        return {"package": str(package), "identifier": record.read_text().strip()}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "plugins": {"type": "list", "elements": "dict", "required": True},
            "marketplace": {"type": "str", "default": ""},
            "cli": {"type": "path", "required": True},
            "signing_key": {"type": "path", "required": True, "no_log": False},
            "cache": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    packages = Packages(module.params, check=module.check_mode)
    try:
        plugins = [packages.one(wanted) for wanted in module.params["plugins"]]
        module.exit_json(changed=packages.changed, plugins=plugins, needed=packages.needed)
    except PackageError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error}\nRemedy: give the kit's user that path and room on its disk, then run again.")


if __name__ == "__main__":
    main()
