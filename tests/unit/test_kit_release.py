"""Release files: form, advisories, adjustments, what a source says about itself, drift, and the tool that drafts."""

from __future__ import annotations

import copy
import functools
import http.server
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lock_runtime
import pytest
import release_file
import yaml
from ansible.module_utils import kit_release, kit_release_source

RELEASES = Path(release_file.RELEASES)
VERSIONS = sorted(path.stem for path in RELEASES.glob("*.yml"))


@functools.cache
def _parsed(version: str) -> Any:
    return yaml.safe_load((RELEASES / f"{version}.yml").read_text())


def load(version: str = "1.16.0") -> Any:
    return copy.deepcopy(_parsed(version))


def env_keys(version: str) -> Any:
    return yaml.safe_load((RELEASES / "env-keys" / f"{version}.yml").read_text())


# --- The files that are committed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_committed_file_is_valid(version: str) -> None:
    assert kit_release.validate_release(load(version)) == []
    assert load(version)["dify"]["tag"] == version


@pytest.mark.parametrize("version", VERSIONS)
def test_committed_file_is_as_the_tool_writes_it(version: str) -> None:
    header = release_file.HEADER.format(version=version)
    ordered = release_file._ordered(load(version), kit_release.SCHEMA)
    assert release_file.render(ordered, header, release_file.COMMENTS) == (RELEASES / f"{version}.yml").read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_env_keys_are_sorted_and_know_what_the_kit_sets(version: str) -> None:
    keys = env_keys(version)
    assert sorted(keys) == ["agent", "api", "compose", "plugin_daemon", "web"]
    assert all(names == sorted(set(names)) for names in keys.values())
    assert {"SECRET_KEY", "DB_HOST", "REDIS_HOST", "INNER_API_KEY_FOR_PLUGIN", "STORAGE_TYPE"} <= set(keys["api"])
    assert {"SERVER_KEY", "DIFY_INNER_API_KEY", "FORCE_VERIFYING_SIGNATURE"} <= set(keys["plugin_daemon"])


def test_runtime_has_the_pnpm_of_every_release() -> None:
    lock = yaml.safe_load(lock_runtime.LOCK.read_text())["runtime_lock"]["pnpm"]
    for version in VERSIONS:
        pnpm = load(version)["toolchain"]["pnpm"]
        assert lock[pnpm["version"]]["any"]["hash"] == pnpm["integrity"]


# --- Validation -------------------------------------------------------------------------------------------------------


def test_every_problem_is_reported_at_once() -> None:
    data = load()
    data["dify"]["commit"] = "main"
    data["celery"]["queues"] = ["b", "a", "a"]
    del data["sandbox"]
    data["nonsense"] = 1
    data["toolchain"]["go"] = 1.26
    data["compose"]["services"] = {"web": "x", "api": "y"}
    data["upgrade"]["steps"][0]["command"] = []
    data["adjustments"][0]["edits"][0]["pattern"] = "("
    problems = kit_release.validate_release(data)
    places = {problem.partition(":")[0] for problem in problems}
    assert places == {
        "dify.commit",
        "celery.queues",
        "sandbox",
        "nonsense",
        "toolchain.go",
        "compose.services",
        "upgrade.steps[0].command",
        "adjustments[0].edits[0].pattern",
    }
    assert len(problems) == 8


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_no_mapping_is_refused(data: object) -> None:
    assert kit_release.validate_release(data) == ["the file: must be a mapping"]


def test_what_is_left_to_fill_in_is_refused() -> None:
    data = load()
    data["advisories"] = [kit_release.FILL_IN]
    data["upgrade"] = {"from": kit_release.FILL_IN, "steps": [kit_release.FILL_IN]}
    problems = kit_release.validate_release(data)
    assert [problem.partition(":")[0] for problem in problems] == [
        "advisories[0]",
        "upgrade.from",
        "upgrade.steps[0]",
    ]
    assert all(kit_release.FILL_IN in problem for problem in problems)


