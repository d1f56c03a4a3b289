"""Build the parts of a Dify release from source, once, into a cache that sites may share; install them from there.

Runs on the host as a program, one process a part (``kit_build.py PART SPEC``), so that the parts overlap. Whichever
needs the sources first fetches them; a part that is in the cache already needs none, so a cache copied from another
machine is enough to deploy where Dify's repositories can't be reached.

A build is a folder ``<cache>/builds/<part>-<tag>-<machine>-<key>`` that appears complete or not at all. Its key
covers what the result depends on: the commit or archive, the adjustments, and FORMAT. The compilers' patch versions
are left out on purpose: a newer Node or Go is no reason to spend twenty minutes on the same program.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from ansible.module_utils import kit_fetch, kit_release, kit_release_source
except ImportError:  # on the host the files lie side by side, and there is no Ansible
    import kit_fetch  # type: ignore[import-not-found]
    import kit_release  # type: ignore[import-not-found]
    import kit_release_source  # type: ignore[import-not-found]

# Raise it when this file builds something else from the same inputs.
FORMAT = 1
MANIFEST = "kit-build.json"
DIFY, DAEMON, EGRESS, SANDBOX = "dify", "plugin-daemon", "egress", "sandbox"
# Which source each part is built from, and its title for people.
PARTS = {
    "web": (DIFY, "web bundle"),
    "api": (DIFY, "API with its packages"),
    "plugin-daemon": (DAEMON, "plugin daemon"),
    "agent-backend": (DIFY, "agent backend"),
    "agent-runtime": (DIFY, "agent runtime"),
    "egress": (EGRESS, "egress proxy"),
    "sandbox": (SANDBOX, "sandbox"),
    "docker": (DIFY, "Dify's Compose files"),
}
# What a small part waits for, so that no more memory is needed than for the large ones side by side.
AFTER = {"agent-backend": ["api"], "agent-runtime": ["plugin-daemon"]}
# The venvs of parts, which run with this host's interpreter.
VENVS = {"api": ".venv", "agent-backend": ".venv", "sandbox": "venv"}
# Node's own limit; what the bundler takes outside of it comes on top.
WEB_HEAP_MB = 4096
# Observed peaks: 1.16.0's web build on two cores, and the daemon's and the API's together.
WEB_PEAK_MB, OTHERS_PEAK_MB = 8400, 2600
# The agent runtime's programs by the names under which they look for each other, as in upstream's image.
RUNTIME_PROGRAMS = {
    "shellctl": "./cmd/shellctl",
    "shellctl-sanitize-pty": "./cmd/sanitize-pty",
    "shellctl-runner-exit": "./cmd/runner-exit",
    "shellctl-runner": "./cmd/runner",
    "dify-agent": "./cmd/dify-agent-cli",
}
# What a running API doesn't read.
API_WITHOUT = ("tests", ".idea", ".vscode", ".venv", "__pycache__", "Dockerfile*", "conftest.py", "cnt_base.sh")


class BuildError(Exception):
    """A build that can't go on; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Source:
    """One of Dify's repositories at a release.

    Attributes:
        verify: ``strict`` refuses a tag with another commit than the release file's, ``warn`` records it.
        archive: a tar archive of the release on this host, used instead of the repository; its sha256 must agree.
    """

    name: str
    repository: str
    tag: str
    commit: str
    verify: str = "strict"
    archive: str = ""
    archive_sha256: str = ""

    def identity(self) -> list[str]:
        """What decides the fetched tree; where a proved commit comes from does not."""
        if self.archive:
            return [self.tag, self.archive_sha256]
        return [self.tag, self.commit] + ([self.verify, self.repository] if self.verify != "strict" else [])

    def variable(self, suffix: str) -> str:
        """The name of the site's variable, for remedies."""
        return f"{ {DIFY: 'dify_source', DAEMON: 'plugin_daemon'}.get(self.name, self.name) }_{suffix}"


