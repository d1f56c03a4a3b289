"""kit_files: what it writes, what it refuses, and what it never shows."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.kit_files import (
    Change,
    Entry,
    FileProblem,
    apply,
    entry_from_dict,
    parse_env,
    render_env,
)

HARD_VALUES = {
    "BOTH": """a'b"c""",
    "DOLLAR": "$HOME `id` $(id) \\n \\",
    "EMPTY": "",
    "HASH": "a #b ;c",
    "LINES": "one\ntwo\n",
    "ONLY_QUOTES": "'''",
    "SPACES": "  both ends  ",
    "UNICODE": "密码 ü",
}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_env_values_survive_sh_and_our_own_reader(tmp_path: Path) -> None:
    text = render_env(HARD_VALUES)
    assert parse_env(text) == HARD_VALUES
    file = tmp_path / "x.env"
    file.write_text(text)
    seen = subprocess.run(
        ["env", "-i", "/bin/sh", "-c", f"set -a; . {file}; exec env -0"], capture_output=True, text=True, check=True
    )
    from_sh = dict(pair.split("=", 1) for pair in seen.stdout.split("\0") if pair)
    assert {name: from_sh[name] for name in HARD_VALUES} == HARD_VALUES


def test_env_is_sorted_leaves_none_out_and_spells_types() -> None:
    assert render_env({"B": True, "A": 5, "C": None, "D": "", "E": False, "F": 0.5}) == (
        "A='5'\nB='true'\nD=''\nE='false'\nF='0.5'\n"
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [({"A-B": "x"}, "'A-B' is no name"), ({"LIST": ["x"]}, "LIST is a list"), ({"NUL": "a\0b"}, "NUL contains a NUL")],
)
def test_env_refuses_what_no_process_could_get(values: dict[str, Any], said: str) -> None:
    with pytest.raises(FileProblem, match=said):
        render_env(values)


def test_file_is_private_by_default_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        assert apply(Entry(tmp_path / "etc" / "deep" / "x", content=b"1"), base=tmp_path, check=False)
    finally:
        os.umask(old)
    assert mode_of(tmp_path / "etc" / "deep" / "x") == 0o600
    assert mode_of(tmp_path / "etc" / "deep") == 0o700