# --- Advisories -------------------------------------------------------------------------------------------------------


def test_critical_advisory_is_open_until_named() -> None:
    release = load("1.14.2")
    [advisory] = kit_release.open_advisories(release, [])
    assert advisory["cve"] == "CVE-2026-41948"
    assert kit_release.open_advisories(release, ["CVE-1999-0001"]) == [advisory]
    assert kit_release.open_advisories(release, [advisory["id"]]) == []
    assert kit_release.open_advisories(release, [advisory["cve"]]) == []


def test_lesser_advisory_and_one_without_a_cve() -> None:
    release = load("1.14.2")
    release["advisories"][0]["severity"] = "high"
    assert kit_release.open_advisories(release, []) == []
    release["advisories"][0].update(severity="critical", cve="")
    assert len(kit_release.open_advisories(release, [""])) == 1, "an empty word acknowledges nothing"


# --- Adjustments ------------------------------------------------------------------------------------------------------


def adjustment(*edits: dict[str, Any], name: str = "change") -> dict[str, Any]:
    defaults = {"replacement": "", "count": 1}
    return {
        "name": name,
        "when_unreachable": "https://there.example/",
        "reason": "It does\nnot answer.",
        "consequence": "None.",
        "edits": [{**defaults, **edit} for edit in edits],
    }


