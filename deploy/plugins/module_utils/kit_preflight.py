"""Look at a host before anything is written to it: every problem at once, each with its remedy.

Standard library only, as it runs on the host with whatever Python is there. Probes of the network and of other
programs run side by side, each with a timeout, and only for what is not on the host yet: a second run asks nobody.
"""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import json
import locale
import os
import platform
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any

from . import kit_external, kit_migrate, kit_subids
from .kit_docker import check_engine
from .kit_files import parse_env
from .kit_gateway import forward
from .kit_mirrors import Mirrors
from .kit_network import opener
from .kit_postgres import Cluster, PostgresProblem, find_programs
from .kit_report import Problem

PROBE_SECONDS = 8.0
CLOCK_ERROR_SECONDS = 300  # certificates and tokens stop working
CLOCK_NOTICE_SECONDS = 30
# sun_path of Linux holds 108 bytes, the last of them zero.
SOCKET_PATH_LIMIT = 107
# What the kit puts into kit_home (CONTRIBUTING.md, "On a host").
HOME_ENTRIES = {"current", "etc", "inference", "releases", "runtime", "var"}
CA_BUNDLES = "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"
# Where a user, and root, keep a Python of their own (the runtime role looks there too).
PYTHON_FOLDERS = ".local/bin", ".pyenv/shims", "bin"
ROOT_PYTHONS = ".pyenv/versions/{version}.*/bin/{name}", ".local/share/uv/python/cpython-{version}.*/bin/{name}"
MIB = 1024**2
NET = "/proc/sys/net/ipv4"


@dataclass
class Findings:
    """What the checks add to: problems stop the run, notices go to its summary."""

    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def problem(self, what: str, where: str, remedy: str) -> None:
        """Add something that must be mended first."""
        self.problems.append(Problem(what, where, remedy))


@dataclass(frozen=True)
class Part:
    """Something that a deploy builds or downloads, and what that takes.

    Attributes:
        present: paths (globs); the part is there, and needs nothing, when one of them exists.
        sources: names of what it is fetched from.
        commands: programs that it needs on the host.
        memory_mb: the peak of its build.
        home_mb, cache_mb: what it leaves in kit_home and kit_cache.
        python: whether it chooses the Python that everything runs with.
    """

    name: str
    present: list[str]
    sources: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    memory_mb: int = 0
    home_mb: int = 0
    cache_mb: int = 0
    python: bool = False

    @property
    def missing(self) -> bool:
        """Whether a deploy must make it."""
        return not any(glob(pattern) for pattern in self.present)


@dataclass(frozen=True)
class Source:
    """Where parts come from.

    Attributes:
        kind: ``git`` (``tag`` must exist), ``http`` (a page that any mirror of it has) or ``file`` (on the host).
        remedy: the ways out, when it does not answer.
        others: URLs and files of which one will do as well.
        mirror: kind of what kit_mirrors chooses an address for; ``url`` is then the path below that address.
        fine: HTTP errors that a server gives to strangers at this URL, and that show all the same that it is there.
    """

    name: str
    kind: str
    url: str
    remedy: str
    tag: str = ""
    others: list[str] = field(default_factory=list)
    fine: list[int] = field(default_factory=list)
    mirror: str = ""


@dataclass(frozen=True)
class Account:
    """The user that everything will run as; ``uid`` is None while it does not exist."""

    name: str
    home: str
    uid: int | None
    gid: int | None
    shell: str = ""

    @classmethod
    def find(cls, name: str, home: str) -> Account:
        """The account of that name, or one that is still to be created."""
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            return cls(name, home, None, None)
        return cls(name, entry.pw_dir, entry.pw_uid, entry.pw_gid, entry.pw_shell)

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], seconds: float = PROBE_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run a short command as this user (as nobody while it does not exist), for what root may but it may not."""
        identity: dict[str, Any] = {}
        if os.geteuid() == 0 and self.uid != 0:
            nobody = 65534
            uid, gid = (nobody, nobody) if self.uid is None else (self.uid, self.gid)
            groups = [] if self.uid is None else os.getgrouplist(self.name, int(self.gid or 0))
            identity = {"user": uid, "group": gid, "extra_groups": groups}
        return subprocess.run(
            list(command),
            env=dict(environment),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            **identity,
        )

    def may(self, access: str, path: str) -> bool:
        """Whether this user may read (``r``), write (``w``) or search (``x``) a path."""
        return self.run(["test", f"-{access}", path], {"PATH": "/usr/bin:/bin"}).returncode == 0


def existing_parent(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    current = os.path.abspath(path)
    while not os.path.lexists(current):
        current = os.path.dirname(current)
    return current


def gigabytes(megabytes: float) -> str:
    """``8400`` -> ``8.2 GB``, ``18`` -> ``18 MB``."""
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


# --- The machine --------------------------------------------------------------------------------------------------


def os_release(text: str) -> dict[str, str]:
    """The fields of /etc/os-release."""
    return {key: value.strip().strip("\"'") for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE)}


def check_system(
    findings: Findings, system: str, machine: str, libc: tuple[str, str], machines: Sequence[str], glibc: str
) -> None:
    """Linux with a glibc that the prebuilt parts run on, on a processor that they exist for."""
    if system != "Linux":
        findings.problem(f"The host runs {system}.", "host", "deploy to Linux: Debian 12, Ubuntu 22.04 or newer.")
        return
    if machine not in machines:
        findings.problem(
            f"The host's processor is {machine}; the prebuilt parts exist for {', '.join(machines)}.",
            "uname -m",
            f"deploy to a host with {' or '.join(machines)}.",
        )
    name, version = libc
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    least = tuple(int(part) for part in glibc.split("."))
    if name != "glibc":
        findings.problem(
            "The host's C library is not glibc (musl, as on Alpine?); the prebuilt parts need it.",
            "ldd --version",
            "deploy to Debian 12, Ubuntu 22.04, Rocky 9 or newer.",
        )
    elif numbers < least:
        findings.problem(
            f"The host's glibc is {version}; the prebuilt parts need {glibc} or newer.",
            "ldd --version",
            "deploy to Debian 12, Ubuntu 22.04, Rocky 9 or newer.",
        )


def cpu_flags(cpuinfo: str) -> set[str]:
    """The features that every processor of /proc/cpuinfo has."""
    lists = [set(line.split()) for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)]
    return set.intersection(*lists) if lists else set()


def check_cpu(findings: Findings, flags: set[str], wanted: Iterable[str]) -> None:
    """The model service's CPU build uses instructions that old or emulated processors lack."""
    lacking = [flag for flag in wanted if flag not in flags]
    if lacking:
        findings.problem(
            f"The processor lacks {', '.join(lacking)}, which the model service's CPU build needs.",
            "/proc/cpuinfo, flags",
            "use a newer processor; of a virtual machine, set the CPU type to the host's (`host` in QEMU and Proxmox).",
        )