@dataclass(frozen=True)
class Spec:
    """What to build and where.

    Attributes:
        python: the interpreter that the API's venv will use on this host.
        adjust: which of the release's adjustments are wanted, see ``kit_release.choose_adjustments``.
        parts: those of PARTS that the site has.
        release, env_keys: the release's data files, which the sources must agree with.
        locks: what else a source stands for: the digest of the kit's own pins of it, which lie in
            ``home``/runtime/build/<name>. The egress proxy's go.mod and go.sum are its whole source.
    """

    home: Path
    cache: Path
    python: str
    adjust: str
    release: dict[str, Any]
    env_keys: dict[str, list[str]]
    version: str
    parts: list[str]
    sources: dict[str, Source]
    locks: dict[str, str]

    @classmethod
    def load(cls, raw: dict[str, Any]) -> Spec:
        """A spec from plain data, as the role gives it (``dify_source_spec``)."""
        sources = {name: Source(name=name, **values) for name, values in raw["sources"].items()}
        return cls(
            Path(raw["home"]),
            Path(raw["cache"]),
            raw["python"],
            raw["adjust"],
            raw["release"],
            raw["env_keys"],
            str(raw["version"]),
            raw["parts"],
            sources,
            raw.get("locks", {}),
        )

    def key(self, part: str) -> str:
        """Digest of what a part depends on."""
        name = PARTS[part][0]
        if name not in self.sources:
            return _digest([FORMAT, part, self.locks[name]])
        if name in self.locks:
            return _digest([FORMAT, part, self.sources[name].identity(), self.locks[name]])
        adjustments = [self.adjust, self.release["adjustments"]] if name == DIFY else []
        return _digest([FORMAT, part, self.sources[name].identity(), adjustments])

    def build(self, part: str) -> Path:
        """Where a part lies in the cache once it is built."""
        name = PARTS[part][0]
        words = [part, *([self.sources[name].tag] if name in self.sources else []), platform.machine(), self.key(part)]
        return self.cache / "builds" / "-".join(words)

    def tree(self, name: str) -> Path:
        """Where a source lies, fetched and adjusted: Dify and its daemon, checked together, or the sandbox."""
        if name == SANDBOX:
            source = self.sources[name]
            return self.cache / "src" / f"{name}-{source.tag}-{_digest(source.identity())}"
        both = [self.sources[name].identity() for name in (DIFY, DAEMON)]
        return self.cache / "src" / f"{self.version}-{_digest([both, self.adjust, self.release['adjustments']])}"

    def installed(self, part: str) -> Path:
        """Where a part of the release lies under the site's home."""
        return self.home / "releases" / self.version / part

    def marker(self, part: str) -> Path:
        """A file that exists when exactly this build of the part is installed."""
        return self.installed(part) / f".kit-{self.key(part)}"


def jobs(spec: Spec, program: list[str], environment: dict[str, str], memory_mb: int) -> list[dict[str, Any]]:
    """The release's parts as jobs for ``kit_jobs``.

    Side by side, as one waits for the network while another computes; one after the other where ``memory_mb``
    doesn't allow both.
    """
    cramped = memory_mb < WEB_PEAK_MB + OTHERS_PEAK_MB
    return [
        {
            "name": part,
            "title": PARTS[part][1],
            "argv": [*program[:-1], part, program[-1]],
            "environment": environment,
            "creates": str(spec.marker(part)),
            "after": spec.parts[:index] if cramped else AFTER.get(part, []),
        }
        for index, part in enumerate(spec.parts)
    ]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def say(text: str) -> None:
    """A line of progress; people see a job's last one while it runs."""
    print(text, flush=True)


