"""The boot hook, with stand-ins for systemctl, loginctl and crontab that keep their state in files."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

import pytest
from ansible.module_utils.kit_boot import BootHook, BootProblem

CRONTAB = """#!/bin/sh
case $1 in
  -l) [ -f {state}/crontab ] && exec cat {state}/crontab; echo "no crontab for me" >&2; exit 1 ;;
  -r) exec rm {state}/crontab ;;
  -) exec cat >{state}/crontab ;;
esac
"""
# is-enabled and enable as systemctl has them; both need the unit file and a running user instance.
SYSTEMCTL = """#!/bin/sh
echo "$*" >>{state}/calls
[ -f {state}/instance ] || {{ echo "Failed to connect to bus" >&2; exit 1; }}
case $2 in
  enable) touch {state}/enabled ;;
  disable) rm -f {state}/enabled ;;
  is-enabled) [ -f {state}/enabled ] ;;
esac
"""
LOGINCTL = """#!/bin/sh
[ -f {state}/polite ] || {{ echo "Access denied" >&2; exit 1; }}
touch {state}/root/var/lib/systemd/linger/$2 {state}/instance
"""


class Machine:
    """What a host may have."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.root = state / "root"
        self.home = state / "dify-kit"
        (state / "bin").mkdir()
        (self.root / "proc" / "77").mkdir(parents=True)
        (self.root / "var/lib/systemd/linger").mkdir(parents=True)
        self.has_daemon("bash")

    def has(self, command: str, text: str) -> None:
        path = self.state / "bin" / command
        path.write_text(text.format(state=self.state))
        path.chmod(0o755)

    def has_daemon(self, name: str) -> None:
        (self.root / "proc" / "77" / "comm").write_text(name + "\n")

    def has_cron(self) -> None:
        self.has("crontab", CRONTAB)
        self.has_daemon("cron")

    def has_systemd(self, *, lingering: bool) -> None:
        self.has("systemctl", SYSTEMCTL)
        self.has("loginctl", LOGINCTL)
        (self.root / "run/systemd/system").mkdir(parents=True)
        if lingering:
            (self.root / "var/lib/systemd/linger" / getpass.getuser()).touch()
            (self.state / "instance").touch()

    def hook(self, *, check: bool = False) -> BootHook:
        return BootHook(self.home, check=check, root=self.root)

    @property
    def crontab(self) -> str:
        return (self.state / "crontab").read_text() if (self.state / "crontab").exists() else ""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    (tmp_path / "bin" / "cat").symlink_to("/bin/cat")
    (tmp_path / "bin" / "rm").symlink_to("/bin/rm")
    (tmp_path / "bin" / "touch").symlink_to("/usr/bin/touch")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return machine


def test_without_any_an_administrator_learns_what_to_do(machine: Machine) -> None:
    result = machine.hook().present()
    assert (result.hook, result.changes) == ("none", [])
    assert f"su - {getpass.getuser()} -c '{machine.home}/runtime/bin/kitctl start'" in result.notice[0]


def test_a_crontab_that_no_daemon_reads_does_not_count(machine: Machine) -> None:
    machine.has("crontab", CRONTAB)
    assert machine.hook().present().hook == "none"
    assert machine.crontab == ""


def test_cron_gets_one_line_and_keeps_the_others(machine: Machine) -> None:
    machine.has_cron()
    mine = "MAILTO=me\n5 4 * * * backup # with a comment\n"
    (machine.state / "crontab").write_text(mine)
    assert machine.hook(check=True).present().changes
    assert machine.crontab == mine
    result = machine.hook().present()
    assert (result.hook, len(result.changes), result.notice) == ("cron", 1, [])
    assert machine.crontab == mine + f"@reboot {machine.home}/runtime/bin/kitctl start >/dev/null 2>&1\n"
    assert machine.hook().present().changes == []
    assert machine.hook().absent().changes
    assert machine.crontab == mine
    assert machine.hook().absent().changes == []


def test_an_empty_crontab_is_removed(machine: Machine) -> None:
    machine.has_cron()
    machine.hook().present()
    machine.hook().absent()
    assert not (machine.state / "crontab").exists()


def test_systemd_with_lingering_is_preferred_and_replaces_cron(machine: Machine) -> None:
    machine.has_cron()
    machine.hook().present()
    machine.has_systemd(lingering=True)
    hook = machine.hook()
    assert hook.present().hook == "systemd"
    assert machine.crontab == ""
    assert (machine.state / "enabled").exists()
    unit = hook.unit.read_text()
    assert hook.unit.name == "dify-kit.service"
    assert f"ExecStart={machine.home}/runtime/bin/kitctl start\n" in unit
    assert machine.hook().present().changes == []

    (machine.state / "enabled").unlink()  # somebody disabled it: the deploy puts it right
    assert machine.hook().present().changes
    assert (machine.state / "enabled").exists()

    assert machine.hook().absent().changes
    assert not hook.unit.exists()
    assert not (machine.state / "enabled").exists()


def test_systemd_is_asked_for_lingering_where_users_may(machine: Machine) -> None:
    machine.has_systemd(lingering=False)
    (machine.state / "polite").touch()
    assert machine.hook().present().hook == "systemd"


def test_without_lingering_cron_serves_or_the_remedy_is_named(machine: Machine) -> None:
    machine.has_systemd(lingering=False)
    refused = machine.hook().present()
    assert refused.hook == "none"
    assert f"loginctl enable-linger {getpass.getuser()}" in refused.notice[0]
    machine.has_cron()
    assert machine.hook().present().hook == "cron"


def test_check_mode_with_systemd_touches_nothing(machine: Machine) -> None:
    machine.has_systemd(lingering=True)
    hook = machine.hook(check=True)
    assert hook.present().changes
    assert not hook.unit.exists()
    assert "enable" not in (machine.state / "calls").read_text().replace("is-enabled", "").split()


def test_a_systemctl_that_fails_is_quoted(machine: Machine) -> None:
    machine.has_systemd(lingering=True)
    machine.has("systemctl", '#!/bin/sh\n[ "$2" = show ] || {{ echo "disk quota exceeded" >&2; exit 1; }}\n')
    with pytest.raises(BootProblem, match=r"(?s)systemctl --user daemon-reload says: disk quota exceeded.*Remedy"):
        machine.hook().present()


def test_the_environment_finds_the_users_instance(machine: Machine) -> None:
    assert machine.hook().environment["XDG_RUNTIME_DIR"] == f"/run/user/{os.getuid()}"
