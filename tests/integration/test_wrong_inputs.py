"""Each wrong input gives one clear message and exit status 2, and has changed nothing: `make deploy` for real."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import self_signed

ROOT = Path(__file__).resolve().parents[2]
# Made by a deploy that root runs, so it must not exist before or after.
USER = "kit-not-yet"
HOSTS = {"kit": {"hosts": {"localhost": {"ansible_connection": "local"}}}}


class Site:
    """A new site under the test's folder, whose home and cache are there too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inventory = folder / "site"
        self.settings: dict[str, object] = {
            "kit_home": str(folder / "kit-home"),
            "kit_cache": str(folder / "kit-cache"),
            "kit_port_base": free_base(),
            "runtime_python": os.environ.get("KIT_TEST_PYTHON", ""),
        }
        if os.geteuid() == 0:
            self.settings |= {"kit_user": USER, "kit_user_home": str(folder / "home")}
        (self.inventory / "group_vars" / "kit").mkdir(parents=True)
        (self.inventory / "hosts.yml").write_text(yaml.safe_dump(HOSTS))

    def deploy(self, *arguments: str, wrapper: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """What `make deploy` runs, within ``wrapper`` if given."""
        settings = self.inventory / "group_vars" / "kit" / "settings.yml"
        settings.touch(mode=0o600)  # a password may stand in it
        settings.write_text(yaml.safe_dump(self.settings))
        return subprocess.run(
            [*wrapper, sys.executable, ROOT / "deploy/kit.py", "--site", self.inventory, "deploy", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )

    def files(self) -> dict[str, tuple[int, float]]:
        """Everything below the site's folder, with sizes and times; settings.yml is the test's own."""
        return {
            str(path.relative_to(self.folder)): (path.stat().st_size, path.stat().st_mtime)
            for path in self.folder.rglob("*")
            if path.name not in ("settings.yml", "kit")
        }


def free_base() -> int:
    """A port base at which nothing listens."""
    for base in range(41000, 60000, 100):
        for port in range(base, base + 10):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        else:
            return base
    raise AssertionError("no free ports")


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="kit-") as folder:  # pytest's own would be too long for sockets
        Path(folder).chmod(0o755)
        yield Site(Path(folder))


def refused(site: Site, *arguments: str, wrapper: Sequence[str] = ()) -> str:
    """The message of a deploy that is refused, with its line breaks undone; nothing has changed."""
    before = site.files()
    done = site.deploy(*arguments, wrapper=wrapper)
    assert done.returncode == 2, done.stdout
    assert site.files() == before
    assert "Traceback" not in done.stdout
    assert "Remedy: " in done.stdout
    with pytest.raises(KeyError):
        pwd.getpwnam(USER)
    return " ".join(done.stdout.split())


def test_unknown_release(site: Site) -> None:
    site.settings["dify_release"] = "9.9.9"
    message = refused(site)
    assert "One problem. No host was touched, nothing was changed." in message
    assert "Dify release '9.9.9' is unknown" in message
    assert "1.14.2, 1.16.0" in message


def test_a_host_without_python(site: Site) -> None:
    site.settings["ansible_python_interpreter"] = "/no/such/python3"
    message = refused(site)
    assert "The module interpreter '/no/such/python3' was not found. Remedy: install python3 there" in message


def test_release_with_an_open_advisory(site: Site) -> None:
    site.settings["dify_release"] = "1.14.2"
    message = refused(site)
    assert "CVE-2026-41948" in message
    assert "dify_acknowledged_advisories: [GHSA-gvc6-fh3x-89xh]" in message


def test_misspelt_variable(site: Site) -> None:
    site.settings["postgress_port"] = 5432
    message = refused(site)
    assert "postgress_port is not a variable of the kit" in message
    assert "settings.yml, line" in message
    assert "did you mean postgres_port" in message


def test_wrong_type(site: Site) -> None:
    site.settings["kit_port_base"] = "many"
    message = refused(site)
    assert "One problem." in message
    assert "kit_port_base must be a whole number, but it is 'many'" in message


def test_wrong_value_on_the_command_line(site: Site) -> None:
    message = refused(site, "-e", "dify_mode=sorce")
    assert "Where: command line (-e)" in message
    assert "did you mean source?" in message


def test_all_static_problems_at_once(site: Site) -> None:
    site.settings |= {
        "dify_public_url": "dify.example.com/",
        "kit_hom": "/x",
        "dify_release": "2",
        "dify_mode": "containers",
    }
    assert "4 problems. No host was touched" in refused(site)


def test_a_certificate_for_another_name_and_settings_that_contradict(site: Site) -> None:
    certificate, key = site.folder / "c.pem", site.folder / "k.pem"
    self_signed(certificate, key, "DNS:other.example.com")
    key.chmod(0o644)
    site.settings |= {
        "gateway_tls": "files",
        "gateway_tls_certificate": str(certificate),
        "gateway_tls_key": str(key),
        "dify_public_url": "https://dify.example.com",
        "dify_source_env": {
            "UPLOAD_FILE_SIZE_LIMITS": 50,
            "ENDPOINT_URL_TEMPLATE": "http://dify.example.com/e/{hook_id}",
        },
        "dify_source_mail": {"server": "smtp.example.com", "from": "dify@example.com", "user": "dify"},
    }
    message = refused(site)
    assert "5 problems. No host was touched" in message
    assert "not for dify.example.com, the host of dify_public_url: it is for other.example.com" in message
    assert f"chmod 600 {key}" in message
    assert "did you mean UPLOAD_FILE_SIZE_LIMIT?" in message
    assert "browsers block the mixture" in message
    assert "dify_source_mail_password is empty" in message
    site.settings["dify_public_url"] = "http://dify.example.com"
    assert "gateway_tls is files, but dify_public_url is http://dify.example.com" in refused(site)


def test_secrets_that_others_may_read(site: Site) -> None:
    path = site.inventory / "group_vars/kit/secrets.yml"
    path.write_text("kit_secret_redis: abcdefgh\n")
    path.chmod(0o644)
    assert "chmod 600" in refused(site)


def test_an_inventory_without_hosts(site: Site) -> None:
    (site.inventory / "hosts.yml").write_text("kit: {hosts: {}}\n")
    assert "no host in the group kit" in refused(site)


# --- what only the host knows ---------------------------------------------------------------------


def test_port_in_use(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        site.settings["redis_port"] = port
        message = refused(site)
    assert f"Port {port} (redis_port) is held by" in message
    assert f"pid {os.getpid()}" in message


def test_unwritable_home(site: Site) -> None:
    locked = site.folder / "locked"
    locked.mkdir(mode=0o500)
    site.settings["kit_home"] = str(locked / "kit-home")
    assert f"cannot write to {locked}, where kit_home is to be" in refused(site)


def test_unreachable_source(site: Site) -> None:
    site.settings["dify_source_repository"] = "http://127.0.0.1:1/langgenius/dify"
    message = refused(site)
    assert "Dify's source cannot be used:" in message
    for way_out in ("insteadOf", "dify_source_archive", "kit_cache/builds", "make deploy DIFY=skip"):
        assert way_out in message


def test_parts_elsewhere_that_do_not_answer(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    site.settings |= {
        "postgres_source": "external",
        "postgres_host": "127.0.0.1",
        "postgres_port": port,
        "postgres_password": "of-the-server",
        "redis_source": "external",
        "redis_host": "no-such-host.invalid",
        "redis_port": port,  # as PostgreSQL's, on another host
        "dify_storage": "s3",
        "dify_s3": {"endpoint": f"http://127.0.0.1:{port}", "bucket": "files", "access_key": "key"},
        "dify_s3_secret_key": "of-the-bucket",
        "dify_vector_store": "qdrant",
        "dify_vector_url": f"http://127.0.0.1:{port}",
    }
    message = refused(site)
    for sign in ("PostgreSQL cannot be reached", "no-such-host.invalid", "The S3 server cannot", "Qdrant cannot"):
        assert sign in message, sign
    assert "of-the-" not in message


def test_password_elsewhere_is_not_the_generated_one(site: Site) -> None:
    site.settings |= {"postgres_source": "external", "postgres_host": "db.example.com"}
    message = refused(site)
    assert "postgres_password is empty" in message
    assert "secrets.yml" in message


def test_too_little_disk(site: Site) -> None:
    small = site.folder / "home"
    small.mkdir(mode=0o755)
    mount = f'mount -t tmpfs -o size=50m,mode=1777 none {small} && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here; it takes root")
    site.settings |= {"kit_home": str(small / "kit-home"), "kit_cache": str(small / "kit-cache")}
    message = refused(site, wrapper=wrapper)
    assert f"kit_home ({small}/kit-home) and kit_cache ({small}/kit-cache) need" in message
    assert "50 MB are free" in message


def test_lost_secrets(site: Site) -> None:
    data = site.folder / "kit-home" / "var" / "postgres"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("16\n")
    runtime = site.folder / "kit-home" / "runtime"
    runtime.mkdir()
    (runtime / "state.json").write_text("{}\n")
    if os.geteuid() == 0:
        ordinary = [user for user in pwd.getpwall() if 1000 <= user.pw_uid < 60000 and user.pw_shell.endswith("sh")]
        if not ordinary:
            pytest.skip("no ordinary user here whom the data could belong to")
        site.settings |= {"kit_user": ordinary[0].pw_name, "kit_user_home": ordinary[0].pw_dir}
        for path in (site.folder, site.folder / "kit-home", data.parent, data, runtime):
            shutil.chown(path, ordinary[0].pw_uid)
    site.settings["dify_mode"] = "skip"
    message = refused(site)
    assert "needs secrets that the site no longer has" in message
    assert "kit_secret_dify_secret_key" in message
