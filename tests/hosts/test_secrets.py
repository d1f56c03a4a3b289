"""Who may do what: owners and modes, and secrets only where they are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.hosts.kit_host import KitHost

ROOT = Path(__file__).resolve().parents[2]

# Bits that must be set and that must not be, for every file below kit_home. The first class that fits counts.
OURS = [0o700, 0o7077]  # a folder of the service user alone
SOCKET = [0o600, 0o7077]  # such a socket
PRIVATE = [0o600, 0o7177]  # such a file, no program
OWN = [0o400, 0o7077]  # such a file, maybe a program
FOLDER, FILE = [0o700, 0o7022], [0o400, 0o7022]  # others may read; kit_home itself does not let them in
CLASSES: list[tuple[str, str, dict[str, list[int]]]] = [
    ("home", r"\.", {"folder": OURS}),
    ("configuration and secrets", r"etc(/.*)?", {"folder": OURS, "file": PRIVATE}),
    # uv opens its locks for every user of a shared folder.
    ("locks of uv", r"(runtime|releases|inference|var/plugins/cwd)/.*venv[^/]*/\.lock", {"file": [0o600, 0o7000]}),
    ("plugins' programs", r"var/plugins/cwd/.+", {"folder": FOLDER, "file": FILE}),
    (
        "run time",
        r"var/(run|inference|agent-runtime/state/shellctl/runtime)(/.*)?",
        {"folder": OURS, "file": OWN, "socket": SOCKET},
    ),
    ("data and logs", r"var(/.*)?", {"folder": OURS, "file": OWN}),
    ("programs", r"(runtime|releases|inference)(/.*)?", {"folder": FOLDER, "file": FILE}),
]


def test_configuration_and_data_have_their_owner_and_mode(kit: KitHost) -> None:
    look(
        kit,
        ["runtime", "releases", "inference", "var/compose", "var/moved"],
        {"home", "configuration and secrets", "run time", "data and logs"},
    )


@pytest.mark.deep  # some hundred thousand files
def test_programs_have_their_owner_and_mode(kit: KitHost) -> None:
    look(kit, ["etc", "var"], {"home", "programs"})


def look(kit: KitHost, without: list[str], there: set[str]) -> None:
    """Holds every file of the host against its class; `there` are classes that cannot be empty."""
    answer = kit.probe("modes", without=without, classes=CLASSES)
    empty = there - {name for name, count in answer["counted"].items() if count}
    assert not empty, f"no files of these classes were found: {empty}"
    found = answer["found"]
    assert not found, (
        f"{len(found)} files, {found[:10]}. Run `make deploy`; what it does not set right, chown or chmod."
    )


def test_no_process_has_anothers_secret(kit: KitHost) -> None:
    running = {name: program.pid for name, program in kit.supervised.items() if program.pid}
    answer = kit.probe("environments", supervisord=kit.supervisord, services=running)
    assert answer["known"] >= 3, f"only {answer['known']} secrets found under {kit.home}/etc/env: nothing was compared"
    assert all(answer["seen"].values()), f"no process was looked at of {answer['seen']}"
    if "plugin-daemon" in running:
        assert answer["plugins"], "no plugin runs, so none was looked at. Read `make logs SERVICE=plugin-daemon`."
    assert not answer["found"], (
        f"{answer['found'][:10]}. A plugin that an older kit installed keeps its way to start: remove it in Dify, "
        "then `make deploy`. Otherwise `make restart`."
    )


def test_no_secret_in_logs_or_arguments(kit: KitHost) -> None:
    # Only on this machine can the probe read the controller's file beside the host's own.
    answer = kit.probe(
        "leaks",
        as_service_user=not kit.local,
        cache=kit.facts["model_service"]["cache"],
        secrets_file=kit.facts["secrets_file"] if kit.local else None,
    )
    assert answer["known"] >= 3, f"only {answer['known']} secrets found under {kit.home}/etc/env: nothing was compared"
    assert not answer["found"], (
        f"secrets can be read: {answer['found']}. Remove the file or end the process, and change that secret."
    )


def test_no_secret_in_what_the_controller_keeps(kit: KitHost) -> None:
    file = Path(kit.facts["secrets_file"])
    text = file.read_text()
    if text.startswith("$ANSIBLE_VAULT"):
        pytest.skip(f"{file} is encrypted, so there is nothing to compare with; decrypt it to run this")
    assert file.stat().st_mode & 0o777 == 0o600, f"chmod 600 {file}"
    secrets = {name: str(value) for name, value in yaml.safe_load(text).items() if len(str(value)) >= 12}
    assert secrets, f"{file} has no secrets: nothing was compared"
    places = [path for path in file.parents[2].rglob("*") if path.is_file() and path != file]
    places += [path for path in (ROOT / ".cache").rglob("*") if path.is_file()]
    assert places
    found = [
        f"{name} in {path}" for path in places for name, value in secrets.items() if value.encode() in path.read_bytes()
    ]
    assert not found, f"{found}. Remove the file, and change that secret."