def test_second_run_changes_nothing_and_touches_nothing(tmp_path: Path) -> None:
    entries = [
        Entry(tmp_path / "d", state="directory", mode=0o750),
        Entry(tmp_path / "d" / "f", content=b"x", mode=0o640),
        Entry(tmp_path / "l", state="link", target="d/f"),
        Entry(tmp_path / "gone", state="absent"),
    ]
    assert [apply(entry, base=tmp_path, check=False) is not None for entry in entries] == [True, True, True, False]
    before = (tmp_path / "d" / "f").stat()
    assert [apply(entry, base=tmp_path, check=False) for entry in entries] == [None] * 4
    after = (tmp_path / "d" / "f").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """The new content comes under a new inode: who has the old file open keeps reading the old text."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        apply(Entry(path, content=b"new"), base=tmp_path, check=False)
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_mode_alone_is_corrected_and_named(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x")
    path.chmod(0o644)
    change = apply(Entry(path, content=b"x"), base=tmp_path, check=False)
    assert change == Change(path, "mode 0644\n", "mode 0600\n")
    assert mode_of(path) == 0o600


def test_check_mode_reports_and_leaves_everything(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x")
    (tmp_path / "f").write_text("x")
    for entry in (
        Entry(tmp_path / "d", state="directory"),
        Entry(tmp_path / "f", content=b"y", validate=("false",)),
        Entry(tmp_path / "l", state="link", target="f"),
        Entry(tmp_path / "old", state="absent"),
    ):
        assert apply(entry, base=tmp_path, check=True) is not None
    assert sorted(os.listdir(tmp_path)) == ["f", "old"]
    assert (tmp_path / "f").read_text() == "x"


def test_a_file_that_fails_its_validation_does_not_land(tmp_path: Path) -> None:
    path = tmp_path / "conf"
    path.write_text("good\n")
    entry = Entry(
        path, content=b"bad\n", validate=("sh", "-c", 'echo "line 1 is $(cat "$0")"; grep -q good "$0"', "%s")
    )
    with pytest.raises(FileProblem, match=r"(?s)refused by sh.*line 1 is bad.*Remedy"):
        apply(entry, base=tmp_path, check=False)
    assert path.read_text() == "good\n"
    assert os.listdir(tmp_path) == ["conf"]


def test_validation_sees_the_final_mode_and_passes(tmp_path: Path) -> None:
    entry = Entry(tmp_path / "run.sh", content=b"#!/bin/sh\nexit 0\n", mode=0o700, validate=("%s",))
    assert apply(entry, base=tmp_path, check=False)


def test_a_missing_validator_says_which(tmp_path: Path) -> None:
    entry = Entry(tmp_path / "f", content=b"x", validate=("no-such-program", "%s"))
    with pytest.raises(FileProblem, match=r"no-such-program.*Remedy"):
        apply(entry, base=tmp_path, check=False)
    assert not (tmp_path / "f").exists()


def test_secret_env_shows_names_only(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text(render_env({"KEPT": "kept-secret", "CHANGED": "old-secret", "GONE": "gone-secret"}))
    content = render_env({"KEPT": "kept-secret", "CHANGED": "new-secret", "ADDED": "added-secret"}).encode()
    change = apply(Entry(path, content=content, secret=True, is_env=True), base=tmp_path, check=False)
    assert change is not None
    assert "secret" not in change.before + change.after
    assert change.after == "ADDED (value not shown)\nCHANGED (new value not shown)\nKEPT (value not shown)\n"


def test_other_secret_files_and_their_validators_show_nothing(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old-secret")
    with pytest.raises(FileProblem) as caught:
        apply(
            Entry(path, content=b"new-secret", secret=True, validate=("cat", "%s", "/nowhere")),
            base=tmp_path,
            check=False,
        )
    assert "new-secret" not in str(caught.value)
    change = apply(Entry(path, content=b"new-secret", secret=True), base=tmp_path, check=False)
    assert change is not None
    assert "secret" not in change.before + change.after


@pytest.mark.parametrize(
    "entry", [Entry(Path("d")), Entry(Path("f"), state="directory"), Entry(Path("f"), state="link")]
)
def test_something_else_in_the_way_is_not_destroyed(tmp_path: Path, entry: Entry) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "precious").write_text("x")
    (tmp_path / "f").write_text("x")
    with pytest.raises(FileProblem, match="Remedy: move it away"):
        apply(Entry(tmp_path / entry.dest, state=entry.state, target="t"), base=tmp_path, check=False)
    assert (tmp_path / "d" / "precious").exists()
    assert (tmp_path / "f").exists()


def test_absent_refuses_the_home_and_what_holds_it(tmp_path: Path) -> None:
    base = tmp_path / "home"
    base.mkdir()
    for path in (base, tmp_path, Path("/")):
        with pytest.raises(FileProblem, match="Refusing to remove"):
            apply(Entry(path, state="absent"), base=base, check=False)
    (base / "d").mkdir()
    (base / "d" / "f").write_text("x")
    assert apply(Entry(base / "d", state="absent"), base=base, check=False)
    assert os.listdir(base) == []


def test_a_link_is_switched_not_followed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to("a")
    change = apply(Entry(tmp_path / "current", state="link", target="b"), base=tmp_path, check=False)
    assert change == Change(tmp_path / "current", "link to a\n", "link to b\n")
    assert os.readlink(tmp_path / "current") == "b"
    assert os.listdir(tmp_path / "a") == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".f.kit-new").write_text("half")
    apply(Entry(tmp_path / "f", content=b"whole"), base=tmp_path, check=False)
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_foreign_files_are_explained(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o500)
    with pytest.raises(FileProblem, match=r"Permission denied.*chown"):
        apply(Entry(tmp_path / "d" / "f", content=b"x"), base=tmp_path, check=False)


def test_wire_format_has_the_documented_defaults(tmp_path: Path) -> None:
    assert entry_from_dict({"dest": "d", "state": "directory"}, tmp_path).mode == 0o700
    entry = entry_from_dict({"dest": "/abs/f", "content": base64.b64encode(b"x").decode(), "mode": "0755"}, tmp_path)
    assert (entry.dest, entry.content, entry.mode, entry.secret) == (Path("/abs/f"), b"x", 0o755, False)


# --- through Ansible ---------------------------------------------------------------------------------------------

REPO = Path(__file__).resolve().parents[2]
TASKS = """
- name: Files
  kit_files:
    base: "{{ home }}"
    files:
      - {dest: etc/t.conf, template: t.conf.j2, vars: {own: of this file}}
      - {dest: etc/env/x.env, env: {PASSWORD: "{{ password }}", PORT: "{{ port }}"}, secret: true}
      - {dest: bin/tool, file: tool, mode: "0755"}
      - {dest: note, content: "{{ password }}", secret: true}
