"""A Compose project on this host: looked at, brought up, and proved to answer.

Talks to the engine through ``docker`` and its ``compose`` plugin, 2.24.4 to 5: nothing else must be on the host.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import kit_images
from .kit_compose import (
    LIBRARIES,
    ONE_SHOT,
    ComposeProblem,
    check_config,
    check_pairs,
    merge,
    read_docker,
    render_dotenv,
)
from .kit_files import parse_env
from .kit_images import docker
from .kit_report import Problem

TAIL = 15
# Runs in a container, which has Python for its plugins: asks for the list of models; the key comes on standard input.
ASK = """
import sys, urllib.error, urllib.request
asked = urllib.request.Request(sys.argv[1] + "/models", headers={"Authorization": "Bearer " + sys.stdin.read().strip()})
try:
    urllib.request.urlopen(asked, timeout=10).read(1)
except urllib.error.HTTPError as error:
    sys.exit(f"it answers {error.code}")
except OSError as error:
    sys.exit(str(error))
"""


@dataclass
class Project:
    """One site's containers.

    Attributes:
        name: the project's fixed name.
        directory: the kit's folder for it: ``override.yaml``, ``.env``, and what was applied last.
        upstream: the release's ``docker/``.
        data: where everything that containers write lies.
        settings: the site's values, a file of the form KEY='value'.
        known: names that the release's programs read, beside those that its docker/ names.
        allowed: other files of the host that containers read.
    """

    name: str
    directory: Path
    upstream: Path
    data: Path
    settings: Path
    known: set[str] = field(default_factory=set)
    allowed: list[Path] = field(default_factory=list)

    # --- Before anything is applied ---------------------------------------------------------------------------------

    def compose(self, *arguments: str, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
        """``docker compose`` with the project's files; nothing of the caller's environment stands in for them."""
        here = directory or self.directory
        files = [self.upstream / "docker-compose.yaml", self.directory / "override.yaml"]
        argv = ["docker", "compose", "--project-name", self.name, "--project-directory", str(here)]
        argv += ["--env-file", str(here / ".env"), *(word for file in files for word in ("--file", str(file)))]
        names = [
            *("PATH", "HOME", "XDG_RUNTIME_DIR"),
            *("DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY"),
        ]
        env = {name: os.environ[name] for name in names if name in os.environ}
        return subprocess.run([*argv, *arguments], env=env, capture_output=True, text=True, check=False)

    def prepare(self) -> tuple[str, dict[str, Any]]:
        """The text of ``.env``, and what Compose makes of it with upstream's file and the override.

        Raises:
            ComposeProblem: the release does not know a setting, Compose refuses the files, or what it would run is
                not what the kit promises. Nothing has been changed then.
        """
        example, known, secrets = read_docker(self.upstream)
        ours = parse_env(self.settings.read_text())
        env, problems = merge(example, ours, known | self.known | LIBRARIES, secrets, str(self.settings))
        if problems:
            raise ComposeProblem(problems)
        # A mounted file that was replaced stays the old one in a container until that is made anew.
        mounted = hashlib.sha256()
        for path in self.allowed:
            mounted.update(path.read_bytes() if path.exists() else b"")
        text = render_dotenv(env | {"KIT_MOUNTED_FILES": mounted.hexdigest()[:16]})
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=".new-") as aside:  # mode 0700
            write_private(Path(aside, ".env"), text)
            done = self.compose("config", "--format", "json", directory=Path(aside))
        if done.returncode:
            what = f"Compose refuses the files: {done.stderr.strip()}"
            raise ComposeProblem([Problem(what, str(self.directory), "correct the dify_compose_* setting it names.")])
        config: dict[str, Any] = json.loads(done.stdout)
        if problems := check_config(config, secrets, self.upstream, self.data, self.allowed):
            raise ComposeProblem(problems)
        return text, config

    def check_data(self) -> None:
        """Refuse empty databases where there were data before: a folder moved away, or a disk not mounted.

        Raises:
            ComposeProblem: names the folders.
        """
        marker = self.directory / "has-data.json"
        had = json.loads(marker.read_text()) if marker.exists() else []
        lost = [name for name in had if not any(Path(name).glob("*"))]
        if lost:
            what = f"{', '.join(lost)} had data at an earlier deploy, but none now."
            remedy = (
                "mount the disk that it lies on, or restore a backup; a new start without the old data: "
                f"delete {marker}."
            )
            raise ComposeProblem([Problem(what, str(marker), remedy)])

    def check_name(self) -> None:
        """Refuse to take over containers that somebody else has started under the project's name.

        Raises:
            ComposeProblem: names their folder.
        """
        label = "com.docker.compose.project"
        done = docker(
            "ps", "--all", "--filter", f"label={label}={self.name}", "--format", f'{{{{.Label "{label}.working_dir"}}}}'
        )
        others = sorted(set(done.stdout.split("\n")) - {"", str(self.directory)})
        if others:
            what = (
                f"Docker has containers of another Compose project named {self.name}, started in {', '.join(others)}."
            )
            remedy = "choose another name (dify_compose_project), or `docker compose down` there if nobody needs them."
            raise ComposeProblem([Problem(what, "docker ps --all", remedy)])

    def remember_data(self, config: Mapping[str, Any]) -> None:
        """Note which databases have data now."""
        folders = [
            mount["source"]
            for name in ("db_postgres", "pgvector")
            for mount in config["services"].get(name, {}).get("volumes") or []
            if Path(mount["source"]).parent == self.data
        ]
        write_private(self.directory / "has-data.json", json.dumps(sorted(folders)))

    # --- Images -----------------------------------------------------------------------------------------------------

    def missing_images(self, config: Mapping[str, Any]) -> list[str]:
        """Names of images that the host does not have."""
        return [image for image, found in self.image_ids(config).items() if not found]

    def image_ids(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Image -> its id on this host, blank for none."""
        names = sorted({str(service["image"]) for service in config["services"].values()})
        done = docker("image", "inspect", "--format", "{{.Id}} {{json .RepoTags}} {{json .RepoDigests}}", *names)
        found: dict[str, str] = {}
        for line in done.stdout.splitlines():
            image_id, _, rest = line.partition(" ")
            found |= dict.fromkeys(re.findall(r'"([^"]+)"', rest), image_id)
        return {name: found.get(name, "") for name in names}

    def have_images(self, images: Sequence[str], spec: Mapping[str, Any]) -> list[str]:
        """Have again what somebody has removed since the deploy had it; return the images' names. See ``kit_images``.

        Raises:
            ComposeProblem: names each that could not be had.
        """
        missing, problems = [image for image in images if not kit_images.present(image)], []
        for image in missing:
            try:
                kit_images.have(spec, image)
            except kit_images.ImageError as error:
                what, _, remedy = str(error).partition("\nRemedy")
                problems.append(Problem(what, "dify_compose_images", remedy.lstrip(":, ")))
        if problems:
            raise ComposeProblem(problems)
        return missing

    # --- Up ---------------------------------------------------------------------------------------------------------

    def containers(self) -> dict[str, dict[str, Any]]:
        """Service -> its container as ``docker compose ps`` describes it (ID, State, Health, ExitCode)."""
        done = self.compose("ps", "--all", "--format", "json")
        if done.returncode:
            return {}
        text = done.stdout.strip()
        # Before 2.21 a list, then a line each.
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        return {row["Service"]: row for row in rows}

    def up(self, text: str, config: Mapping[str, Any], check: bool = False) -> list[str]:
        """Bring the project to ``config``; return what was changed, service by service.

        Where nothing differs from what was applied and everything runs, Compose is not called: it would run the
        one-shot services again.

        Raises:
            ComposeProblem: Compose could not start them.
        """
        wanted = hashlib.sha256(json.dumps([config, self.image_ids(config)], sort_keys=True).encode()).hexdigest()
        applied = self.directory / "applied"
        environment = self.directory / ".env"
        before = self.containers() if environment.exists() else {}
        services = [name for name in config["services"] if name not in ONE_SHOT]
        stopped = [name for name in services if before.get(name, {}).get("State") != "running"]
        # Of services that the site no longer has, but upstream's file: no orphans to Compose.
        extra = {name: row["ID"] for name, row in before.items() if name not in config["services"]}
        same = applied.exists() and applied.read_text() == wanted and environment.read_text() == text
        if same and not stopped and not extra:
            return []
        if check:
            return [*(stopped or ([] if same else services)), *extra]
        self.start(text, config, "--remove-orphans")
        if extra:
            docker("stop", *extra.values())
            docker("rm", "--force", *extra.values())
        write_private(applied, wanted)
        after = self.containers()
        changed = [name for name in services if before.get(name, {}).get("ID") != after.get(name, {}).get("ID")]
        return [*(changed or stopped), *extra]

    def start(self, text: str, config: Mapping[str, Any], *arguments: str) -> None:
        """``docker compose up`` with these arguments; nothing counts as applied then.

        Raises:
            ComposeProblem: Compose could not start them.
        """
        environment = self.directory / ".env"
        for service in config["services"].values():
            for mount in service.get("volumes") or []:
                folder = Path(mount["source"])
                if self.data in folder.parents and not folder.exists():
                    # Not left to the engine, which would make it as root; its user inside must pass through.
                    folder.mkdir(parents=True)
                    folder.chmod(0o755)
        (self.directory / "applied").unlink(missing_ok=True)
        write_private(environment, text)
        done = self.compose("up", "--detach", "--no-build", "--pull", "never", "--quiet-pull", *arguments)
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[-TAIL:])
            remedy = f"read the service's log (docker logs), then deploy again.\n{self._logs(config)}"
            raise ComposeProblem([Problem(f"Compose could not start the services: {said}", str(environment), remedy)])

    def down(self) -> bool:
        """Stop and remove the containers; data stays. Whether there were any."""
        if not (self.directory / ".env").exists() or not self.containers():
            return False
        done = self.compose("down", "--remove-orphans")
        if done.returncode:
            said = done.stderr.strip()
            raise ComposeProblem([Problem(f"Compose could not stop the services: {said}", self.name, "docker ps")])
        return True

    def await_ready(self, config: Mapping[str, Any], ready: Sequence[Mapping[str, Any]], seconds: float) -> float:
        """Wait until every service runs, is healthy where it says so, and answers; return the seconds that took.

        ``ready``: {service, http} asked from the host, or {service, command} run inside of the service.

        Raises:
            ComposeProblem: names who does not answer, with its last words.
        """
        begun = time.monotonic()
        open_checks = list(ready)
        while True:
            now = self.containers()
            reasons = {}
            for name, service in config["services"].items():
                if reason := _unwell(now.get(name), name in ONE_SHOT, bool(service.get("healthcheck"))):
                    reasons[name] = reason
            answers = [(one, self._asked(one)) for one in open_checks]
            open_checks = [one for one, why in answers if why]
            reasons = {one["service"]: why for one, why in answers if why} | reasons
            if not reasons:
                return time.monotonic() - begun
            if time.monotonic() - begun > seconds:
                break
            time.sleep(1)
        problems = [
            Problem(
                f"{name} is not ready after {seconds:.0f} s: {reason}",
                f"docker logs of service {name}:\n{self._log(name)}",
                f"see its last words above; `docker compose -p {self.name} logs {name}` shows more. A small or busy "
                "host needs more time: dify_compose_ready_seconds.",
            )
            for name, reason in sorted(reasons.items())
        ]
        raise ComposeProblem(problems)

    # --- What the containers really have ----------------------------------------------------------------------------

    def environments(self) -> dict[str, dict[str, str]]:
        """Service -> the environment that its container was started with."""
        rows = self.containers()
        ids = {row["ID"]: name for name, row in rows.items()}
        done = docker("inspect", "--format", "{{.Id}} {{json .Config.Env}}", *ids)
        found = {}
        for line in done.stdout.splitlines():
            container, _, env = line.partition(" ")
            name = next((name for short, name in ids.items() if container.startswith(short)), "")
            found[name] = dict(entry.partition("=")[::2] for entry in json.loads(env) or [])
        return found

    def check_effective(self) -> None:
        """Both sides of each conversation run with one key, whatever the files say.

        Raises:
            ComposeProblem: names the two that differ.
        """
        services = {name: {"environment": env} for name, env in self.environments().items()}
        if problems := check_pairs(services, "docker inspect of the running containers"):
            raise ComposeProblem(problems)

    def prove_endpoint(self, service: str, url: str, key: str, seconds: float = 60) -> None:
        """Have a container ask the model's server, with the site's key, and be answered.

        Raises:
            ComposeProblem: what the container met, and what stands between the two.
        """
        container = self.containers().get(service, {}).get("ID", "")
        argv = ["docker", "exec", "--interactive", container, "python3", "-c", ASK, url]
        end = time.monotonic() + seconds
        while True:
            done = subprocess.run(argv, input=key, capture_output=True, text=True, check=False)
            if not done.returncode or time.monotonic() > end:
                break
            time.sleep(2)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            what = f"From inside of the container {service}, the model's server {url} is not reached: {said}"
            remedy = (
                "for a server on this host: its address must be one that containers reach (inference_bind, by itself "
                "that of Docker's bridge), and a firewall must let them in, e.g. `ufw allow from 172.16.0.0/12 to any "
                "port <port> proto tcp`; elsewhere: the way out of containers (kit_https_proxy, kit_no_proxy)."
            )
            raise ComposeProblem([Problem(what, f"docker exec {self.name}-{service}-1", remedy)])

    def copy_out(self, image: str, source: str, target: Path) -> bool:
        """Copy a file out of an image unless it is there from this very image; whether it was copied.

        Raises:
            ComposeProblem: the image does not have it.
        """
        identity = docker("image", "inspect", "--format", "{{.Id}}", image).stdout.strip()
        note = self.directory / f"{target.name}.image"
        if target.exists() and note.exists() and note.read_text() == identity:
            return False
        made = docker("create", image)
        container = made.stdout.strip()
        new = target.with_name(f".{target.name}.new")
        try:
            done = docker("cp", f"{container}:{source}", str(new)) if container else made
        finally:
            if container:
                docker("rm", container)
        if done.returncode:
            what = f"The image {image} has no {source}: {done.stderr.strip()}"
            raise ComposeProblem(
                [Problem(what, image, "use upstream's image of that version, or one made the same way.")]
            )
        new.chmod(0o700)
        new.replace(target)
        write_private(note, identity)
        return True

    def _asked(self, check: Mapping[str, Any]) -> str:
        if "http" in check:
            return _http(check["http"])
        done = self.compose("exec", "--no-TTY", check["service"], *check["command"])
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["(nothing)"]
        return f"{check['command'][0]} ended with status {done.returncode}: {said[0]}" if done.returncode else ""

    def _log(self, service: str) -> str:
        done = self.compose("logs", "--no-color", "--no-log-prefix", "--tail", str(TAIL), service)
        return done.stdout.strip()

    def _logs(self, config: Mapping[str, Any]) -> str:
        now = self.containers()
        bad = [name for name in config["services"] if _unwell(now.get(name), name in ONE_SHOT, False)]
        return "\n".join(f"{name}: {self._log(name)}" for name in bad)


def _unwell(row: Mapping[str, Any] | None, one_shot: bool, healthcheck: bool) -> str:
    if row is None:
        return "it has no container"
    state, health = row["State"], row.get("Health", "")
    if one_shot:
        return "" if state == "exited" and row.get("ExitCode") == 0 else f"{state}, exit status {row.get('ExitCode')}"
    if state != "running":
        return f"its container is {state}, exit status {row.get('ExitCode')}"
    return f"its health check says {health}" if healthcheck and health not in ("", "healthy") else ""


def _http(url: str) -> str:
    # The host itself is never asked through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as answer:
            return "" if answer.status == 200 else f"{url} answers {answer.status}"
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{url}: {error}"


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step; only its owner may read it, from its first byte on."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        shutil.move(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