@contextlib.contextmanager
def locked(path: Path, mode: int = 0o666) -> Iterator[None]:
    """Hold a lock that no other run has; the system frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, mode), "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that holds {path}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(argv: list[str], directory: Path, **environment: str) -> None:
    """Run a command in ``directory`` with its output in ours.

    Raises:
        BuildError: it failed or is missing.
    """
    say("$ " + " ".join(argv))
    # Whether Python writes byte code and which venv is active must not leak in from the caller.
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")}
    try:
        code = subprocess.run(argv, cwd=directory, env=inherited | environment, check=False).returncode
    except FileNotFoundError:
        raise BuildError(
            f"{argv[0]} is not on the PATH {os.environ.get('PATH')}.\n"
            "Remedy: `make deploy` installs every build tool but git into runtime/bin; install git."
        ) from None
    if code != 0:
        raise BuildError(f"`{' '.join(argv)}` in {directory} ended with status {code}." + _explain(code))


def _explain(code: int) -> str:
    # 137 is how a shell or pnpm passes on that its child was killed.
    if code not in (-9, 137):
        return ""
    return (
        "\nIt was killed, most likely because memory ran out. Remedy: stop other programs or add swap; or build on a "
        "larger machine and copy its cache's builds/ here (kit_cache)."
    )


def copy(source: Path, target: Path, without: tuple[str, ...] = ()) -> None:
    """Copy a file or a tree; links and times are kept."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*without))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def fresh(folder: Path) -> Path:
    """An empty folder, whatever a run that was killed has left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# --- Sources --------------------------------------------------------------------------------------------------------


def ensure_sources(spec: Spec, wanted: str) -> Path:
    """Fetch, verify, check and adjust a source and its like unless the cache has them; return their common folder."""
    if wanted not in spec.sources:
        return spec.home / "runtime/build"
    tree = spec.tree(wanted)
    with locked(spec.cache / "locks" / f"src-{tree.name}"):
        if not tree.exists():
            work = fresh(tree.with_name(f".{tree.name}.partial"))
            names = (SANDBOX,) if wanted == SANDBOX else (DIFY, DAEMON)
            found = {name: fetch(spec.sources[name], work / name) for name in names}
            notices = []
            if wanted != SANDBOX:
                check(spec, work)
                notices = adjust(spec, work / DIFY)
            for name in names:
                source = spec.sources[name]
                note = (
                    []
                    if found[name] == source.commit
                    else [
                        f"{name} {source.tag} comes from {source.repository} with commit {found[name]}; "
                        f"the release file says {source.commit} (accepted: dify_source_verify is {source.verify})."
                    ]
                )
                manifest = {"commit": found[name], "notices": note + (notices if name == DIFY else [])}
                (work / f"{name}.json").write_text(json.dumps(manifest))
            work.rename(tree)
    return tree


def fetch(source: Source, target: Path) -> str:
    """Get a source by whichever way the site has chosen; return its commit."""
    return unpack(source, target) if source.archive else clone(source, target)


def clone(source: Source, target: Path) -> str:
    """Clone a release's tag, without history and as the user has configured git; return the commit.

    Raises:
        BuildError: the repository can't be read, or its tag is another commit and ``verify`` is strict.
    """
    # Asking for a password would hang unseen, and so would a connection that has stalled.
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_HTTP_LOW_SPEED_LIMIT": "1000", "GIT_HTTP_LOW_SPEED_TIME": "60"}
    try:
        run(
            [
                "git",
                "-c",
                "advice.detachedHead=false",
                "clone",
                "--quiet",
                "--depth",
                "1",
                "--branch",
                source.tag,
                source.repository,
                str(target),
            ],
            target.parent,
            **quiet,
        )
    except BuildError as error:
        raise BuildError(
            f"{error}\n{source.name} {source.tag} could not be cloned from {source.repository}.\nRemedy, one of:\n"
            f"  - make that address reachable (proxy: kit_https_proxy), or name a mirror with "
            f"{source.variable('repository')} or git's own insteadOf\n"
            f"  - name an archive of the release with {source.variable('archive')} and "
            f"{source.variable('archive_sha256')}\n"
            "  - copy the cache's builds/ from a machine that has built this release (kit_cache)\n"
            "  - `make deploy DIFY=skip` deploys everything but Dify"
        ) from None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=target, check=True, capture_output=True, text=True)
    found = commit.stdout.strip()
    if found != source.commit and source.verify == "strict":
        raise BuildError(
            f"{source.repository} has {source.name} {source.tag} at commit {found}; the release file says "
            f"{source.commit}.\nRemedy: use a repository whose history was not rewritten; or, if you trust this one "
            "(a private mirror that had to rewrite it), set dify_source_verify: warn."
        )
    shutil.rmtree(target / ".git")
    return found


def unpack(source: Source, target: Path) -> str:
    """Unpack a release's archive; return the commit that its sha256 stands for.

    Raises:
        BuildError: it can't be read, or it is another file than its sha256 says.
    """
    name = source.variable("archive")
    try:
        with open(source.archive, "rb") as stream:
            found = kit_fetch.digest_of(stream).hex()
    except OSError as error:
        raise BuildError(
            f"{source.archive} can't be read: {error.strerror}.\n"
            f"Remedy: {name} must name a tar archive on the host that the service user may read."
        ) from None
    if found != source.archive_sha256:
        raise BuildError(
            f"{source.archive} has sha256 {found}; {name}_sha256 says {source.archive_sha256 or 'nothing'}.\n"
            f"Remedy: fetch the archive again, or correct {name}_sha256 if you trust this file."
        )
    work = fresh(target.with_name(target.name + ".unpacked"))
    run(["tar", "--extract", "--no-same-owner", "--file", source.archive], work)
    # A code host's archive holds one folder, that of `git archive` none.
    inner = list(work.iterdir())
    (inner[0] if len(inner) == 1 else work).rename(target)
    shutil.rmtree(work, ignore_errors=True)
    return source.commit


def check(spec: Spec, tree: Path) -> None:
    """Compare the sources with the release's data files; BuildError names every key that differs."""
    try:
        drift = kit_release_source.check_checkout(spec.release, tree / DIFY, tree / DAEMON, spec.env_keys)
    except kit_release_source.SourceError as error:
        drift = [str(error)]
    if drift:
        raise BuildError(
            f"The source of {spec.version} is not what deploy/releases/{spec.version}.yml describes:\n  "
            + "\n  ".join(drift)
            + f"\nRemedy: if this source is the one you want, `make release-file VERSION={spec.version}` writes the "
            "file anew; otherwise correct dify_source_repository or dify_source_archive."
        )


