"""Make the controller's virtual environment from uv.lock, with nothing but Python's standard library.

A bare Debian has no pip and no ensurepip, so uv comes first: its wheel is a zip with one binary in it, taken from the
package index and checked against the hash in uv.lock. Then uv installs the locked set, hashes required.

Environment: ``KIT_PYPI_INDEX`` (or ``UV_DEFAULT_INDEX``, ``PIP_INDEX_URL``) names another index; proxies as usual.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import platform
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SYSTEM_CA = Path("/etc/ssl/certs/ca-certificates.crt")
PYPI = "https://pypi.org/simple"


class BootstrapError(Exception):
    """Something that a person must mend; the message says how."""


def index_url() -> str:
    """The package index to use, without a trailing slash."""
    for name in ("KIT_PYPI_INDEX", "UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        if os.environ.get(name):
            return os.environ[name].rstrip("/")
    return PYPI


def download(url: str) -> bytes:
    """A page or file; three tries, the system's certificates trusted beside Python's own."""
    context = ssl.create_default_context()
    if SYSTEM_CA.is_file() and not os.environ.get("SSL_CERT_FILE"):
        context.load_verify_locations(SYSTEM_CA)
    problem: Exception | None = None
    for attempt in range(3):
        try:
            with urllib.request.urlopen(url, timeout=60, context=context) as answer:
                data: bytes = answer.read()
                return data
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            problem = error
            time.sleep(attempt)
    raise BootstrapError(
        f"Cannot read {url}: {problem}\n"
        "Remedy: set https_proxy, or KIT_PYPI_INDEX to a package index that this machine reaches, and run again.\n"
        "A certificate problem: add your company's CA to the system bundle (update-ca-certificates)."
    )


def locked_uv(lock: str) -> tuple[str, str]:
    """File name and sha256 of uv's wheel for this machine, from the text of uv.lock."""
    machine = {"x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}.get(platform.machine())
    libc = "musllinux" if platform.libc_ver()[0] != "glibc" else "manylinux"
    for url, digest in re.findall(r'url = "([^"]+/uv-[^"]+\.whl)", hash = "sha256:([0-9a-f]{64})"', lock):
        name = url.rsplit("/", 1)[1]
        if machine and libc in name and f"{machine}." in f"{name.removesuffix('.whl')}.":
            return name, digest
    raise BootstrapError(
        f"uv.lock has no uv for {platform.machine()} with {libc}.\nRemedy: run the kit from Linux on x86_64 or arm64."
    )


def fetch_uv(folder: Path) -> Path:
    """The locked uv, unpacked below ``folder``; downloaded once."""
    name, digest = locked_uv((ROOT / "uv.lock").read_text())
    binary = folder / name.removesuffix(".whl") / "uv"
    if binary.is_file():
        return binary
    page_url = f"{index_url()}/uv/"
    links = re.findall(r'href="([^"]+)"', download(page_url).decode())
    link = next((link for link in links if urllib.parse.unquote(link).split("#")[0].endswith(name)), None)
    if link is None:
        raise BootstrapError(f"{page_url} does not list {name}.\nRemedy: use an index that mirrors the whole of PyPI.")
    wheel = download(urllib.parse.urljoin(page_url, link))
    if hashlib.sha256(wheel).hexdigest() != digest:
        raise BootstrapError(f"{name} from {page_url} does not match uv.lock.\nRemedy: do not use that index.")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        member = next(entry for entry in archive.namelist() if entry.endswith("/scripts/uv"))
        data = archive.read(member)
    binary.parent.mkdir(parents=True, exist_ok=True)
    temporary = binary.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(data)
    temporary.chmod(0o755)
    temporary.replace(binary)
    return binary


def install(venv: Path, groups: list[str]) -> None:
    """Bring ``venv`` to exactly the locked set.

    Exported to requirements first: ``uv sync`` takes the addresses in the lock, which a mirror cannot serve.
    """
    uv = fetch_uv(ROOT / ".cache")
    environment = {
        **os.environ,
        "UV_HTTP_TIMEOUT": "300",
        "UV_NO_CONFIG": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "VIRTUAL_ENV": str(venv),
    }
    if SYSTEM_CA.is_file():
        environment.setdefault("SSL_CERT_FILE", str(SYSTEM_CA))
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else nothing is compiled, and every start pays for it

    def run(*arguments: str) -> None:
        outcome = subprocess.run([str(uv), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        if outcome.returncode:
            raise BootstrapError(
                f"`uv {' '.join(arguments)}` failed:\n{outcome.stderr.strip()}\n"
                "Remedy: mend what uv names (network, proxy, disk), then run again."
            )

    requirements = ROOT / ".cache" / "requirements.txt"
    selection = [flag for group in groups for flag in ("--group", group)]
    run("export", "--quiet", "--frozen", "--no-default-groups", *selection, "--output-file", str(requirements))
    if not (venv / "bin" / "python").exists():
        run("venv", "--quiet", "--clear", "--python", sys.executable, str(venv))
    run(
        "pip", "sync", "--quiet", "--require-hashes", "--compile-bytecode",
        "--default-index", index_url(), str(requirements),
    )  # fmt: skip


def main() -> int:
    """Entry point; 0 when the environment is ready, 2 with a message when not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--group", action="append", default=[], help="a dependency group to add, such as dev")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    options = parser.parse_args()
    if sys.version_info < (3, 11):
        print(
            f"This is Python {platform.python_version()} ({sys.executable}); the kit needs 3.11 or newer.\n"
            "Remedy: install one and run `make deploy PYTHON=/path/to/python3.12`.",
            file=sys.stderr,
        )
        return 2
    key = hashlib.sha256(
        b"\0".join([(ROOT / "uv.lock").read_bytes(), Path(__file__).read_bytes(), sys.executable.encode()])
    ).hexdigest()
    stamp = options.venv / ".kit-stamp"
    state = f"{key} {' '.join(sorted(options.group))}\n"
    have = stamp.read_text() if stamp.is_file() else ""
    # A venv with the developers' tools also serves a user.
    if have == state or (have.startswith(key) and set(options.group) <= set(have.split()[1:])):
        return 0
    print("Preparing the controller's tools in .venv (some seconds, once)", flush=True)
    try:
        (ROOT / ".cache").mkdir(exist_ok=True)
        install(options.venv, options.group)
    except BootstrapError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error}\nRemedy: make the checkout ({ROOT}) writable and run again.", file=sys.stderr)
        return 2
    stamp.write_text(state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