def memory_mb(meminfo: str, cgroup_limit: int | None) -> dict[str, int]:
    """``total``, ``available`` and ``swap``, in MiB; a container's limit counts, not its machine's memory."""
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE)}
    total, available = kib["MemTotal"] // 1024, kib.get("MemAvailable", kib["MemFree"]) // 1024
    if cgroup_limit is not None and cgroup_limit // MIB < total:
        total = cgroup_limit // MIB
        available = min(available, total)
    return {"total": total, "available": available, "swap": kib.get("SwapTotal", 0) // 1024}


def cgroup_memory_limit(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> int | None:
    """The lowest memory limit, in bytes, of the control groups that this process is in; None without one."""
    limits: list[int] = []
    with contextlib.suppress(OSError):
        for line in Path(membership).read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base, name = (root, "memory.max") if not controllers else (f"{root}/memory", "memory.limit_in_bytes")
            folder = Path(base + path)
            # In a container the path is the host's view; its own limit then stands at the root.
            for candidate in {folder, *folder.parents, Path(base)}:
                with contextlib.suppress(OSError, ValueError):
                    if candidate.is_relative_to(base):
                        limits.append(int((candidate / name).read_text()))
    return min(limits, default=None)


def check_memory(findings: Findings, memory: Mapping[str, int], services_mb: int, parts: Sequence[Part]) -> None:
    """Enough to run everything, and for the largest build that is not in the cache."""
    total, swap = memory["total"], memory["swap"]
    have = f"the host has {gigabytes(total)} and {gigabytes(swap)} swap"
    heaviest = max(parts, key=lambda part: part.memory_mb, default=None)
    swap_recipe = "  fallocate -l {size}G /swapfile && chmod 600 /swapfile && mkswap /swapfile && swapon /swapfile"
    if heaviest and total + swap < heaviest.memory_mb:
        size = (heaviest.memory_mb - total - swap) // 1024 + 2
        findings.problem(
            f"Building the {heaviest.name} takes {gigabytes(heaviest.memory_mb)} of memory at its peak; {have}.",
            "/proc/meminfo",
            "one of these:\n"
            "- let an administrator add swap, for the build only:\n" + swap_recipe.format(size=size) + "\n"
            "- build on a larger host of the same processor kind and copy its kit_cache/builds here\n"
            "- deploy everything but Dify: make deploy DIFY=skip",
        )
    elif total + swap < services_mb:
        findings.problem(
            f"The services take about {gigabytes(services_mb)} of memory; {have}.",
            "/proc/meminfo",
            "give the host more memory or swap, or put the model service on a host of its own.",
        )
    elif heaviest and memory["available"] + swap < heaviest.memory_mb:
        findings.notices.append(
            f"memory is short: {gigabytes(memory['available'])} are free, the {heaviest.name} takes "
            f"{gigabytes(heaviest.memory_mb)} while it is built; stop what else runs on the host if it fails"
        )


def check_locale(findings: Findings) -> None:
    """Everything runs under C.UTF-8."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    except locale.Error:
        findings.problem(
            "The host does not know the locale C.UTF-8, under which databases and services run.",
            "locale -a",
            "let an administrator install it (package libc-bin on Debian, glibc-minimal-langpack on Red Hat).",
        )
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def check_umask(findings: Findings, umask: int) -> None:
    """The owner may use what it creates."""
    if umask & 0o700:
        findings.problem(
            f"The umask {umask:04o} takes a new file's rights from its own owner.",
            "umask",
            "set it to 0022 or 0077 in the login shell's profile.",
        )


# --- Ports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """Who listens on a port; ``pid`` is None where /proc does not show us."""

    pid: int | None
    name: str
    user: str
    ours: bool = False

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}, user {self.user})" if self.pid else f"a process of user {self.user}"


def listening(tables: Iterable[str]) -> dict[int, tuple[str, int]]:
    """Port -> (socket inode, uid) of every TCP listener in the text of /proc/net/tcp and tcp6."""
    found: dict[int, tuple[str, int]] = {}
    for table in tables:
        for line in table.splitlines()[1:]:
            columns = line.split()
            if len(columns) > 9 and columns[3] == "0A":
                found[int(columns[1].rsplit(":", 1)[1], 16)] = (columns[9], int(columns[7]))
    return found


def _read_proc(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").replace("\0", " ").strip()
    return ""


def _link(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/{name}")
    return ""


def process_ids() -> list[int]:
    """Every process that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def socket_owners(inodes: set[str]) -> dict[str, int]:
    """Socket inode -> pid, as far as /proc lets this user look."""
    owners: dict[str, int] = {}
    for pid in process_ids():
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for descriptor in descriptors:
            target = _link(pid, f"fd/{descriptor}")
            if target.startswith("socket:[") and target[8:-1] in inodes:
                owners.setdefault(target[8:-1], pid)
    return owners


def belongs_to(pid: int, home: str) -> bool:
    """Whether a process is the kit's: it, or one that started it, runs from kit_home."""
    prefix = os.path.realpath(home) + "/"
    while pid > 1:
        words = [*_read_proc(pid, "cmdline").split(), _link(pid, "exe"), _link(pid, "cwd") + "/"]
        if any(word.startswith((home + "/", prefix)) for word in words):
            return True
        parent = re.search(r"\)\s+\S\s+(\d+)", _read_proc(pid, "stat"))
        pid = int(parent.group(1)) if parent else 0
    return False


def user_name(uid: int) -> str:
    """A user's name, or its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def port_holders(ports: Iterable[int], home: str) -> dict[int, Holder]:
    """Who listens on which of these ports."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6") if os.path.exists(f"/proc/net/{name}")]
    found = {port: entry for port, entry in listening(tables).items() if port in set(ports)}
    owners = socket_owners({inode for inode, _ in found.values()}) if found else {}
    holders: dict[int, Holder] = {}
    for port, (inode, uid) in found.items():
        pid = owners.get(inode)
        name = _read_proc(pid, "comm") if pid else ""
        holders[port] = Holder(pid, name, user_name(uid), bool(pid and belongs_to(pid, home)))
    return holders


