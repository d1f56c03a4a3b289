"""What starts the kit's services at boot: systemd for users, else cron, else nobody (and that is said)."""

from __future__ import annotations

import dataclasses
import os
import pwd
import shutil
import subprocess
import time
from pathlib import Path

from ansible.module_utils.kit_files import Change, Entry, apply

_CRON_DAEMONS = {"cron", "crond", "fcron", "cronie"}


class BootProblem(Exception):
    """A command that should work here failed; the text says which, how and what to do."""


@dataclasses.dataclass
class Result:
    """The hook in force (systemd, cron or none), what changed, and what a person should know."""

    hook: str
    changes: list[Change]
    notice: list[str]


class BootHook:
    """The boot hook of one kit home, for the user this runs as."""

    def __init__(self, home: Path, *, check: bool = False, root: Path = Path("/")) -> None:
        """`root` is where the machine's own files are looked for."""
        user = pwd.getpwuid(os.getuid())
        self.home = home
        self.check = check
        self.user = user.pw_name
        self.root = root
        self.unit = root / user.pw_dir.lstrip("/") / ".config/systemd/user" / f"{home.name}.service"
        # su and cron do not set the first, without which systemctl does not find the user's instance.
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", "LC_ALL": "C"}
        self.changes: list[Change] = []

    def present(self) -> Result:
        """Have exactly one hook, the best that works on this machine."""
        if self._systemd_works():
            self._unit_present()
            self._cron(present=False)
            return Result("systemd", self.changes, [])
        self._unit_absent()
        if self._cron_works():
            self._cron(present=True)
            return Result("cron", self.changes, [])
        start = f"{self.home}/runtime/bin/kitctl start"
        remedy = f"have it run: su - {self.user} -c '{start}'"
        if self._is_systemd():
            remedy = f"run: loginctl enable-linger {self.user}   (then deploy again)"
        return Result(
            "none",
            self.changes,
            [
                "After a reboot the services stay down: neither systemd for users nor cron can be used here."
                f" An administrator can {remedy}. By hand: {start}"
            ],
        )

    def absent(self) -> Result:
        """Have no hook."""
        self._unit_absent()
        self._cron(present=False)
        return Result("none", self.changes, [])

    # --- systemd ---

    def _systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run("systemctl", "--user", *arguments)

    def _systemd_works(self) -> bool:
        """Whether a user instance runs, and will after a boot without anybody logging in (lingering)."""
        if not (shutil.which("systemctl") and self._is_systemd()):
            return False
        if not self._lingers() and not self.check:
            # Some systems allow it for oneself; connected as root, the services role has done it before.
            self._run("loginctl", "enable-linger", self.user)
        end = time.monotonic() + 10
        while self._lingers() and time.monotonic() < end:
            if self._systemctl("show", "--property=Version").returncode == 0:
                return True
            time.sleep(0.2)  # the instance of a user who has just been given lingering is still starting
        return False

    def _is_systemd(self) -> bool:
        return (self.root / "run/systemd/system").exists()

    def _lingers(self) -> bool:
        return (self.root / "var/lib/systemd/linger" / self.user).exists()

    def _unit_present(self) -> None:
        changed = apply(
            Entry(self.unit, mode=0o644, content=self.unit_text().encode()), base=self.home, check=self.check
        )
        if changed:
            self.changes.append(changed)
        if self._systemctl("is-enabled", self.unit.name).returncode == 0 and not changed:
            return
        if not changed:
            self.changes.append(Change(self.unit, "not enabled\n", "enabled\n"))
        if not self.check:
            self._must(self._systemctl("daemon-reload"))
            self._must(self._systemctl("enable", self.unit.name))

    def unit_text(self) -> str:
        """The systemd unit: starts at boot, stops gracefully at shutdown."""
        # Status 3: some service is not running yet. As a failure it would make systemd kill all the others.
        return f"""[Unit]
Description=Services below {self.home}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={self.home}/runtime/bin/kitctl start
ExecStop={self.home}/runtime/bin/kitctl stop
SuccessExitStatus=3
TimeoutStartSec=300
TimeoutStopSec=300

[Install]
WantedBy=default.target
"""

    def _unit_absent(self) -> None:
        if not self.unit.exists():
            return
        if not self.check:
            self._systemctl("disable", self.unit.name)
        change = apply(Entry(self.unit, state="absent"), base=self.home, check=self.check)
        self.changes += [change] if change else []

    # --- cron ---

    def _cron_works(self) -> bool:
        """Whether there is a crontab for this user and a daemon that reads it."""
        if not shutil.which("crontab"):
            return False
        names = set()
        for comm in (self.root / "proc").glob("[0-9]*/comm"):
            try:
                names.add(comm.read_text().strip())
            except OSError:
                continue  # it has ended
        return bool(names & _CRON_DAEMONS) and self._crontab() is not None

    def _crontab(self) -> list[str] | None:
        """The user's crontab; None where the user may not have one."""
        if not shutil.which("crontab"):
            return None
        done = self._run("crontab", "-l")
        if done.returncode == 0:
            return done.stdout.splitlines()
        return [] if "no crontab for" in done.stderr else None

    def _cron(self, *, present: bool) -> None:
        """Have our one line in the user's crontab, or not; every other line stays as it is."""
        lines = self._crontab()
        if lines is None:
            return
        ours = f"@reboot {self.home}/runtime/bin/kitctl start >/dev/null 2>&1"
        others = [line for line in lines if f"{self.home}/runtime/bin/kitctl " not in line]
        wanted = [*others, ours] if present else others
        if wanted == lines or (present and ours in lines and len(others) + 1 == len(lines)):
            return
        before, after = ("".join(f"{line}\n" for line in each) for each in (lines, wanted))
        self.changes.append(Change(Path(f"crontab of {self.user}"), before, after))
        if not self.check:
            self._must(self._run("crontab", "-", stdin=after) if wanted else self._run("crontab", "-r"))

    # --- both ---

    def _run(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input=stdin, env=self.environment, capture_output=True, text=True, timeout=60)

    @staticmethod
    def _must(done: subprocess.CompletedProcess[str]) -> None:
        if done.returncode != 0:
            raise BootProblem(
                f"The start at boot cannot be set up: {' '.join(done.args)} says:"
                f" {(done.stderr or done.stdout).strip()}\n"
                "Remedy: run that command by hand as the service user, mend what it names, deploy again."
            )
