"""Files of a host: rendered elsewhere, written here atomically, compared first.

Nothing in this file knows Ansible, so that it can be read and tested as plain Python.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_ENV_LINE = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)='((?:[^']|'\\'')*)'$", re.MULTILINE)


class FileProblem(Exception):
    """Something that a person must mend; the text says what, where and how."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One wanted file, folder, link or absence; `content` is the whole file."""

    dest: Path
    state: str = "file"
    mode: int = 0o600
    content: bytes = b""
    target: str = ""
    secret: bool = False
    is_env: bool = False
    validate: tuple[str, ...] = ()


@dataclasses.dataclass
class Change:
    """What differs, in words that may be shown to anybody."""

    dest: Path
    before: str
    after: str


def render_env(values: dict[str, Any]) -> str:
    r"""Lines of KEY='value', sorted, that both `sh` and kit-exec read.

    A single quote inside a value is written as '\'' (close, escaped quote, open). None leaves the line out,
    '' sets an empty value, booleans become true and false. Lists and dicts are refused: which text they
    would become is for the caller to say.
    """
    lines = []
    for name in sorted(values):
        value = values[name]
        if value is None:
            continue
        if not _ENV_NAME.match(name):
            raise FileProblem(f"'{name}' is no name for an environment variable. Remedy: letters, digits and _ only.")
        if isinstance(value, bool):
            value = "true" if value else "false"
        if not isinstance(value, (str, int, float)):
            raise FileProblem(
                f"The environment variable {name} is a {type(value).__name__}, but must be text, a number or a boolean."
                " Remedy: turn it into text where it is set, e.g. with | join(',') or | to_json."
            )
        text = str(value)
        if "\0" in text:
            raise FileProblem(f"The environment variable {name} contains a NUL byte. Remedy: remove it.")
        lines.append(f"{name}='" + text.replace("'", "'\\''") + "'\n")
    return "".join(lines)


def parse_env(text: str) -> dict[str, str]:
    """The inverse of `render_env`; anything else in the text is ignored."""
    return {name: value.replace("'\\''", "'") for name, value in _ENV_LINE.findall(text)}


def entry_from_dict(raw: dict[str, Any], base: Path) -> Entry:
    """An `Entry` from the action plugin's wire format: content is base64, `env` still a dict."""
    dest = base / str(raw["dest"])
    state = raw.get("state") or "file"
    is_env = raw.get("env") is not None
    content = render_env(raw["env"]).encode() if is_env else base64.b64decode(raw.get("content") or "")
    default_mode = "0700" if state == "directory" else "0600"
    return Entry(
        dest=dest,
        state=state,
        mode=int(raw.get("mode") or default_mode, 8),
        content=content,
        target=str(raw.get("target") or ""),
        secret=bool(raw.get("secret")),
        is_env=is_env,
        validate=tuple(str(part) for part in raw.get("validate") or ()),
    )


def apply(entry: Entry, *, base: Path, check: bool) -> Change | None:
    """Make the host match the entry; returns what changed (or would, with `check`), else None.

    Raises:
        FileProblem: when something is in the way, or the new content fails its validation (the old file then stays).
    """
    try:
        if entry.state == "directory":
            return _directory(entry, check=check)
        if entry.state == "link":
            return _link(entry, check=check)
        if entry.state == "absent":
            return _absent(entry, base=base, check=check)
        return _file(entry, base=base, check=check)
    except PermissionError as error:
        raise FileProblem(
            f"{error.strerror}: {error.filename or entry.dest}, as user id {os.getuid()}. Remedy: give that path"
            f" (and what lies in it) back to the service user: chown -R <user> {entry.dest.parent}"
        ) from error
    except OSError as error:
        raise FileProblem(
            f"Cannot write {entry.dest}: {error.strerror or error}."
            " Remedy: free space or mend the file system, then run again."
        ) from error


def _mode_of(path: Path) -> int | None:
    """Permission bits of the thing itself (not of what a link points to), None where nothing is."""
    try:
        return path.lstat().st_mode & 0o7777
    except FileNotFoundError:
        return None


def _directory(entry: Entry, *, check: bool) -> Change | None:
    mode = _mode_of(entry.dest)
    if mode is not None and not entry.dest.is_dir():
        raise FileProblem(f"{entry.dest} must be a folder but is a file. Remedy: move it away and run again.")
    if mode == entry.mode or (entry.dest.is_symlink() and entry.dest.stat().st_mode & 0o7777 == entry.mode):
        return None
    if not check:
        if mode is None:
            _parents(entry.dest)
            entry.dest.mkdir()
        entry.dest.chmod(entry.mode)  # mkdir's mode would pass through the umask
    before = "absent\n" if mode is None else f"directory, mode {mode:04o}\n"
    return Change(entry.dest, before, f"directory, mode {entry.mode:04o}\n")