def free_port_base(offsets: Iterable[int], taken: Callable[[int], bool], start: int) -> int | None:
    """The next hundred after ``start`` at which every port is free."""
    wanted = list(offsets)
    for base in range(start - start % 100 + 100, 65000, 100):
        if not any(taken(base + offset) for offset in wanted):
            return base
    return None


def check_ports(findings: Findings, ports: Mapping[str, int], home: str) -> None:
    """Every port is free, or held by this very installation."""
    foreign = {port: holder for port, holder in port_holders(ports.values(), home).items() if not holder.ours}
    if not foreign:
        return
    base = min(ports.values())
    candidates = range(base, 65536)
    taken = set(port_holders(candidates, home))
    suggestion = free_port_base([port - base for port in ports.values()], lambda port: port in taken, base)
    for name, port in ports.items():
        if port in foreign:
            holder = foreign[port]
            stop = f"stop that process (kill {holder.pid})" if holder.pid else "have that process stopped"
            move = f", or move the kit: kit_port_base: {suggestion}" if suggestion else ""
            findings.problem(f"Port {port} ({name}) is held by {holder}.", f"port {port}", f"{stop}{move}")


def check_low_ports(
    findings: Findings,
    ports: Mapping[str, int],
    home: str,
    limit: str = f"{NET}/ip_unprivileged_port_start",
) -> None:
    """Ports that Linux keeps for root can be had: the gateway runs as an ordinary user."""
    start = int(Path(limit).read_text())
    low = {name: port for name, port in ports.items() if port < start}
    caddy = os.path.realpath(f"{home}/runtime/bin/caddy")
    with contextlib.suppress(OSError):
        if os.getxattr(caddy, "security.capability"):
            return
    for name, port in low.items():
        high = {"gateway_https_port": 17818}.get(name, 17800)
        findings.problem(
            f"{name} is {port}, but Linux keeps ports below {start} for root; the gateway runs as an ordinary user.",
            name,
            "one of these, by an administrator:\n"
            "- let ordinary users have it, now and after a reboot:\n"
            f"  echo net.ipv4.ip_unprivileged_port_start={min(low.values())} > /etc/sysctl.d/90-dify-kit.conf\n"
            "  sysctl --system\n"
            f"- keep a high port ({name}: {high}, and gateway_bind: 0.0.0.0) and pass this one on to it:\n"
            f"  {forward(port, high)}\n"
            "- deploy with the high port, then give the right to the gateway alone, again whenever it is updated:\n"
            f"  setcap cap_net_bind_service=+ep $(readlink -f {home}/runtime/bin/caddy)",
        )


def check_binds(findings: Findings, binds: Mapping[str, str]) -> None:
    """Listeners' addresses are this host's own."""
    for name, address in binds.items():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family) as probe:
                probe.bind((address, 0))
        except OSError as error:
            findings.problem(
                f"{name} is {address}, at which this host cannot listen: {error.strerror}.",
                name,
                "choose one that `ip -brief address` lists there, 127.0.0.1 for the host alone, or 0.0.0.0 for all.",
            )


# --- User, folders, disk --------------------------------------------------------------------------------------------


def check_account(findings: Findings, account: Account, connecting: str, home: str) -> None:
    """The service user exists or can be made, and can be changed to."""
    if account.name == "root" or account.uid == 0:
        findings.problem(
            "kit_user is root; PostgreSQL refuses to run as root, and nothing else should.",
            "kit_user",
            "delete kit_user from the settings: as root, the kit creates a user of its own (dify-kit).",
        )
    elif os.geteuid() == 0:
        if not shutil.which("su"):
            findings.problem(
                "The command su is missing; root needs it to become the service user.",
                "su",
                "install it (package util-linux), or connect as the service user itself.",
            )
        if account.uid is None and not shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin"):
            findings.problem(
                f"The user {account.name} does not exist, and there is no useradd to create it.",
                "kit_user",
                f"create the user {account.name}, or install the package passwd (shadow-utils).",
            )
        if account.uid is None and not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", account.name):
            findings.problem(
                f"{account.name!r} is no name for a Linux user.",
                "kit_user",
                "use lower case letters, digits, _ and -; 32 at most.",
            )
        if account.shell.endswith(("/nologin", "/false")):
            findings.problem(
                f"Nobody can become {account.name}: its shell is {account.shell}.",
                "/etc/passwd",
                f"usermod --shell /bin/bash {account.name}, or choose another kit_user.",
            )
    elif account.name != connecting:
        findings.problem(
            f"kit_user is {account.name}, but the kit connects as {connecting}, who cannot become another user.",
            "kit_user",
            f"delete kit_user from the settings, or connect as {account.name} or root (ansible_user in hosts.yml).",
        )
    if account.uid is not None and account.home != home:
        findings.problem(
            f"kit_user_home is {home}, but the home of {account.name} is {account.home}.",
            "kit_user_home",
            f"kit_user_home: {account.home}",
        )


def check_folder(findings: Findings, account: Account, name: str, path: str) -> None:
    """``path`` can be created and written by the service user, and programs in it may be started."""
    parent = existing_parent(path)
    remedy = f"choose another {name}, or let an administrator run:\n"
    if not os.path.isdir(parent):
        findings.problem(f"{name} is {path}, but {parent} is not a folder.", name, f"choose another {name}.")
        return
    options = os.statvfs(parent).f_flag
    if options & os.ST_RDONLY:
        findings.problem(
            f"{name} ({path}) lies on a file system that is mounted read-only.", parent, f"choose another {name}."
        )
        return
    if options & os.ST_NOEXEC:
        findings.problem(
            f"{name} ({path}) lies on a file system mounted noexec: no program in it could be started.",
            f"mount point of {parent}",
            f"choose another {name}, or have it mounted with exec.",
        )
    if account.uid is None and parent != account.home and Path(account.home).is_relative_to(parent):
        return  # root creates that home, for its user
    owner = os.stat(parent).st_uid
    if parent == path and name == "kit_home" and owner != account.uid:
        what = f"{name} ({path}) belongs to {user_name(owner)}, but the kit runs as {account.name}."
        findings.problem(what, path, f"{remedy}  chown -R {account.name}: {path}")
    elif not (account.may("w", parent) and account.may("x", parent)):
        within = f"{parent}, where {name} is to be ({path})" if parent != path else f"{name} ({path})"
        findings.problem(
            f"{account.name} cannot write to {within}.", parent, f"{remedy}  install -d -o {account.name} -m 700 {path}"
        )


