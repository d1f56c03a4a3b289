"""A host of its own, for a person's site: a container in which systemd runs, and that knows nothing of the kit."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compose import images
from tests.compose.engine import docker, install_compose
from tests.e2e.harness import QUESTION, Outcome, Person, told
from tests.e2e.ssh import KEY, SITE, new_key, write_site
from tests.hosts import probe

NAME = "kit-e2e-machine"
USER = "somebody"
# Privileges for systemd and for an engine below this one. Not `--privileged`: that asks for all that there are, which a
# test machine's root may not have itself.
CAPABILITIES = (
    *("AUDIT_CONTROL", "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "IPC_LOCK"),
    *("KILL", "MKNOD", "NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID"),
    *("SYSLOG", "SYS_ADMIN", "SYS_BOOT", "SYS_CHROOT", "SYS_NICE", "SYS_PTRACE"),
)
OPTIONS = (
    *("--security-opt=apparmor=unconfined", "--security-opt=seccomp=unconfined"),
    *("--security-opt=systempaths=unconfined", "--device-cgroup-rule=a *:* rwm", "--cgroupns=host"),
    # A machine's is half of its memory.
    "--shm-size=1g",
    *("--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw", "--tmpfs=/run", "--tmpfs=/run/lock", "--tmpfs=/tmp:exec"),
)


class Machine:
    """The host `elsewhere` of a person's site `remote`."""

    def __init__(self, person: Person) -> None:
        self.person = person

    def run(self, *argv: str, user: str = "root") -> str:
        """What a command there prints."""
        return docker("exec", "--user", user, NAME, *argv)

    def make(self, what: str, limit: float, title: str = "") -> Outcome:
        """`make <what>` for its site, by the person, who is elsewhere."""
        return self.person.make(f"{what} SITE={SITE}", limit, title=title or f"make {what}, another machine")

    @property
    def facts(self) -> dict[str, Any]:
        """What site.json says about it."""
        state = json.loads((self.person.checkout / f"deploy/inventories/{SITE}/site.json").read_text())
        facts: dict[str, Any] = state["hosts"]["elsewhere"]
        return facts

    def answer(self) -> str:
        """The answer to QUESTION through Dify there; an error as text."""
        facts = self.facts
        url = f"http://127.0.0.1:{facts['ports']['gateway']}"
        parameters = json.dumps({"home": facts["kit_home"], "url": url, "question": QUESTION})
        try:
            found = json.loads(self.run("python3", "-c", Path(probe.__file__).read_text(), "ask", parameters))
        except RuntimeError as error:
            return f"error: {str(error).splitlines()[-1]}"
        return told(found)

    def boot(self) -> None:
        """Everything ends as when it is shut down, and systemd starts again."""
        docker("stop", "--time", "120", NAME)
        docker("start", NAME)


@contextlib.contextmanager
def machine(person: Person, settings: dict[str, Any], *files: Path) -> Iterator[Machine]:
    """The machine with a user of the group docker, whom the person's key lets in, and the person's site for it.

    Args:
        person: who deploys.
        settings: of the site.
        files: what the machine has in /mnt.
    """
    images.machine()
    # Beside the person's, as what is in two folders cannot be on two file systems.
    home = person.home.with_name(NAME)
    discard(home)
    # What the person has downloaded and built, which nobody here needs to have tested twice; names of the same files.
    cache = home / ".cache/dify-kit"
    cache.parent.mkdir(parents=True)
    subprocess.run(["cp", "-al", str(person.home / ".cache/dify-kit"), str(cache)], check=True)
    install_compose(home)
    key = new_key(person.home / ".ssh" / KEY)
    (home / ".ssh").mkdir(mode=0o700)
    shutil.copy(key, home / ".ssh/authorized_keys")

    argv = ["run", "--detach", "--name", NAME, "--hostname", NAME, *OPTIONS]
    argv += [f"--cap-add={name}" for name in CAPABILITIES]
    argv += [f"--volume={home}:/home/{USER}", f"--volume={NAME}:/var/lib/docker"]
    argv += [f"--volume={file}:/mnt/{file.name}:ro" for file in files]
    uid = (person.home / ".cache").stat().st_uid
    try:
        docker(*argv, images.MACHINE)
        found = Machine(person)
        for _ in range(600):
            if docker("exec", NAME, "systemctl", "is-system-running", check=False) in ("running", "degraded"):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"systemd did not start:\n{docker('logs', NAME, check=False)}", pytrace=False)
        found.run("useradd", "--no-create-home", "--shell=/bin/bash", f"--uid={uid}", "--groups=docker", USER)
        found.run("chown", f"{USER}:", *(f"/home/{USER}/{each}" for each in (".", ".cache", ".docker", ".ssh")))
        found.run("chown", "--recursive", f"{USER}:", f"/home/{USER}/.ssh", f"/home/{USER}/.docker")
        # As a deploy's summary asks of an administrator, so that the user's services come back with the machine.
        found.run("loginctl", "enable-linger", USER)
        address = docker("inspect", "--format", "{{.NetworkSettings.IPAddress}}", NAME)
        public = found.run("cat", "/etc/ssh/ssh_host_ed25519_key.pub")
        (person.home / ".ssh/hosts").write_text(f"{address} {public}\n")
        person.own(person.home / ".ssh")
        site = write_site(person, address, 22, USER)
        (site / "group_vars/kit").mkdir(parents=True)
        (site / "group_vars/kit/settings.yml").write_text(yaml.safe_dump(settings))
        person.own(site)
        yield found
    finally:
        docker("rm", "--force", NAME, check=False)
        docker("volume", "rm", NAME, check=False)
        shutil.rmtree(person.checkout / "deploy/inventories" / SITE, ignore_errors=True)
        discard(home)


def discard(home: Path) -> None:
    """The machine's user's files, of which some are another user's."""
    shutil.rmtree(home, ignore_errors=True)
    assert not home.exists(), f"{home} cannot be removed"
