"""Fetching, building and installing a release's parts, with real git, archives, locks and processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import kit_build
from ansible.module_utils.kit_build import BuildError, Source, Spec

COMMIT = "5c6372d2f76d240265b92fd27c16bc772ffcb107"


def spec(tmp_path: Path, **dify: str) -> Spec:
    source = {"repository": "https://example.com/dify", "tag": "1.16.0", "commit": COMMIT}
    daemon = {"repository": "https://example.com/daemon", "tag": "0.6.3", "commit": COMMIT}
    return Spec.load(
        {
            "home": str(tmp_path / "home"),
            "cache": str(tmp_path / "cache"),
            "python": sys.executable,
            "adjust": "never",
            "release": {"adjustments": []},
            "env_keys": {},
            "version": "1.16.0",
            "parts": ["web", "api", "plugin-daemon", "agent-backend"],
            "sources": {"dify": source | dify, "plugin-daemon": daemon},
        }
    )


@pytest.fixture
def repository(tmp_path: Path) -> tuple[str, str]:
    """A git repository with the release's tag: its address and the tag's commit."""
    folder = tmp_path / "upstream"
    folder.mkdir()

    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (folder / "README").write_text("dify\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "release")
    git("tag", "1.16.0")
    return folder.as_uri(), git("rev-parse", "HEAD")


# --- What a build depends on ----------------------------------------------------------------------------------------


def test_a_mirror_with_the_proved_commit_is_the_same_build(tmp_path: Path) -> None:
    assert spec(tmp_path).key("web") == spec(tmp_path, repository="https://mirror.example.com/dify").key("web")


@pytest.mark.parametrize("changed", [{"commit": "0" * 40}, {"tag": "1.16.1"}, {"verify": "warn"}, {"archive": "/x"}])
def test_another_source_is_another_build(tmp_path: Path, changed: dict[str, str]) -> None:
    assert spec(tmp_path).key("web") != spec(tmp_path, **changed).key("web")


def test_where_it_is_installed_does_not_matter_to_a_build(tmp_path: Path) -> None:
    assert spec(tmp_path / "one").key("api") == spec(tmp_path / "two").key("api")


def test_the_daemon_does_not_depend_on_the_edits_of_dify(tmp_path: Path) -> None:
    plain, edited = spec(tmp_path), spec(tmp_path)
    edited.release["adjustments"] = [{"name": "x"}]
    assert plain.key("web") != edited.key("web")
    assert plain.key("plugin-daemon") == edited.key("plugin-daemon")


@pytest.mark.parametrize(("memory", "after"), [(24_000, []), (10_000, ["web", "api"])])
def test_parts_are_built_side_by_side_where_memory_allows(tmp_path: Path, memory: int, after: list[str]) -> None:
    jobs = kit_build.jobs(spec(tmp_path), ["python", "kit_build.py", "spec.json"], {"A": "b"}, memory)
    daemon = jobs[2]
    assert daemon["argv"] == ["python", "kit_build.py", "plugin-daemon", "spec.json"]
    assert daemon["after"] == after
    assert daemon["creates"].startswith(f"{tmp_path}/home/releases/1.16.0/plugin-daemon/")


def test_only_the_sites_parts_are_built_and_small_ones_take_turns_with_large_ones(tmp_path: Path) -> None:
    jobs = kit_build.jobs(spec(tmp_path), ["kit_build.py", "spec.json"], {}, 24_000)
    assert {job["name"]: job["after"] for job in jobs} == {
        "web": [],
        "api": [],
        "plugin-daemon": [],
        "agent-backend": ["api"],
    }
    assert set(kit_build.PARTS) == set(kit_build.BUILDERS)


def test_a_part_of_the_kits_own_pins_depends_on_them_alone(tmp_path: Path) -> None:
    def locked(lock: str, **dify: str) -> Spec:
        given = spec(tmp_path, **dify)
        return dataclasses.replace(given, parts=[*given.parts, "egress"], locks={"egress": lock})

    assert locked("a").key("egress") == locked("a", tag="1.17.0").key("egress")
    assert locked("a").key("egress") != locked("b").key("egress")
    jobs = kit_build.jobs(locked("a"), ["python", "kit_build.py", "spec.json"], {}, 24_000)
    assert jobs[-1]["argv"] == ["python", "kit_build.py", "egress", "spec.json"]


# --- Sources --------------------------------------------------------------------------------------------------------


def test_clone_takes_the_proved_commit_without_its_history(tmp_path: Path, repository: tuple[str, str]) -> None:
    address, commit = repository
    found = kit_build.clone(Source("dify", address, "1.16.0", commit), tmp_path / "tree")
    assert found == commit
    assert (tmp_path / "tree/README").read_text() == "dify\n"
    assert not (tmp_path / "tree/.git").exists()


def test_clone_refuses_a_rewritten_history(tmp_path: Path, repository: tuple[str, str]) -> None:
    address, commit = repository
    with pytest.raises(BuildError) as error:
        kit_build.clone(Source("dify", address, "1.16.0", COMMIT), tmp_path / "tree")
    for word in (commit, COMMIT, "Remedy", "dify_source_verify: warn"):
        assert word in str(error.value)


def test_clone_accepts_a_rewritten_history_when_the_site_does(tmp_path: Path, repository: tuple[str, str]) -> None:
    address, commit = repository
    assert kit_build.clone(Source("dify", address, "1.16.0", COMMIT, "warn"), tmp_path / "tree") == commit


def test_an_unreachable_repository_names_the_ways_out(tmp_path: Path) -> None:
    source = Source("plugin-daemon", (tmp_path / "nowhere").as_uri(), "0.6.3", COMMIT)
    with pytest.raises(BuildError) as error:
        kit_build.clone(source, tmp_path / "tree")
    for word in ("plugin_daemon_repository", "plugin_daemon_archive", "kit_cache", "DIFY=skip"):
        assert word in str(error.value)


def archive(tmp_path: Path, prefix: str) -> tuple[Path, str]:
    (tmp_path / "README").write_text("dify\n")
    (tmp_path / "LICENSE").write_text("free\n")
    path = tmp_path / "dify.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("README", "LICENSE"):
            tar.add(tmp_path / name, f"{prefix}{name}")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["", "dify-1.16.0/"])
def test_archive_with_or_without_a_folder_of_its_own(tmp_path: Path, prefix: str) -> None:
    path, sha256 = archive(tmp_path, prefix)
    source = Source("dify", "", "1.16.0", COMMIT, archive=str(path), archive_sha256=sha256)
    assert kit_build.fetch(source, tmp_path / "tree") == COMMIT
    assert (tmp_path / "tree/README").read_text() == "dify\n"


def test_archive_with_another_sha256_is_refused(tmp_path: Path) -> None:
    path, sha256 = archive(tmp_path, "")
    source = Source("dify", "", "1.16.0", COMMIT, archive=str(path), archive_sha256="f" * 64)
    with pytest.raises(BuildError, match=f"{sha256}.*dify_source_archive_sha256 says ffff"):
        kit_build.fetch(source, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    source = Source("dify", "", "1.16.0", COMMIT, archive=str(tmp_path / "none.tar.gz"), archive_sha256="f" * 64)
    with pytest.raises(BuildError, match=r"none\.tar\.gz can't be read"):
        kit_build.fetch(source, tmp_path / "tree")


# --- Builds ---------------------------------------------------------------------------------------------------------


def test_the_start_script_runs_from_where_it_lies() -> None:
    script = kit_build.start_script("#!/bin/bash\nexport A=${B}\n\nexec node /app/targets/next/web/server.js\n")
    assert script == '#!/bin/bash\nexport A=${B}\n\nexec node "${0%/*}/web/server.js"\n'


def test_an_unknown_start_script_is_refused() -> None:
    with pytest.raises(BuildError, match=r"ends with 'exec bun server\.js'.*\nRemedy"):
        kit_build.start_script("#!/bin/bash\nexec bun server.js\n")


@pytest.mark.parametrize("code", ["-9", "137"])
def test_a_build_that_ran_out_of_memory_says_so(tmp_path: Path, code: str) -> None:
    script = "kill -9 $$" if code == "-9" else "exit 137"
    with pytest.raises(BuildError, match=rf"status {code}[.]\nIt was killed.*memory"):
        kit_build.run(["/bin/sh", "-c", script], tmp_path)


def test_byte_code_is_written_whatever_the_caller_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    kit_build.run(["/bin/sh", "-c", 'test -z "$PYTHONDONTWRITEBYTECODE"'], tmp_path)


Builder = Callable[[Spec, Path, Path, Path], None]


@pytest.fixture
def built_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Builder], Spec]:
    """A spec whose web part is built by the given function; the sources are two small folders."""
    sources = tmp_path / "sources"
    (sources / "dify").mkdir(parents=True)
    (sources / "dify.json").write_text(json.dumps({"commit": COMMIT, "notices": ["adjusted"]}))

    def use(builder: Builder) -> Spec:
        monkeypatch.setattr(kit_build, "ensure_sources", lambda *_: sources)
        monkeypatch.setitem(kit_build.BUILDERS, "web", builder)
        return spec(tmp_path)

    return use


def build_slowly(_spec: Spec, _tree: Path, work: Path, out: Path) -> None:
    """Fails when another build of the same part is under way, and counts."""
    (work / "busy").mkdir()
    time.sleep(0.5)
    out.mkdir()
    (out / "server.js").write_text("x")
    with (_spec.cache / "count").open("a") as count:
        count.write("x")


def test_two_runs_build_a_part_once(built_with: Callable[[Builder], Spec]) -> None:
    wanted = built_with(build_slowly)
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=kit_build.build, args=(wanted, "web")) for _ in range(3)]
    for process in runs:
        process.start()
    for process in runs:
        process.join(30)
    assert [process.exitcode for process in runs] == [0, 0, 0]
    assert (wanted.cache / "count").read_text() == "x"
    manifest = json.loads((wanted.build("web") / kit_build.MANIFEST).read_text())
    assert manifest["commit"] == COMMIT
    assert manifest["notices"] == ["adjusted"]
    assert not list((wanted.cache / "work").iterdir())


def test_a_build_that_was_cut_off_leaves_nothing_and_is_done_again(built_with: Callable[[Builder], Spec]) -> None:
    def cut_off(_spec: Spec, _tree: Path, _work: Path, out: Path) -> None:
        out.mkdir()
        (out / "half").touch()
        raise KeyboardInterrupt

    wanted = built_with(cut_off)
    with pytest.raises(KeyboardInterrupt):
        kit_build.build(wanted, "web")
    assert not wanted.build("web").exists()
    built_with(build_slowly)
    assert sorted(file.name for file in kit_build.build(wanted, "web").iterdir()) == [
        wanted.marker("web").name,
        kit_build.MANIFEST,
        "server.js",
    ]


# --- Installation ---------------------------------------------------------------------------------------------------


def test_install_links_and_replaces_what_was_there(built_with: Callable[[Builder], Spec]) -> None:
    wanted = built_with(build_slowly)
    kit_build.build(wanted, "web")
    (wanted.installed("web") / "old").mkdir(parents=True)
    kit_build.install(wanted, "web")
    assert wanted.marker("web").exists()
    assert not (wanted.installed("web") / "old").exists()
    assert os.path.samefile(wanted.installed("web") / "server.js", wanted.build("web") / "server.js")
    assert [item.name for item in wanted.installed("web").parent.iterdir()] == ["web"]


def test_what_others_may_write_is_not_installed_so(built_with: Callable[[Builder], Spec]) -> None:
    def build_open(spec: Spec, source: Path, tree: Path, out: Path) -> None:
        build_slowly(spec, source, tree, out)
        (out / "server.js").chmod(0o666)

    wanted = built_with(build_open)
    cached = kit_build.build(wanted, "web") / "server.js"
    assert cached.stat().st_mode & 0o777 == 0o644
    cached.chmod(0o666)  # as an older kit, or another user of the cache, has left it
    kit_build.install(wanted, "web")
    assert (wanted.installed("web") / "server.js").stat().st_mode & 0o777 == 0o644
    assert not os.path.samefile(wanted.installed("web") / "server.js", cached)


def test_install_copies_where_links_are_impossible(
    built_with: Callable[[Builder], Spec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(1, "another user's file")

    monkeypatch.setattr(os, "link", refuse)
    wanted = built_with(build_slowly)
    kit_build.install(wanted, "web")
    assert (wanted.installed("web") / "server.js").read_text() == "x"


def test_a_venv_of_another_home_gets_this_ones_interpreter(tmp_path: Path) -> None:
    cache, venv = tmp_path / "cache", tmp_path / "venv"
    for folder in (cache, venv):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/python").symlink_to("/elsewhere/bin/python3.12")
    (cache / "pyvenv.cfg").write_text("home = /elsewhere/bin\nrelocatable = true\n")
    os.link(cache / "pyvenv.cfg", venv / "pyvenv.cfg")
    kit_build.use_interpreter(venv, Path(sys.executable).resolve())
    done = subprocess.run([venv / "bin/python", "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True)
    assert done.stdout.strip() == str(venv)
    assert "home = /elsewhere/bin" in (cache / "pyvenv.cfg").read_text()


def test_a_failing_build_ends_with_its_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw: dict[str, Any] = {
        "home": str(tmp_path / "home"),
        "cache": str(tmp_path / "cache"),
        "python": sys.executable,
        "adjust": "never",
        "release": {"adjustments": []},
        "env_keys": {},
        "version": "1.16.0",
        "parts": ["web"],
        "sources": {
            name: {"repository": (tmp_path / "none").as_uri(), "tag": "1", "commit": COMMIT}
            for name in ("dify", "plugin-daemon")
        },
    }
    (tmp_path / "spec.json").write_text(json.dumps(raw))
    assert kit_build.main(["kit_build.py", "web", str(tmp_path / "spec.json")]) == 1
    assert "could not be cloned" in capsys.readouterr().err