def check_home_is_ours(findings: Findings, home: str) -> None:
    """kit_home is empty, absent, or what an earlier run made."""
    try:
        entries = sorted(name for name in os.listdir(home) if not name.startswith("."))
    except OSError:
        return  # absent; unreadable is check_folder's to say
    foreign = [name for name in entries if name not in HOME_ENTRIES]
    if foreign:
        listed = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        findings.problem(
            f"kit_home ({home}) holds what the kit did not put there: {listed}.",
            home,
            "choose a folder for the kit alone (kit_home), or move those files away.",
        )


def check_disk(findings: Findings, home: str, cache: str, parts: Sequence[Part]) -> None:
    """Room for everything that is not there yet; folders on one file system share its room."""
    needs: dict[int, tuple[str, list[str], int]] = {}
    for name, path, wanted in (
        ("kit_home", home, sum(part.home_mb for part in parts)),
        ("kit_cache", cache, sum(part.cache_mb for part in parts)),
    ):
        parent = existing_parent(path)
        device = os.stat(parent).st_dev
        _, names, sofar = needs.get(device, ("", [], 0))
        needs[device] = (parent, [*names, f"{name} ({path})"], sofar + wanted)
    for parent, names, wanted in needs.values():
        usage = shutil.disk_usage(parent)
        free = usage.free // MIB
        if free < wanted:
            what = f"{' and '.join(names)} need {gigabytes(wanted)} more; {gigabytes(free)} are free."
            findings.problem(what, f"df {parent}", "free some room, or move kit_home or kit_cache to a larger disk.")
        inodes = os.statvfs(parent)
        if wanted and inodes.f_files and inodes.f_favail < 60 * wanted:  # node_modules: about 50 files a MiB
            what = f"The file system of {parent} has room for {inodes.f_favail} files only."
            findings.problem(what, f"df -i {parent}", "remove small files, or choose folders on another file system.")


def check_sockets(findings: Findings, sockets: Iterable[str]) -> None:
    """Paths of sockets fit into the kernel's structure."""
    longest = max(sockets, key=len, default="")
    length = len(os.fsencode(longest))
    if length > SOCKET_PATH_LIMIT:
        findings.problem(
            f"kit_home is too long: the socket {longest} has {length} bytes, Linux allows {SOCKET_PATH_LIMIT}.",
            "kit_home",
            f"choose a kit_home that is at least {length - SOCKET_PATH_LIMIT} characters shorter.",
        )


def check_temporary(findings: Findings, account: Account) -> None:
    """Builds and installers unpack into the temporary folder; shared memory is for PostgreSQL and the model service."""
    folder = tempfile.gettempdir()
    for path in (folder, "/dev/shm"):
        if not os.path.isdir(path) or not account.may("w", path):
            findings.problem(
                f"{path} is missing or not writable for {account.name}.",
                path,
                f"let an administrator run: mkdir -p {path} && chmod 1777 {path}",
            )
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < 512 * MIB:
            findings.problem(f"{folder} has less than 0.5 GB free; builds need it.", f"df {folder}", "free some room.")


# --- Commands and sources -------------------------------------------------------------------------------------------


def check_commands(findings: Findings, parts: Sequence[Part], search: str) -> None:
    """Programs that only an administrator can install."""
    for command in sorted({command for part in parts for command in part.commands}):
        if shutil.which(command, path=search):
            continue
        users = ", ".join(part.name for part in parts if command in part.commands)
        findings.problem(
            f"The command {command} is missing. Needed for: {users}.",
            f"PATH {search}",
            f"let an administrator install the package {command}: apt-get install {command}",
        )


@dataclass(frozen=True)
class Answer:
    """What a source said: nothing wrong (empty ``fault``), and the clock of its server if it told."""

    fault: str = ""
    server_time: float | None = None
    asked: str = ""