def _link(entry: Entry, *, check: bool) -> Change | None:
    before = "absent\n"
    if entry.dest.is_symlink():
        before = f"link to {os.readlink(entry.dest)}\n"
        if os.readlink(entry.dest) == entry.target:
            return None
    elif entry.dest.exists():
        raise FileProblem(
            f"{entry.dest} must be a link to {entry.target} but is something else. Remedy: move it away and run again."
        )
    if not check:
        _parents(entry.dest)
        new = _beside(entry.dest)
        new.symlink_to(entry.target)
        new.replace(entry.dest)  # a switch that no reader can see half done
    return Change(entry.dest, before, f"link to {entry.target}\n")


def _absent(entry: Entry, *, base: Path, check: bool) -> Change | None:
    if _mode_of(entry.dest) is None:
        return None
    if base.is_relative_to(entry.dest):
        raise FileProblem(f"Refusing to remove {entry.dest}: everything lies in it. Remedy: name a path below {base}.")
    if not check:
        if entry.dest.is_dir() and not entry.dest.is_symlink():
            shutil.rmtree(entry.dest)
        else:
            entry.dest.unlink()
    return Change(entry.dest, "present\n", "absent\n")


def _file(entry: Entry, *, base: Path, check: bool) -> Change | None:
    old_mode = _mode_of(entry.dest)
    is_link = entry.dest.is_symlink()
    if entry.dest.is_dir():
        raise FileProblem(f"{entry.dest} must be a file but is a folder. Remedy: move it away and run again.")
    old = entry.dest.read_bytes() if old_mode is not None and entry.dest.exists() else None
    if old == entry.content and not is_link:
        if old_mode == entry.mode:
            return None
        if not check:
            entry.dest.chmod(entry.mode)
        return Change(entry.dest, f"mode {old_mode:04o}\n", f"mode {entry.mode:04o}\n")
    if not check:
        _parents(entry.dest)
        new = _beside(entry.dest)
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(entry.content)
                file.flush()
                os.fchmod(file.fileno(), entry.mode)
                os.fsync(file.fileno())  # a power cut must not leave an empty file under the final name
            if entry.validate:
                _validate(entry, new, base)
            new.replace(entry.dest)
        finally:
            new.unlink(missing_ok=True)
    return Change(entry.dest, *_texts(entry, old))


def _parents(path: Path) -> None:
    """Missing parent folders, private like everything of the kit unless a role lists them itself."""
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir(mode=0o700)


def _beside(path: Path) -> Path:
    """A name in the same folder (rename stays atomic), the same every time: a killed run leaves at most one."""
    new = path.with_name(f".{path.name}.kit-new")
    new.unlink(missing_ok=True)
    return new


def _validate(entry: Entry, new: Path, base: Path) -> None:
    command = [part.replace("%s", str(new)) for part in entry.validate]
    try:
        done = subprocess.run(
            command, cwd=base, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FileProblem(
            f"The check of the new {entry.dest} could not run: {error}. The old file is untouched."
            f" Remedy: run {command[0]} by hand."
        ) from error
    if done.returncode != 0:
        output = "(not shown: the file is secret)" if entry.secret else (done.stdout + done.stderr).strip()[-3000:]
        raise FileProblem(
            f"The new {entry.dest} was refused by {' '.join(entry.validate)} (exit {done.returncode}); the old file is"
            f" untouched. It said:\n{output}\nRemedy: correct the variables that this file is made of."
        )


def _texts(entry: Entry, old: bytes | None) -> tuple[str, str]:
    """Both sides for a diff. Of a secret file only what is no secret: the names of its keys."""
    if entry.is_env and entry.secret:
        before, after = parse_env((old or b"").decode(errors="replace")), parse_env(entry.content.decode())
        return (
            "".join(f"{key} (value not shown)\n" for key in sorted(before)),
            "".join(
                f"{key} ({'new value' if key in before and before[key] != after[key] else 'value'} not shown)\n"
                for key in sorted(after)
            ),
        )
    if entry.secret:
        return ("" if old is None else "(old content not shown)\n"), "(content not shown)\n"
    try:
        return (old or b"").decode(), entry.content.decode()
    except UnicodeDecodeError:
        return f"binary, {len(old or b'')} bytes\n", f"binary, {len(entry.content)} bytes (content differs)\n"