def adjust(spec: Spec, tree: Path) -> list[str]:
    """Apply those of the release's adjustments that this network needs; return a notice for each."""
    try:
        chosen = kit_release.choose_adjustments(spec.release, spec.adjust)
        kit_release.apply_adjustments(chosen, tree)
    except kit_release.ReleaseError as error:
        raise BuildError(str(error)) from None
    notices = kit_release.adjustment_notices(chosen)
    for notice in notices:
        say(notice)
    return list(notices)


# --- Builds ---------------------------------------------------------------------------------------------------------


def build_web(spec: Spec, tree: Path, work: Path, out: Path) -> None:
    """The web bundle: Next.js' standalone server, laid out and started as in upstream's image (web/Dockerfile)."""
    for item in (
        "package.json",
        "pnpm-lock.yaml",
        "pnpm-workspace.yaml",
        "web",
        "packages",
        "e2e/package.json",
        "sdks/nodejs-client/package.json",
    ):
        if (tree / item).exists():
            copy(tree / item, work / item)
    settings = {
        "CI": "true",
        "NEXT_TELEMETRY_DISABLED": "1",
        "NODE_OPTIONS": f"--max-old-space-size={WEB_HEAP_MB}",
        "pnpm_config_store_dir": str(spec.cache / "pnpm"),
        # Just installed from the lockfile; checking that again before each script would go to the network.
        "pnpm_config_verify_deps_before_run": "false",
    }
    # The workspace's own scripts only set up git hooks and development servers (and one wants npx).
    run(["pnpm", "install", "--frozen-lockfile", "--ignore-scripts", "--filter", "dify-web..."], work, **settings)
    web = work / "web"
    run(["pnpm", "build"], web, **settings)
    copy(web / ".next/standalone", out)
    copy(web / "public", out / "web/public")
    copy(web / ".next/static", out / "web/.next/static")
    (out / "start.sh").write_text(start_script((web / "docker/entrypoint.sh").read_text()))
    (out / "start.sh").chmod(0o755)