def ask_git(source: Source, account: Account, environment: Mapping[str, str]) -> Answer:
    """``git ls-remote`` as the service user: its insteadOf, proxy and certificates count."""
    quiet = {**environment, "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "GIT_SSH_COMMAND": "ssh -oBatchMode=yes"}
    try:
        effective = account.run(["git", "ls-remote", "--get-url", source.url], quiet).stdout.strip() or source.url
        done = account.run(["git", "ls-remote", "--exit-code", source.url, f"refs/tags/{source.tag}"], quiet)
    except subprocess.TimeoutExpired:
        return Answer(f"no answer within {PROBE_SECONDS:.0f} s", asked=source.url)
    except OSError as error:
        return Answer(f"git cannot be started: {error.strerror}", asked=source.url)
    asked = source.url if effective == source.url else f"{source.url} (git is configured to use {effective})"
    if done.returncode == 0:
        return Answer(asked=asked)
    if done.returncode == 2:
        return Answer(f"it has no tag {source.tag}", asked=asked)
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    reasons = [line.split(": ", 1)[-1] for line in lines if line.startswith(("fatal:", "error:"))]
    return Answer((reasons or lines or ["git failed"])[0], asked=asked)


def ask_http(source: Source, environment: Mapping[str, str]) -> Answer:
    """A HEAD request through the build's proxy and with its certificates."""
    try:
        way = opener(source.url, environment)
    except OSError as error:
        return Answer(f"the certificates {environment.get('SSL_CERT_FILE')} cannot be read: {error}", asked=source.url)
    for method in ("HEAD", "GET"):
        request = urllib.request.Request(source.url, method=method)
        try:
            with way.open(request, timeout=PROBE_SECONDS) as response:
                return Answer(server_time=_server_time(response.headers.get("Date")), asked=source.url)
        except urllib.error.HTTPError as error:
            if method == "HEAD" and error.code in (403, 405, 501):
                continue  # some mirrors only know GET
            told = _server_time(error.headers.get("Date"))
            fault = "" if error.code in source.fine else f"it answers {error.code} {error.reason}"
            return Answer(fault, told, source.url)
        except urllib.error.URLError as error:
            reason = error.reason
            text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
            return Answer(f"{text}", asked=source.url)
        except (OSError, ValueError) as error:
            return Answer("no answer in time" if isinstance(error, TimeoutError) else str(error), asked=source.url)
    return Answer(asked=source.url)


def check_certificates(findings: Findings, environment: Mapping[str, str]) -> None:
    """The bundle that every tool is told to trust is there."""
    bundle = environment.get("SSL_CERT_FILE", "")
    if bundle and not os.path.isfile(bundle):
        found = [path for path in CA_BUNDLES if os.path.isfile(path)]
        remedy = f"kit_ca_bundle: {found[0]}" if found else "let an administrator install the package ca-certificates."
        findings.problem(f"There are no root certificates at {bundle}; no download could be trusted.", bundle, remedy)


def check_python(
    findings: Findings, account: Account, python: Mapping[str, str], environment: Mapping[str, str]
) -> None:
    """A Python of the wanted version is there, or can be had; which one is taken is the runtime role's choice."""
    version, named = python["version"], python["path"]
    name = f"python{version}"
    folders = [*environment.get("PATH", "").split(os.pathsep), *(f"{account.home}/{path}" for path in PYTHON_FOLDERS)]
    commands = [named] if named else [f"{folder}/{name}" for folder in folders if os.path.lexists(f"{folder}/{name}")]
    reasons = [reason for command in commands if (reason := _useless(account, command, version, environment))]
    if len(reasons) < len(commands):
        return
    as_root = Account("root", "/root", 0, 0)
    patterns = [named] if named else [f"/root/{path}".format(version=version, name=name) for path in ROOT_PYTHONS]
    if os.geteuid() == 0 and any(
        not _useless(as_root, command, version, environment) for pattern in patterns for command in glob(pattern)
    ):
        return  # the runtime role copies it
    if python["download"] and not named:
        answer = ask_http(Source("", "http", python["download"], ""), environment)
        if not answer.fault:
            return
        reasons.append(f"{python['download']}: {answer.fault}")
    findings.problem(
        f"{account.name} has no Python {version} on the host: {'; '.join(reasons) or 'none was found'}.",
        "runtime_python" if named else f"{name} on the PATH, in {account.home}; GitHub",
        "one of these:\n"
        f"- let an administrator install the system's package: apt-get install {name}-dev (where it exists)\n"
        "- let the host reach GitHub, or set runtime_python_mirror to a mirror of python-build-standalone\n"
        f"- runtime_python: the path of a {name} that {account.name} may read",
    )


def _useless(account: Account, command: str, version: str, environment: Mapping[str, str]) -> str:
    """Why an interpreter is of no use to a user; empty when it is fine."""
    code = (
        "import os, ssl, sqlite3, sys, sysconfig; print('%d.%d' % sys.version_info[:2], "
        "os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
    )
    try:
        done = account.run([command, "-I", "-c", code], environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command}: {getattr(error, 'strerror', None) or 'does not answer'}"
    if done.returncode:
        return f"{command}: {(done.stderr.strip().splitlines() or ['fails'])[-1]}"
    found, headers = done.stdout.split()
    if found != version:
        return f"{command}: is Python {found}"
    return "" if headers == "True" else f"{command}: lacks its headers (Python.h)"


def _server_time(header: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(header).timestamp() if header else None
    except (TypeError, ValueError):
        return None


def check_sources(
    findings: Findings,
    parts: Sequence[Part],
    sources: Sequence[Source],
    account: Account,
    environment: Mapping[str, str],
    mirrors: Mirrors,
) -> list[Answer]:
    """Everything that the missing parts come from answers; a mirror chosen by an earlier run may be chosen anew."""
    for kind in mirrors.open_kinds():
        mirrors.decide(kind)
    wanted = {name for part in parts for name in part.sources}
    asked = [source for source in sources if source.name in wanted]

    def ask(source: Source) -> Answer:
        answer = ask_all(source)
        if answer.fault and mirrors.may_decide_again(source.mirror) and mirrors.decide(source.mirror):
            answer = ask_all(source)
        return answer

    def ask_all(source: Source) -> Answer:
        answers: list[Answer] = []
        first = f"{mirrors.address(source.mirror)}/{source.url}" if source.mirror else source.url
        for url in [first, *source.others]:
            answers.append(ask_one(replace(source, url=url)))
            if not answers[-1].fault:
                return answers[-1]
        if len(answers) == 1:
            return answers[0]
        faults = "; ".join(f"{answer.asked}: {answer.fault}" for answer in answers)
        return Answer(f"none of its {len(answers)} addresses will do ({faults})", asked=first)

    def ask_one(source: Source) -> Answer:
        if source.kind == "file" or source.url.startswith("/"):
            readable = account.may("r", source.url)
            return Answer("" if readable else f"{account.name} cannot read that file", asked=source.url)
        if source.kind != "git":
            return ask_http(source, environment)
        # Whether git is there at all is check_commands' to say.
        return ask_git(source, account, environment) if shutil.which("git", path=environment.get("PATH")) else Answer()

    with ThreadPoolExecutor(max_workers=8) as pool:
        answers = list(pool.map(ask, asked))
    for source, answer in zip(asked, answers, strict=True):
        if answer.fault:
            users = [part.name for part in parts if source.name in part.sources]
            what = f"{source.name} cannot be used: {answer.fault}. Needed for: {', '.join(users)}."
            findings.problem(what, answer.asked, source.remedy)
    return answers


def check_clock(findings: Findings, answers: Iterable[Answer], now: float) -> None:
    """The host's clock against those of the servers that told theirs; the smallest difference counts."""
    differences = [now - answer.server_time for answer in answers if answer.server_time is not None]
    if not differences:
        return
    skew = min(differences, key=abs)
    direction = "fast" if skew > 0 else "slow"
    if abs(skew) > CLOCK_ERROR_SECONDS:
        findings.problem(
            f"The host's clock is {abs(skew):.0f} s {direction}; certificates and logins would fail.",
            "date",
            "let an administrator switch time synchronisation on: timedatectl set-ntp true",
        )
    elif abs(skew) > CLOCK_NOTICE_SECONDS:
        findings.notices.append(f"the host's clock is {abs(skew):.0f} s {direction}: switch time synchronisation on")


# --- Sandbox --------------------------------------------------------------------------------------------------------


def check_sandbox(
    findings: Findings, wanted: Mapping[str, Any], account: Account, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Whether code in workflows can run here; ``run``, and the ``commands`` by which an administrator makes it so.

    ``wanted``: the ``mode`` (sandbox_mode, none without Dify), the ``part`` and the ``source`` of dify-sandbox.
    """
    mode = wanted["mode"]
    if mode not in ("auto", "userns", "root"):
        return {"run": False, "commands": []}
    reasons, commands = _lacking(account, environment)
    part = Part(**wanted["part"])
    if part.missing:
        lacking = [name for name in ("gcc", "pkg-config") if not shutil.which(name, path=environment.get("PATH"))]
        if "pkg-config" in lacking or account.run(["pkg-config", "--exists", "libseccomp"], environment).returncode:
            lacking.append("libseccomp-dev")
        if lacking:
            reasons.append(f"{', '.join(lacking)} missing, with which it is built")
            commands.append(_install(lacking))
        source = Source(**wanted["source"])
        answer = Answer()
        if source.kind == "git" and shutil.which("git", path=environment.get("PATH")):
            answer = ask_git(source, account, environment)
        if answer.fault:
            reasons.append(f"its source cannot be used ({answer.asked}: {answer.fault})")
    if mode == "root" and os.geteuid() != 0:
        findings.problem(
            "sandbox_mode is root, but the kit does not connect as root.",
            "sandbox_mode",
            "connect as root (ansible_user in hosts.yml), or set sandbox_mode: auto.",
        )
    if not reasons:
        return {"run": True, "commands": []}
    recipe = f"as root, once: {'; '.join(commands)}" if commands else "nothing that an administrator could run is known"
    if mode == "auto":
        findings.notices.append(f"code in workflows is off: {'; '.join(reasons)}. To switch it on, {recipe}")
    elif mode == "userns" or not commands:
        findings.problem(
            f"Code in workflows cannot run on this host: {'; '.join(reasons)}.",
            "sandbox_mode",
            "let an administrator run once:\n" + "\n".join(commands)
            if commands
            else 'set sandbox_mode: "off", or external and sandbox_url.',
        )
    return {"run": mode == "root", "commands": commands}


def _lacking(account: Account, environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What keeps a user from namespaces of its own with ids to give away, and the commands against it."""
    reasons, commands = [], []
    if not all(shutil.which(name, path=environment.get("PATH")) for name in ("newuidmap", "newgidmap")):
        reasons.append("newuidmap and newgidmap are missing")
        commands.append(_install(["uidmap"]))
    files = {name: _read(f"/etc/{name}") for name in ("subuid", "subgid")}
    # useradd gives a new user its ranges where these files exist.
    if account.uid is None:
        short = [name for name in files if not os.path.exists(f"/etc/{name}")]
    else:
        short = [name for name, text in files.items() if kit_subids.find(text, account.name, account.uid) is None]
    if short:
        first = kit_subids.free(*files.values())
        reasons.append(f"/etc/{' and /etc/'.join(short)}: no range of ids for {account.name}")
        commands += [f"echo {account.name}:{first}:65536 >> /etc/{name}" for name in short]
    try:
        options = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--fork"]
        done = account.run(["unshare", *options, "true"], environment)
        fault = (done.stderr.strip().splitlines() or ["refused"])[-1] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        fault = str(error)
    if fault:
        closed = [
            f"{name}={value}"
            for name, path, value, bad in (
                ("kernel.apparmor_restrict_unprivileged_userns", "kernel", 0, "1"),
                ("kernel.unprivileged_userns_clone", "kernel", 1, "0"),
                ("user.max_user_namespaces", "user", 15000, "0"),
            )
            if _read(f"/proc/sys/{path}/{name.partition('.')[2]}").strip() == bad
        ]
        reasons.append(f"the system refuses user namespaces ({fault})")
        if closed:
            commands.append(f"printf '%s\\n' {' '.join(closed)} > /etc/sysctl.d/60-dify-kit.conf")
            commands.append("sysctl --load /etc/sysctl.d/60-dify-kit.conf")
    return reasons, commands


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _install(packages: list[str]) -> str:
    """The command by which this host's system installs packages, named here as Debian names them."""
    if shutil.which("apt-get", path="/usr/bin:/bin") or not shutil.which("dnf", path="/usr/bin:/bin"):
        return f"apt-get install --yes {' '.join(packages)}"
    others = {"uidmap": "shadow-utils", "libseccomp-dev": "libseccomp-devel", "pkg-config": "pkgconf-pkg-config"}
    return f"dnf install --assumeyes {' '.join(others.get(name, name) for name in packages)}"


# --- Another Dify ---------------------------------------------------------------------------------------------------


def foreign_dify(home: str, environment: Mapping[str, str], account: Account, project: str = "") -> list[str]:
    """Containers and processes of a Dify that is not this one; it is no obstacle unless it holds a port."""
    found: list[str] = []
    if shutil.which("docker", path=environment.get("PATH")):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            form = '{{.Names}} {{.Image}} {{.Label "com.docker.compose.project"}}'
            listed = account.run(["docker", "ps", "--format", form], environment, 3)
            rows = [line.split(" ") for line in listed.stdout.splitlines() if "langgenius/dify" in line]
            names = [name for name, _, owner in rows if not project or owner != project]
            if names:
                found.append(f"another Dify runs on this host, in containers ({', '.join(sorted(names)[:3])} ...)")
    signs = re.compile(r"celery_entrypoint|dify-plugin-daemon|/dify/api/|geventwebsocket\.gunicorn")
    for pid in process_ids():
        line = _read_proc(pid, "cmdline")
        if signs.search(line) and not belongs_to(pid, home) and "/docker/" not in _read_proc(pid, "cgroup"):
            owner = user_name(os.stat(f"/proc/{pid}").st_uid) if os.path.exists(f"/proc/{pid}") else "?"
            found.append(f"another Dify runs on this host as {owner} (pid {pid}); it is left alone")
            break
    return found


# --- The parts that a site may replace --------------------------------------------------------------------------------


def check_postgres(findings: Findings, home: Path, postgres: Mapping[str, Any]) -> None:
    """The programs are there, with their extensions, and fit the data; ``postgres`` as ``kit_postgres_cluster``'s."""
    try:
        programs = find_programs(
            home, postgres["source"], postgres["version"], postgres["archive"], postgres["archive_sha256"]
        )
        Cluster(home, programs).exists()
    except PostgresProblem as problem:
        what, _, remedy = str(problem).partition(" Remedy: ")
        findings.problem(what, "postgres_source, postgres_version", remedy)
        return
    if postgres["newest"] and int(programs.major) > int(postgres["newest"]):
        findings.problem(
            f"This would be PostgreSQL {programs.major}; this release of Dify works with {postgres['newest']} at most.",
            "postgres_source, postgres_version",
            "choose an older one (postgres_version), or a newer dify_release.",
        )
    lacking = sorted(set(postgres["extensions"]) - programs.names)
    if postgres["source"] == "wheel" or not lacking:
        return  # the wheel's are known
    package = f"postgresql-{programs.major}-pgvector"
    findings.problem(
        f"PostgreSQL {programs.major} lacks the extension {' and '.join(lacking)}.",
        str(programs.extensions) if postgres["source"] == "system" else postgres["archive"],
        "one of these:\n"
        + (
            f"- let an administrator install {package} (Debian 13, Ubuntu 24.04, or postgresql.org's packages)\n"
            if postgres["source"] == "system"
            else "- pack an installation that has it\n"
        )
        + "- keep the vectors elsewhere: dify_vector_store\n"
        "- use the PostgreSQL that the kit brings: postgres_source: wheel",
    )


def check_redis(findings: Findings, home: Path, account: Account) -> None:
    """The distribution's Redis is there, and can read the data that is."""
    server = "/usr/bin/redis-server"
    if not os.access(server, os.X_OK):
        findings.problem(
            "redis_source is system, but Redis is not installed on this host.",
            server,
            "let an administrator install it: apt-get install redis-server (its own server need not run: systemctl "
            "disable --now redis-server); or let the kit bring one: redis_source: wheel",
        )
        return
    for data in sorted((home / "var/redis/appendonlydir").glob("*.base.rdb")):
        done = account.run(["redis-check-rdb", str(data)], {"PATH": "/usr/bin:/bin"})
        if done.returncode and "version" in done.stdout:
            findings.problem(
                f"{data} was written by a newer Redis or Valkey than {server}, which cannot read it.",
                "redis_source",
                "stay with redis_source: wheel; or, while nothing is being indexed, make deploy with "
                f"that once more, make stop, move {data.parent} away (only queues and caches are in it), then change.",
            )


def check_parts(
    findings: Findings, home: str, account: Account, parts: Mapping[str, Any], environment: Mapping[str, str], mode: str
) -> None:
    """PostgreSQL, Redis, file storage and the vector store, whoever runs them; see the module's ``stores``."""
    deployed = mode != "skip"
    mode = mode if deployed else "source"
    # Where the site changes its mode, what it was told in the other one counts.
    came = next((each for each in (mode, *kit_migrate.SIGNS) if kit_migrate.alive(Path(home), each)), mode)
    env_file = Path(home, kit_migrate.SIGNS[came].env)
    data, old = (Path(home, kit_migrate.SIGNS[each].data).parent for each in (mode, came))
    before: dict[str, str] = {}
    with contextlib.suppress(OSError):
        before = parse_env(env_file.read_text())
    postgres, redis, storage, vector = (parts[name] for name in ("postgres", "redis", "storage", "vector"))
    wanted = {"postgres": postgres, "storage": storage, "external": postgres["source"] == "external"}
    moved = kit_external.moves(before, str(old), wanted) if deployed else {}
    if came != mode:
        moved.pop("postgres", None)  # see kit_move
    findings.problems += kit_external.unmoved(moved, str(data), wanted, str(env_file))
    ca_file = environment.get("SSL_CERT_FILE", "")
    web = {"environment": environment, "ca_file": ca_file}
    servers: dict[str, Mapping[str, Any]] = {}
    if wanted["external"]:
        servers["postgres"] = {**postgres, "moved_from": moved.get("postgres", ""), "forget": str(env_file)}
    elif postgres["source"] != "container":
        check_postgres(findings, Path(home), postgres)
    if redis["source"] == "external":
        servers["redis"] = redis
    elif redis["source"] == "system":
        check_redis(findings, Path(home), account)
    if deployed and storage["kind"] == "s3":
        servers["storage"] = {**storage, **web, "moved_from": moved.get("storage", ""), "forget": str(env_file)}
    if deployed and vector["kind"] != "pgvector":
        servers["vector"] = {**vector, **web}
    answers = kit_external.examine(servers)
    findings.problems += answers.problems
    findings.notices += answers.notices


# --- All of it ------------------------------------------------------------------------------------------------------


def check_mode(findings: Findings, home: str, mode: str, move: bool) -> bool:
    """Whether the data of the other mode would stay behind, and Dify begin anew; ``mode`` is the site's dify_mode."""
    other = {"source": "compose", "compose": "source"}.get(mode, "")
    left_behind = bool(other) and not move and kit_migrate.alive(Path(home), other)
    if left_behind:
        signs, there = kit_migrate.SIGNS[other], kit_migrate.elsewhere(Path(home), other)
        findings.problem(
            f"Dify runs here with dify_mode {other}, whose data {mode} mode would not see.",
            f"PostgreSQL at {there}" if there else f"{home}/{signs.data}",
            f"one of these:\n- dify_mode: {other}\n- take the data along: make deploy "
            f'MODE={mode} ARGS="-e dify_move_data=yes"\n- another kit_home for the new site\n'
            f"- begin without that data, which stays where it is: delete {home}/{signs.note}",
        )
    return left_behind


def check_docker(
    findings: Findings, account: Account, environment: Mapping[str, str], project: str, builds: bool
) -> dict[str, Any]:
    """The engine and Compose can be used, for ``builds`` of images too.

    Returns the bridge's address (``bridge``) and the project's own ``ports``.
    """
    path = environment.get("PATH", os.defpath)

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if os.geteuid() == 0 and command[1] not in ("compose", "buildx"):
            # The deploy puts the service user into the group; what the engine says is the same for root.
            return subprocess.run(list(command), env={"PATH": path}, capture_output=True, text=True, check=False)
        return account.run(command, {"PATH": path, "HOME": account.home})

    problems = check_engine(run, account.name, builds)
    findings.problems += problems
    found: dict[str, Any] = {"bridge": "", "ports": set()}
    if problems:
        return found
    said = run(["docker", "network", "inspect", "bridge", "--format", "{{json .IPAM.Config}}"]).stdout
    with contextlib.suppress(ValueError, LookupError, TypeError):
        [subnet, *_] = json.loads(said)
        first = next(ipaddress.ip_network(subnet["Subnet"], strict=False).hosts())
        found["bridge"] = subnet.get("Gateway") or str(first)
    listed = run(["docker", "ps", "--filter", f"label=com.docker.compose.project={project}", "--format", "{{.Ports}}"])
    found["ports"] = {int(port) for port in re.findall(r":(\d+)->", listed.stdout)}
    return found


def agent_runtime_lacks(account: Account, environment: Mapping[str, str]) -> str:
    """What the host lacks for agents' commands, with its remedy; empty where they can run behind their jail."""
    remedies = {}
    if not shutil.which("tmux", path=environment.get("PATH", os.defpath)):
        remedies["tmux is not installed"] = "`apt-get install tmux` (or `dnf install tmux`)"
    try:
        jail = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "true"]
        allowed = account.run(jail, {"PATH": "/usr/bin:/bin"}).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        allowed = False
    if not allowed:
        remedies["users may not make namespaces"] = (
            "`sysctl kernel.apparmor_restrict_unprivileged_userns=0` on Ubuntu 24.04, "
            "`sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000` elsewhere, and the same lines "
            "in /etc/sysctl.d/; a container must allow them, too"
        )
    if not remedies:
        return ""
    return f"{' and '.join(remedies)}. Remedy, by an administrator: {'; '.join(remedies.values())}; then `make deploy`."


def examine(parameters: Mapping[str, Any], connecting: str) -> tuple[Findings, dict[str, Any]]:
    """Run every check; return what was found and what later steps want to know of the host."""
    findings = Findings()
    home, cache = parameters["home"], parameters["cache"]
    environment = {str(key): str(value) for key, value in parameters["environment"].items()}
    account = Account.find(parameters["user"], parameters["user_home"])
    parts = [part for part in (Part(**values) for values in parameters["parts"]) if part.missing]
    sources = [Source(**values) for values in parameters["sources"]]
    mirrors = Mirrors(parameters["mirrors"], environment)

    # What waits for others runs beside what only looks at this host; each thread adds to findings of its own.
    asking, looking, boxed, stored, engine = Findings(), Findings(), Findings(), Findings(), Findings()
    with ThreadPoolExecutor(max_workers=6) as pool:
        network = pool.submit(check_sources, asking, parts, sources, account, environment, mirrors)
        stores = pool.submit(check_parts, stored, home, account, parameters["stores"], environment, parameters["mode"])
        python = None
        if any(part.python for part in parts):
            python = pool.submit(check_python, looking, account, parameters["python"], environment)
        others = pool.submit(foreign_dify, home, environment, account, parameters["docker"])
        sandbox = pool.submit(check_sandbox, boxed, parameters["sandbox"], account, environment)

        project = parameters["docker"]
        builds = parameters["docker_builds"]
        containers = pool.submit(check_docker, engine, account, environment, project, builds) if project else None

        libc = (platform.libc_ver()[0], platform.libc_ver()[1])
        check_system(findings, platform.system(), platform.machine(), libc, parameters["machines"], parameters["glibc"])
        if parameters["cpu_flags"]:
            check_cpu(findings, cpu_flags(Path("/proc/cpuinfo").read_text()), parameters["cpu_flags"])
        memory = memory_mb(Path("/proc/meminfo").read_text(), cgroup_memory_limit())
        check_memory(findings, memory, parameters["services_mb"], parts)
        check_account(findings, account, connecting, parameters["user_home"])
        for name, path in (("kit_home", home), ("kit_cache", cache)):
            check_folder(findings, account, name, path)
        check_home_is_ours(findings, home)
        check_disk(findings, home, cache, parts)
        left_behind = check_mode(findings, home, parameters["mode"], parameters["move"])
        check_sockets(findings, parameters["sockets"])
        check_temporary(findings, account)
        check_locale(findings)
        umask = os.umask(0o022)
        os.umask(umask)
        check_umask(findings, umask)
        docker = containers.result() if containers else {"bridge": "", "ports": set()}
        # Docker's own process holds the containers' ports.
        ports = {name: port for name, port in parameters["ports"].items() if port not in docker["ports"]}
        if not left_behind:  # else the other mode's own services hold them
            check_ports(findings, ports, home)
        check_low_ports(findings, parameters["ports"], home)
        check_binds(findings, parameters["binds"])
        check_commands(findings, parts, environment.get("PATH", os.defpath))
        check_certificates(findings, environment)

        lacks = agent_runtime_lacks(account, environment) if parameters["agent_runtime"] else ""

    check_clock(findings, network.result(), time.time())
    if python:
        python.result()  # an error of its own is not lost
    stores.result()
    findings.problems += looking.problems + asking.problems + boxed.problems + stored.problems + engine.problems
    findings.notices += others.result() + boxed.notices + stored.notices + mirrors.summary()

    modes = kit_migrate.SIGNS.items()
    return findings, {
        "has_data": any(
            kit_migrate.is_filled(Path(home, signs.data)) or kit_migrate.alive(Path(home), each)
            for each, signs in modes
        ),
        "has_vectors": kit_migrate.is_filled(Path(home, "var", "compose", "pgvector")),
        "agent_runtime_lacks": lacks,
        "mirrors": mirrors.chosen,
        "sandbox": sandbox.result(),
        "docker_bridge": docker["bridge"],
    }
