"""Each wrong input of `make deploy`: one clear message with its remedy, status 2, and nothing changed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# Made by a deploy that root runs, so it must not exist before or after.
USER = "kit-wrong-inputs"

Deploy = Callable[..., str]


@pytest.fixture
def deploy(tmp_path: Path) -> Deploy:
    """Runs a deploy with settings that must be refused; returns what it said."""
    site = tmp_path / "site"
    (site / "group_vars/kit").mkdir(parents=True)
    shutil.copy(ROOT / "deploy/inventories/local/hosts.yml", site)
    # What the kit would write to: all of it inside a folder that must stay empty.
    places = {"kit_home": str(tmp_path / "host/kit"), "kit_cache": str(tmp_path / "host/cache")}
    if os.geteuid() == 0:
        places["kit_user"] = USER
    before = sorted(path.relative_to(site) for path in site.rglob("*"))

    def run(inside: Sequence[str] = (), **settings: Any) -> str:
        file = site / "group_vars/kit/settings.yml"
        file.touch(mode=0o600)  # a password may stand in it
        file.write_text(yaml.safe_dump({**places, **settings}))
        outcome = subprocess.run(
            [*inside, sys.executable, str(ROOT / "deploy/kit.py"), "--site", str(site), "deploy"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert outcome.returncode == 2, outcome.stdout
        assert "Nothing was changed." in outcome.stdout
        assert "Traceback" not in outcome.stdout
        assert not (tmp_path / "host").exists(), "the deploy wrote to the host"
        after = sorted(path.relative_to(site) for path in site.rglob("*"))
        assert after == sorted([*before, Path("group_vars/kit/settings.yml")]), "the deploy wrote to the site"
        with pytest.raises(KeyError):
            pwd.getpwnam(USER)
        return outcome.stdout

    return run


def test_unknown_release(deploy: Deploy) -> None:
    said = deploy(dify_release="9.9.9")
    assert "9.9.9" in said
    assert "1.16.0" in said, "the releases that there are should be named"


def test_misspelt_variable(deploy: Deploy) -> None:
    said = deploy(dify_relaese="1.16.0")
    assert "dify_relaese" in said
    assert "dify_release" in said, "the right spelling should be named"


def test_wrong_type(deploy: Deploy) -> None:
    said = deploy(kit_port_base="eighty")
    assert "kit_port_base" in said
    assert "eighty" in said


def test_port_in_use(deploy: Deploy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = deploy(kit_port_base=port)
    assert str(port) in said
    assert f"pid {os.getpid()}" in said or str(os.getpid()) in said, "the process that holds the port should be named"


def test_unwritable_home(deploy: Deploy) -> None:
    # Nobody can make a folder there, not even root.
    said = deploy(kit_home="/proc/kit")
    assert "/proc" in said
    assert "Remedy" in said


def test_unreachable_source(deploy: Deploy) -> None:
    said = deploy(dify_source_repository="http://127.0.0.1:9/dify")
    assert "http://127.0.0.1:9/dify" in said
    for way_out in ("insteadOf", "DIFY=skip", "archive"):
        assert way_out in said, f"{way_out} should be named as a way out"


def test_parts_elsewhere_that_do_not_answer(deploy: Deploy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    said = deploy(
        postgres_source="external",
        postgres_host="127.0.0.1",
        postgres_port=port,
        postgres_password="of-the-server",
        redis_source="external",
        redis_host="no-such-host.invalid",
        dify_storage="s3",
        dify_s3={"endpoint": f"http://127.0.0.1:{port}", "bucket": "files", "access_key": "key"},
        dify_s3_secret_key="of-the-bucket",
        dify_vector_store="qdrant",
        dify_vector_url=f"http://127.0.0.1:{port}",
    )
    for sign in ("PostgreSQL cannot be reached", "no-such-host.invalid", "The S3 server cannot", "Qdrant cannot"):
        assert sign in said, sign
    assert "of-the-" not in said


def test_password_elsewhere_is_not_the_generated_one(deploy: Deploy) -> None:
    said = deploy(postgres_source="external", postgres_host="db.example.com")
    assert "postgres_password is empty" in said
    assert "secrets.yml" in said


def test_too_little_disk(deploy: Deploy, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    # In a mount namespace of its own the deploy sees a file system of one GiB; it vanishes with the process.
    inside = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=1g,mode=1777 none {small} && exec "$@"', "sh"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here: run as root, or in a container with CAP_SYS_ADMIN")
    said = deploy(inside, kit_home=str(small / "kit"), kit_cache=str(small / "cache"))
    assert str(small) in said
    assert "larger disk" in said


def test_all_problems_come_at_once(deploy: Deploy) -> None:
    said = deploy(dify_relaese="1.16.0", kit_port_base="eighty", dify_release="9.9.9")
    for name in ("dify_relaese", "kit_port_base", "9.9.9"):
        assert name in said