"""


@pytest.fixture
def role(tmp_path: Path) -> Path:
    """A role of its own, as others use kit_files."""
    for folder in ("tasks", "templates", "files"):
        (tmp_path / "roles" / "r" / folder).mkdir(parents=True)
    role = tmp_path / "roles" / "r"
    (role / "tasks" / "main.yml").write_text(TASKS)
    (role / "templates" / "t.conf.j2").write_text(
        "{% if true %}\nport {{ port }}\n{% endif %}\n{% include 'part.j2' %}\n"
    )
    (role / "templates" / "part.j2").write_text("part {{ own }}")
    (role / "files" / "tool").write_bytes(b"#!/bin/sh\n\xff{{ not a template }}\n")
    return tmp_path


def play(folder: Path, *arguments: str, verbosity: str = "-v", **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run the role on this machine; secrets arrive as variables, as from a secrets file."""
    (folder / "vars.json").write_text(json.dumps({"home": str(folder / "home"), "port": 1, **variables}))
    (folder / "play.yml").write_text("- hosts: localhost\n  connection: local\n  gather_facts: false\n  roles: [r]\n")
    environment = {**os.environ, "ANSIBLE_CONFIG": str(REPO / "deploy" / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    environment |= {"ANSIBLE_ROLES_PATH": str(folder / "roles"), "ANSIBLE_STDOUT_CALLBACK": "default"}
    command = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        "play.yml",
        "-i",
        "localhost,",
        "-e",
        "@vars.json",
        verbosity,
        *arguments,
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_role_through_ansible(role: Path) -> None:
    secret = "s3cret-'quote\"-$HOME"
    looked = play(role, "--check", "--diff", password=secret)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert "changed=1" in looked.stdout
    assert not (role / "home").exists()

    first = play(role, "--diff", verbosity="-vvv", password=secret)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "s3cret" not in looked.stdout + looked.stderr + first.stdout + first.stderr
    home = role / "home"
    assert (home / "etc/t.conf").read_text() == "port 1\npart of this file\n"
    assert parse_env((home / "etc/env/x.env").read_text()) == {"PASSWORD": secret, "PORT": "1"}
    assert (home / "bin/tool").read_bytes() == b"#!/bin/sh\n\xff{{ not a template }}\n"
    assert (home / "note").read_text() == secret
    assert [mode_of(home / name) for name in ("etc/t.conf", "bin/tool")] == [0o600, 0o755]

    assert "changed=0" in play(role, password=secret).stdout
    assert "changed=1" in play(role, password=secret, port=2).stdout


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("{dest: x, contents: y}", "does not know contents"),
        ("{dest: x}", "needs exactly one of"),
        ("{dest: x, content: y, mode: 0644}", "octal text"),
        ("{dest: x, state: link}", "needs the target"),
        ("{dest: x, template: nowhere.j2}", "nowhere.j2"),
    ],
)
def test_a_wrong_item_is_explained(role: Path, item: str, said: str) -> None:
    (role / "roles/r/tasks/main.yml").write_text(f"- kit_files: {{base: '{{{{ home }}}}', files: [{item}]}}\n")
    done = play(role)
    assert done.returncode == 2
    assert said in done.stdout + done.stderr