def test_edits_build_on_each_other_and_replace_literally(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\nthree\n")
    (tmp_path / "a.txt").chmod(0o755)
    chosen = [
        adjustment({"file": "a.txt", "pattern": "^two\\n"}),
        adjustment({"file": "a.txt", "pattern": "^(t)hree$", "replacement": r"\1 \n"}),
    ]
    assert kit_release.apply_adjustments(chosen, tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"one\r\n\\1 \\n\n"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o755
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"], "nothing temporary is left"


def test_a_hard_linked_cache_keeps_its_file(tmp_path: Path) -> None:
    (tmp_path / "cached").write_text("x\n")
    (tmp_path / "tree").hardlink_to(tmp_path / "cached")
    kit_release.apply_adjustments([adjustment({"file": "tree", "pattern": "x", "replacement": "y"})], tmp_path)
    assert (tmp_path / "cached").read_text() == "x\n"


@pytest.mark.parametrize(("text", "found"), [("a\n", 0), ("b\nb\n", 2)])
def test_an_edit_that_does_not_fit_changes_nothing(tmp_path: Path, text: str, found: int) -> None:
    (tmp_path / "fits").write_text("b\n")
    (tmp_path / "other").write_text(text)
    chosen = [adjustment({"file": "fits", "pattern": "b"}, {"file": "other", "pattern": "^b$"}, name="two-files")]
    with pytest.raises(kit_release.ReleaseError) as error:
        kit_release.apply_adjustments(chosen, tmp_path)
    for part in ("two-files", str(tmp_path / "other"), "'^b$'", f"{found} times, not 1", "Remedy:"):
        assert part in str(error.value)
    assert (tmp_path / "fits").read_text() == "b\n"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(kit_release.ReleaseError, match=r"gone\.txt cannot be read"):
        kit_release.apply_adjustments([adjustment({"file": "gone.txt", "pattern": "b"})], tmp_path)


def test_modes_choose() -> None:
    release = load()
    names = [item["name"] for item in release["adjustments"]]

    def chosen(mode: str, answers: bool) -> list[str]:
        return [item["name"] for item in kit_release.choose_adjustments(release, mode, lambda address: answers)]

    assert chosen("auto", answers=True) == chosen("never", answers=False) == []
    assert chosen("auto", answers=False) == chosen("always", answers=True) == names
    with pytest.raises(kit_release.ReleaseError, match="dify_source_adjustments: 'yes' is none of auto, always, never"):
        kit_release.choose_adjustments(release, "yes")


def test_notices_are_one_line_each() -> None:
    assert kit_release.adjustment_notices([adjustment()]) == ["source adjusted (change): It does not answer. None."]


# --- Probe: real git, a real listener ---------------------------------------------------------------------------------


class _Answers(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - set anew by the fixture

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(200 if self.path == "/there" else 403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    _Answers.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_address_is_asked_once(site: str) -> None:
    probe = kit_release.Probe({})
    assert [probe.reachable(f"{site}/there") for _ in range(3)] == [True] * 3
    assert not probe.reachable(f"{site}/refused-by-a-proxy")
    assert _Answers.asked == ["/there", "/refused-by-a-proxy"]


def test_the_builds_proxy_is_used(site: str) -> None:
    assert kit_release.Probe({"http_proxy": site}).reachable("http://unknown.invalid/there") is False
    assert _Answers.asked == ["http://unknown.invalid/there"], "the proxy was asked, and said no"


def test_nobody_there() -> None:
    assert not kit_release.Probe({}, seconds=2).reachable("http://127.0.0.1:1/there")


@pytest.mark.parametrize("scheme", ["https", "git+https"])
def test_a_silent_peer_is_given_up(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        assert not kit_release.Probe(seconds=1).reachable(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/x")
        assert 1 <= time.monotonic() - begun < 10


def test_git_honours_insteadof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    author = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run(["git", "-C", str(repository), *author, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    config = tmp_path / "gitconfig"
    config.write_text(f'[url "{repository}"]\n    insteadOf = https://forge.invalid/there\n')
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "GIT_CONFIG_GLOBAL": str(config), "GIT_CONFIG_NOSYSTEM": "1"}
    probe = kit_release.Probe(environment)
    assert probe.reachable("git+https://forge.invalid/there")
    assert not probe.reachable("git+https://forge.invalid/elsewhere")
    assert not kit_release.Probe({"PATH": str(tmp_path)}).reachable("git+https://forge.invalid/there"), "no git: no"


# --- What a source says about itself ----------------------------------------------------------------------------------

# Of upstream's form, but not upstream's text.
SOURCE = {
    "package.json": """\
{
  "name": "x",
  "engines": {
    "node": "^22.1.0"
  },
  "packageManager": "pnpm@11.0.1+sha512.0123"
}
""",
    "api/pyproject.toml": '[project]\nname = "x"\nrequires-python = "~=3.12.0"\n',
    "docker/docker-compose.yaml": """\
x-shared: &shared
  env_file:
    - ./.env

services:
  # A comment
  worker:
    image: langgenius/dify-api:9.9.0
    environment:
      MODE: worker
      SENTRY: ${API_SENTRY_DSN:-}
    command:
      - echo "$${IN_CONTAINER}"
  api:
    <<: *shared
    image: langgenius/dify-api:9.9.0
  plugin_daemon:
    image: langgenius/dify-plugin-daemon:0.9.1-local
  sandbox:
    image: 'langgenius/dify-sandbox:0.3.0'
  built-here:
    build:
      context: .

networks:
  inner:
    internal: true
""",
    "docker/.env.example": "# A title\nDB_HOST=db\n# OPTIONAL_NAME=x\n",
    "docker/envs/web.env.example": "EXPOSE_PORT=80\n",
    "api/docker/entrypoint.sh": """\
#!/bin/bash
if [[ "${EDITION}" == "CLOUD" ]]; then
  DEFAULT_QUEUES="mail,workflow_team"
else
  DEFAULT_QUEUES="workflow,mail,api_token"
fi
WORKER_POOL="${CELERY_WORKER_POOL:-${CELERY_WORKER_CLASS:-gevent}}"
exec celery -A entry.celery worker -P ${WORKER_POOL} \\
  -Q ${DEFAULT_QUEUES}
exec celery -A app.celery beat
exec gunicorn \\
  --no-control-socket \\
  --bind "${HOST:-0.0.0.0}:${PORT:-5001}" \\
  --workers ${SERVERS:-1} \\
  app:socketio_app
""",
    "api/configs/feature.py": """\
class Things(BaseSettings):
    DB_HOST: str = Field(default="")
    FILES_URL: str = Field(validation_alias=AliasChoices("FILES_URL", "OLD_FILES_URL"))
    model_config = x
""",
    "api/extensions/store.py": 'a = os.environ.get("STORE_URL")\nb = os.getenv(\n    "STORE_KEY", "")\n',
    "api/tests/test_x.py": 'os.getenv("ONLY_IN_TESTS")\n',
    "web/env.ts": "const server = {\n    SERVER_URL: z.string(),\n  NEXT_PUBLIC_A: z.string(),\n}\n",
    "web/docker/entrypoint.sh": "export NEXT_PUBLIC_B=${SITE_B}\n",
    "dify-agent/src/dify_agent/server/settings.py": """\
class ServerSettings(BaseSettings):
    redis_url: str = "x"
    stub_url: str | None = Field(default=None, validation_alias="AGENT_STUB_URL")
    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="AGENT_",
    )
""",
}
DAEMON = {
    "go.mod": "module x\n\ngo 1.26.2\n",
    "internal/types/app/config.go": 'Key string `envconfig:"SERVER_KEY" validate:"required"`\n',
}


def checkout(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    author = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    for command in (["add", "-A"], ["commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(root), *author, *command], check=True)
    return root


@pytest.fixture
def dify(tmp_path: Path) -> Path:
    return checkout(tmp_path / "dify", SOURCE)


@pytest.fixture
def daemon(tmp_path: Path) -> Path:
    return checkout(tmp_path / "daemon", DAEMON)


def test_source_is_read(dify: Path, daemon: Path) -> None:
    assert kit_release_source.read_source(dify, daemon) == {
        "celery": {
            "app": "entry.celery",
            "beat_app": "app.celery",
            "pool": "gevent",
            "queues": ["api_token", "mail", "workflow"],
        },
        "compose": {
            "services": {
                "api": "langgenius/dify-api:9.9.0",
                "built-here": "",
                "plugin_daemon": "langgenius/dify-plugin-daemon:0.9.1-local",
                "sandbox": "langgenius/dify-sandbox:0.3.0",
                "worker": "langgenius/dify-api:9.9.0",
            }
        },
        "gunicorn": {
            "app": "app:socketio_app",
            "flags": ["--no-control-socket"],
            "options": {"bind": "0.0.0.0:5001", "workers": "1"},
        },
        "plugin_daemon": {"tag": "0.9.1"},
        "sandbox": {"version": "0.3.0"},
        "toolchain": {"go": "1.26.2", "node": "^22.1.0", "pnpm": {"version": "11.0.1"}, "python": "~=3.12.0"},
    }


def test_environment_variables_are_read_by_component(dify: Path, daemon: Path) -> None:
    keys = kit_release_source.read_env_keys(dify, daemon)
    assert keys["api"] == ["DB_HOST", "FILES_URL", "OLD_FILES_URL", "STORE_KEY", "STORE_URL"]
    assert keys["web"] == ["NEXT_PUBLIC_A", "NEXT_PUBLIC_B", "SERVER_URL", "SITE_B"]
    assert keys["agent"] == ["AGENT_REDIS_URL", "AGENT_STUB_URL"]
    assert keys["plugin_daemon"] == ["SERVER_KEY"]
    assert {"API_SENTRY_DSN", "CELERY_WORKER_POOL", "EXPOSE_PORT", "OPTIONAL_NAME"} <= set(keys["compose"])
    assert not {"IN_CONTAINER", "DB_HOST", "ONLY_IN_TESTS"} & set(keys["compose"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("package.json", "{}", "changed its form"),
        ("api/docker/entrypoint.sh", 'DEFAULT_QUEUES="mail"\n', "0 queue lists"),
        ("docker/docker-compose.yaml", "services: {}\n", "no services found"),
        ("docker/docker-compose.yaml", None, "Is this a checkout of Dify"),
    ],
)
def test_a_source_of_unknown_form_is_refused(dify: Path, name: str, text: str | None, message: str) -> None:
    (dify / name).unlink() if text is None else (dify / name).write_text(text)
    with pytest.raises(kit_release_source.SourceError, match=message) as error:
        kit_release_source.read_source(dify)
    assert str(dify / name) in str(error.value)


def test_drift_names_the_keys(dify: Path, daemon: Path) -> None:
    release = kit_release_source.read_source(dify, daemon)
    keys = kit_release_source.read_env_keys(dify, daemon)
    assert kit_release_source.check_checkout(release, dify, daemon, keys) == []

    release["celery"]["queues"] = ["api_token", "old", "workflow"]
    release["compose"]["services"]["gone"] = "x"
    release["plugin_daemon"]["tag"] = "0.9.0"
    release["toolchain"]["pnpm"]["version"] = "10.0.0"
    del release["compose"]["services"]["api"]
    keys["api"] = [*keys["api"][1:], "ZZ"]
    assert sorted(kit_release_source.check_checkout(release, dify, daemon, keys)) == [
        "celery.queues: mail is in the source only",
        "celery.queues: old is in the release file only",
        "compose.services.api: 'langgenius/dify-api:9.9.0' is in the source only",
        "compose.services.gone: is in the release file only",
        "env_keys.api: DB_HOST is in the source only",
        "env_keys.api: ZZ is in the release file only",
        "plugin_daemon.tag: '0.9.1' in the source, '0.9.0' in the release file",
        "toolchain.pnpm.version: '11.0.1' in the source, '10.0.0' in the release file",
    ]


# --- The tool ---------------------------------------------------------------------------------------------------------


def draft(tmp_path: Path, dify: Path, daemon: Path) -> int:
    return release_file.main(
        ["9.9.0", "--checkout", str(dify), "--daemon-checkout", str(daemon), "--releases", str(tmp_path)]
    )


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "npm/pnpm").mkdir(parents=True)
    integrity = "sha512-" + "A" * 86 + "=="
    (tmp_path / "npm/pnpm/11.0.1").write_text(json.dumps({"dist": {"integrity": integrity}}))
    handler = functools.partial(_Quiet, directory=str(tmp_path / "npm"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{server.server_address[1]}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield integrity
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_draft_says_what_is_left_and_a_second_run_keeps_it(
    tmp_path: Path, dify: Path, daemon: Path, registry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draft(tmp_path, dify, daemon) == 1
    left = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert left == ["sandbox.commit", "advisories[0]", "upgrade.from", "upgrade.steps[0]", "postgres.newest"]

    path = tmp_path / "9.9.0.yml"
    data = yaml.safe_load(path.read_text())
    head = subprocess.run(["git", "-C", str(dify), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert data["dify"] == {"tag": "9.9.0", "commit": head.stdout.strip(), "repository": release_file.DIFY}
    assert data["toolchain"]["pnpm"] == {"version": "11.0.1", "integrity": registry}

    data["sandbox"]["commit"] = "1" * 40
    data.update(advisories=[], upgrade={"from": "9.8.0", "steps": []}, postgres={"newest": "18"})
    data["adjustments"] = [adjustment({"file": "a", "pattern": r"^x\d: y$", "replacement": "  a: 'b'\n"})]
    data["dify"]["commit"] = "0" * 40
    path.write_text(yaml.safe_dump(data))
    assert draft(tmp_path, dify, daemon) == 0
    assert "dify.commit: kept" in capsys.readouterr().out
    assert yaml.safe_load(path.read_text()) == data

    once = path.read_text()
    assert draft(tmp_path, dify, daemon) == 0
    assert path.read_text() == once
    assert yaml.safe_load((tmp_path / "env-keys/9.9.0.yml").read_text())["plugin_daemon"] == ["SERVER_KEY"]


def test_tool_reports_what_is_no_checkout(tmp_path: Path, daemon: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draft(tmp_path, daemon, daemon) == 2
    assert "Is this a checkout of Dify?" in capsys.readouterr().err
    assert not (tmp_path / "9.9.0.yml").exists()