def start_script(entrypoint: str) -> str:
    """Upstream's start script for the web server, with the image's path replaced by the script's own folder.

    It turns the environment's settings into those that the pages read; every release has its own list.

    Raises:
        BuildError: it doesn't end with the known command.
    """
    lines = entrypoint.rstrip().splitlines()
    # 1.14.2: `exec node /app/web/server.js`
    if not lines[-1].startswith("exec node /app/") or not lines[-1].endswith("/web/server.js"):
        raise BuildError(
            f"web/docker/entrypoint.sh ends with {lines[-1]!r}, not with `exec node .../web/server.js`.\n"
            "Remedy: this release starts its web server in a way that the kit doesn't know; deploy one of "
            "deploy/releases, or teach start_script() in deploy/plugins/module_utils/kit_build.py."
        )
    return "\n".join([*lines[:-1], 'exec node "${0%/*}/web/server.js"', ""])


def build_api(spec: Spec, tree: Path, work: Path, out: Path) -> None:
    """The API and its venv: relocatable, so that one build serves every home, with byte code compiled once."""
    copy(tree / "api", work / "api", API_WITHOUT)
    if (tree / "dify-agent").exists():
        copy(tree / "dify-agent", work / "dify-agent")  # the API's lockfile names it by its path
    api = work / "api"
    make_venv(spec, api)
    run([".venv/bin/python", "-m", "compileall", "-q", "-j", "0", "-x", r"/\.venv/", "."], api)
    api.rename(out)


def make_venv(spec: Spec, project: Path, *options: str) -> None:
    """Install a project's locked packages into its ``.venv``: relocatable, with byte code."""
    # Resolved: an interpreter that was copied finds its library beside itself, not beside a link to it.
    run(["uv", "venv", "--relocatable", "--python", os.path.realpath(spec.python), ".venv"], project)
    sync = ["uv", "sync", "--frozen", "--no-dev", "--no-editable", "--compile-bytecode"]
    run([*sync, *options, "--python", ".venv/bin/python"], project)


def build_agent_backend(spec: Spec, tree: Path, work: Path, out: Path) -> None:
    """The agent backend: a venv that holds the program as a package (dify-agent/Dockerfile)."""
    project = work / "dify-agent"
    copy(tree / "dify-agent", project, API_WITHOUT)
    make_venv(spec, project, "--extra", "server")
    out.mkdir()
    (project / ".venv").rename(out / ".venv")


def build_agent_runtime(spec: Spec, tree: Path, work: Path, out: Path) -> None:
    """What runs agents' shell commands, and the command line for them (dify-agent-runtime/docker/Dockerfile)."""
    del spec
    source = work / "dify-agent-runtime"
    # Its tests look at the image's files; nothing is built from them.
    copy(tree / "dify-agent-runtime", source, ("tests", "docker"))
    out.mkdir()
    for name, command in RUNTIME_PROGRAMS.items():
        run(["go", "build", "-trimpath", "-ldflags", "-s -w", "-o", str(out / name), command], source, CGO_ENABLED="0")


def build_daemon(spec: Spec, tree: Path, work: Path, out: Path) -> None:
    """The plugin daemon and its command line, which migrates, packages and signs."""
    del work
    out.mkdir()
    version = spec.sources[DAEMON].tag
    variables = {
        "server": "github.com/langgenius/dify-plugin-daemon/pkg/manifest.VersionX",
        "commandline": "main.VersionX",
    }
    for command, variable in variables.items():
        run(
            [
                "go",
                "build",
                "-trimpath",
                "-ldflags",
                f"-s -w -X {variable}={version}",
                "-o",
                str(out / command),
                f"./cmd/{command}",
            ],
            tree,
            CGO_ENABLED="0",
        )


