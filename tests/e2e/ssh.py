"""This machine as a host that is reached over SSH: a server on loopback, and a site of the person's that asks it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.harness import WORK, Person

SSHD = Path("/usr/sbin/sshd")
SITE = "remote"
KEY = "of the kit"


def new_key(path: Path) -> Path:
    """A key pair, in place of one that is there; the public one's file."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_name(f"{path.name}.pub")


def write_site(person: Person, address: str, port: int, user: str) -> Path:
    """The inventory of a site whose one host, `elsewhere`, is reached with the person's key; the site's folder."""
    host = {
        "ansible_host": address,
        "ansible_port": port,
        "ansible_user": user,
        "ansible_ssh_private_key_file": f"~/.ssh/{KEY}",
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={person.home}/.ssh/hosts",
    }
    site = person.checkout / "deploy/inventories" / SITE
    site.mkdir(exist_ok=True)
    (site / "hosts.yml").write_text(yaml.safe_dump({"kit": {"hosts": {"elsewhere": host}}}))
    return site


@contextlib.contextmanager
def remote(person: Person) -> Iterator[None]:
    """The site `remote`: the person's own settings and secrets, and this machine as anybody else's would be reached.

    By a port, a user's name, a key's file and a list of known hosts, each of which the inventory alone knows.
    """
    if not SSHD.exists():
        pytest.skip("no SSH server on this machine: apt-get install openssh-server openssh-client")
    keys, folder = person.home / ".ssh", WORK / "sshd"
    shutil.rmtree(folder, ignore_errors=True)
    host_key = new_key(folder / "host")
    shutil.copy(new_key(keys / KEY), keys / "authorized_keys")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (keys / "hosts").write_text(f"[127.0.0.1]:{port} {host_key.read_text()}")
    person.own(keys)
    # A user without a password counts as locked.
    subprocess.run(["usermod", "--password", "*", person.name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": folder / "host",
        "PidFile": "none",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "AllowUsers": person.name,
    }
    (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    site = write_site(person, "127.0.0.1", port, person.name)
    shutil.copytree(site.with_name("local") / "group_vars", site / "group_vars", dirs_exist_ok=True)
    person.own(site)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(folder / "config")], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"sshd does not listen: {(folder / 'log').read_text()}", pytrace=False)
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(site)


def expect_as_before(person: Person, answer: str) -> None:
    """The host that is there already, over SSH: nothing to change, the same answer, and every command finds its way."""
    with remote(person):
        outcome = person.make(f"deploy SITE={SITE}", 600, title="over SSH, nothing to do")
        assert outcome.changed == 0, f"over SSH the deploy changed something:\n{outcome.tail()}"
        assert person.answer() == answer
        assert "gateway" in person.make(f"status SITE={SITE}", 60).output
        assert person.make(f"logs SERVICE=gateway SITE={SITE}", 60).output
        assert " passed" in person.make(f"check SITE={SITE}", 600, title="make check over SSH").output