def build_egress(spec: Spec, tree: Path, work: Path, out: Path) -> None:
    """The egress proxy, out of the Go module proxy: go.sum holds the hash of everything."""
    del spec, work
    out.mkdir()
    package = "github.com/stripe/smokescreen"
    run(
        ["go", "build", "-mod=readonly", "-trimpath", "-ldflags", "-s -w", "-o", str(out / "smokescreen"), package],
        tree,
        CGO_ENABLED="0",
    )


def from_npm(spec: Spec, artefact: Any, folder: Path) -> Path:
    """Unpack a package of the npm registry, verified by its hash, into ``folder``; return the package's own folder."""
    try:
        archive = kit_fetch.fetch(artefact, spec.cache / "downloads", os.environ.get("NPM_CONFIG_REGISTRY", ""))
    except kit_fetch.FetchError as error:
        raise BuildError(str(error)) from None
    run(["tar", "--extract", "--no-same-owner", "--file", str(archive)], fresh(folder))
    return folder / "package"


def build_sandbox(spec: Spec, tree: Path, work: Path, out: Path) -> None:
    """dify-sandbox as upstream's build script makes it, and the Python packages that user code may import."""
    copy(tree, work)
    runners = work / "internal/core/runner"
    library = runners / "nodejs/dependens/node_temp"
    # Its binary comes from npm; every run copies the package, so what no Linux of this kind reads is left out.
    locked = json.loads((library / "package-lock.json").read_text())["packages"]["node_modules/koffi"]
    artefact = kit_fetch.Artefact("koffi", locked["version"], "npm", "koffi", locked["integrity"])
    unpacked = from_npm(spec, artefact, work / "koffi")
    package = library / "node_modules/koffi"
    shutil.rmtree(package)
    for file in ("package.json", "index.js", "indirect.js", "LICENSE.txt"):
        copy(unpacked / file, package / file)
    machine = {"x86_64": "linux_x64", "aarch64": "linux_arm64"}[platform.machine()]
    copy(unpacked / "build/koffi" / machine, package / "build/koffi" / machine)
    flags = ["-trimpath", "-ldflags", "-s -w"]
    for language in ("python", "nodejs"):
        target = f"internal/core/runner/{language}/{language}.so"
        run(
            ["go", "build", *flags, "-buildmode=c-shared", "-o", target, f"./cmd/lib/{language}"], work, CGO_ENABLED="1"
        )
    out.mkdir()
    run(["go", "build", *flags, "-o", str(out / "main"), "./cmd/server"], work, CGO_ENABLED="1")
    # Its list of allowed system calls was made for this Node; a newer one is killed.
    pins = json.loads((spec.home / "runtime/build/sandbox/node.json").read_text())
    pin = pins["platforms"][{"x86_64": "linux-x64", "aarch64": "linux-arm64"}[platform.machine()]]
    node = from_npm(spec, kit_fetch.Artefact("node", pins["version"], "npm", pin["name"], pin["hash"]), work / "node")
    copy(node / "bin/node", out / "node")
    run(["uv", "venv", "--relocatable", "--python", os.path.realpath(spec.python), str(out / "venv")], work)
    requirements = spec.home / "runtime/build/sandbox/requirements.txt"
    options = ["--require-hashes", "--compile-bytecode", "--python", str(out / "venv/bin/python")]
    # Copied, not linked: uv's cache holds what services with a stricter umask downloaded, and code in workflows runs as
    # users of its own, who must read all of it.
    run(["uv", "pip", "sync", *options, str(requirements)], work, UV_LINK_MODE="copy")
    for path in (out / "venv").rglob("*"):
        if not path.is_symlink():
            mode = path.stat().st_mode & 0o7777
            path.chmod(mode | (0o555 if mode & 0o100 else 0o444))


def build_docker(spec: Spec, tree: Path, work: Path, out: Path) -> None:
    """Upstream's Compose files as they are; containers run from images."""
    del spec, work
    copy(tree / "docker", out)


BUILDERS: dict[str, Callable[[Spec, Path, Path, Path], None]] = {
    "web": build_web,
    "api": build_api,
    "plugin-daemon": build_daemon,
    "agent-backend": build_agent_backend,
    "agent-runtime": build_agent_runtime,
    "egress": build_egress,
    "sandbox": build_sandbox,
    "docker": build_docker,
}


OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def build(spec: Spec, part: str) -> Path:
    """Build a part unless the cache has it; return its folder there."""
    target = spec.build(part)
    with locked(spec.cache / "locks" / target.name):
        if not target.exists():
            started = time.monotonic()
            name = PARTS[part][0]
            sources = ensure_sources(spec, name)
            work = fresh(spec.cache / "work" / target.name)
            out = work / "out"
            (work / "tree").mkdir()
            BUILDERS[part](spec, sources / name, work / "tree", out)
            manifest: dict[str, Any] = {"notices": []}
            if name in spec.sources:
                manifest = json.loads((sources / f"{name}.json").read_text())
            manifest |= {"part": part, "key": spec.key(part), "seconds": round(time.monotonic() - started)}
            (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            (out / spec.marker(part).name).touch()
            for path in out.rglob("*"):
                if not path.is_symlink() and path.stat().st_mode & OTHERS_WRITE:
                    path.chmod(path.stat().st_mode & 0o7777 & ~OTHERS_WRITE)
            target.parent.mkdir(parents=True, exist_ok=True)
            out.rename(target)
            shutil.rmtree(work, ignore_errors=True)
            say(f"built {target.name} in {manifest['seconds']} s")
    return target


# --- Installation ---------------------------------------------------------------------------------------------------


def link_or_copy(source: str, target: str) -> str:
    """A second name for the file where the file system allows it, else a copy; what is installed is never edited.

    A file that others may write (Next.js and uv make such) is always copied, without that.
    """
    mode = os.stat(source).st_mode
    try:
        if not mode & OTHERS_WRITE:
            os.link(source, target)
            return target
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK):
            raise
    shutil.copy2(source, target)
    os.chmod(target, mode & 0o7777 & ~OTHERS_WRITE)
    return target


def install(spec: Spec, part: str) -> None:
    """Put a part from the cache under the home, complete or not at all."""
    target = spec.installed(part)
    with locked(spec.home / "var/run/install.lock", 0o600):
        if spec.marker(part).exists():
            return
        new, old = (target.with_name(f".{part}.{suffix}") for suffix in ("new", "old"))
        for rest in (new, old):
            shutil.rmtree(rest, ignore_errors=True)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(build(spec, part), new, symlinks=True, copy_function=link_or_copy)
        if part in VENVS:
            use_interpreter(new / VENVS[part], Path(os.path.realpath(spec.python)))
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def use_interpreter(venv: Path, python: Path) -> None:
    """Point a venv, which may come from another home or machine, at this host's interpreter."""
    settings = venv / "pyvenv.cfg"
    lines = [
        f"home = {python.parent}" if line.startswith("home = ") else line for line in settings.read_text().splitlines()
    ]
    # New files: the old ones may be the cache's own, by hard link.
    settings.unlink()
    settings.write_text("\n".join(lines) + "\n")
    link = venv / "bin/python"
    link.unlink()
    link.symlink_to(python)


def main(argv: list[str]) -> int:
    """``kit_build.py PART SPEC``: build and install one part."""
    os.umask(0o022)  # a cache may be shared
    try:
        spec = Spec.load(json.loads(Path(argv[2]).read_text()))
        build(spec, argv[1])
        install(spec, argv[1])
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
