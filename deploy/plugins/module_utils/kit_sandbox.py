"""Run dify-sandbox, unpatched, as an ordinary user: in user, mount, network, process and IPC namespaces of its own.

A program that supervisor runs on the host; whether a host can do this is for preflight to say.

What runs inside sees a root folder made of nothing but the system's programs and libraries, read-only, the interpreters
and temporary memory: no home, no /etc of the host, no /proc. Root inside is the service user outside, so that is what
keeps the site's files from the sandbox itself; the code that it runs is another user still, of the service user's
subordinate ids. The network inside is a loopback of its own. Two doors lead through it, each a listening socket that
one side hands to the other: the sandbox's API, and the egress proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

try:
    from ansible.module_utils import kit_subids
except ImportError:  # on the host the files lie side by side, and there is no Ansible
    import kit_subids  # type: ignore[import-not-found]

# dify-sandbox listens here, on whatever network it sees, and gives user code ids below kit_subids.FEWEST.
INSIDE_PORT, PROXY_PORT = 8194, 3128
# Where it puts the code that it runs; user code sees the first as its root.
PYTHON_ROOT = "/var/sandbox/sandbox-python"
MEMORY = "size=512m"

_NEWNS, _NEWIPC, _NEWUTS, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000,
    0x8000000,
    0x4000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PDEATHSIG, _NO_NEW_PRIVS = 1, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


# --- Namespaces ------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [word.encode() if word else None for word in (source, target, kind)]
    _check(_libc.mount(*words, ctypes.c_ulong(flags), data.encode() or None), f"mount {source} at {target}")


def _bind(source: str, target: str, writable: bool = False) -> None:
    """Show a file or folder of the host at ``target``; what was forbidden there stays so, as the kernel insists."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    _mount(source, target, flags=_BIND)
    held = os.statvfs(target).f_flag
    # The bits of statvfs and of mount are the same for these, and relatime and its like must be repeated, too.
    keep = held & (_NODEV | _NOEXEC | 1024 | 2048) | (1 << 21 if held & 4096 else 0)
    _mount("none", target, flags=_BIND | _REMOUNT | _NOSUID | keep | (0 if writable else _RDONLY))


def _tmpfs(target: str, options: str) -> None:
    os.makedirs(target, exist_ok=True)
    _mount("tmpfs", target, "tmpfs", _NOSUID | _NODEV, options)


def _make_root(root: str, options: argparse.Namespace) -> None:
    """The sandbox's root folder: the system's programs, the interpreters, an /etc of its own."""
    _mount("none", "/", flags=_REC | _PRIVATE)
    _tmpfs(root, "mode=755,size=16m")
    for folder in ("/tmp", "/var/sandbox"):
        _tmpfs(root + folder, f"mode=755,{MEMORY}")
    system = ["/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            os.symlink(os.readlink(name), root + name)
        elif os.path.isdir(name):
            system.append(name)
    python = os.path.realpath(options.python)
    prefix = str(Path(python).parents[1])
    venv = str(Path(options.python).parents[1])
    # The venv and what it was made from, under the names that they have on the host.
    trees = [path for path in (prefix, venv) if path != "/usr"]
    for path in [*system, *(path for path in trees if not path.startswith("/usr/"))]:
        _bind(path, root + path)
    binaries = {options.binary: "/sandbox/main", os.path.realpath(options.node): "/sandbox/node"}
    for source, target in binaries.items():
        _bind(source, root + target)
    for device in ("null", "zero", "random", "urandom"):
        _bind(f"/dev/{device}", f"{root}/dev/{device}", writable=True)

    etc = Path(root, "etc")
    (etc / "ssl/certs").mkdir(parents=True)
    files = {
        "passwd": "root:x:0:0::/:/bin/sh\nsandbox:x:65537:1000::/:/bin/false\n",
        "group": "root:x:0:\nsandbox:x:1000:\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "hosts": "127.0.0.1 localhost\n",
        "resolv.conf": "",
    }
    for name, text in files.items():
        (etc / name).write_text(text)
    for name in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "alternatives"):
        with contextlib.suppress(OSError):
            source = Path("/etc", name)
            shutil.copytree(source, etc / name, symlinks=True) if source.is_dir() else shutil.copy(source, etc / name)
    certificates = etc / "ssl/certs/ca-certificates.crt"
    shutil.copy(options.ca, certificates)

    conf = Path(root, "sandbox/conf")
    conf.mkdir(parents=True)
    (conf / "config.yaml").write_text("app:\n  debug: false\nenable_preload: false\nlog_path: ''\n")
    Path(root, "sandbox/dependencies").mkdir()
    Path(root, "sandbox/dependencies/python-requirements.txt").touch()

    # What user code in Python sees as its root. Upstream copies all of this at each start, file by file.
    inner = root + PYTHON_ROOT
    for path in [*_libraries(), *trees]:
        _bind(path, inner + path)
    for name in ("/lib", "/lib64"):
        if os.path.islink(name):
            os.symlink(os.readlink(name), inner + name)
    for path in ("nsswitch.conf", "hosts", "resolv.conf", "localtime", "ssl/certs/ca-certificates.crt"):
        if (etc / path).exists():
            Path(inner, "etc", path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(etc / path, Path(inner, "etc", path))
    # requests and httpx trust certifi's list; a company's own authority is in the host's.
    for base in (root, inner):
        for bundle in Path(base + venv).glob("lib/python3.*/site-packages/certifi/cacert.pem"):
            _bind(str(certificates), str(bundle))


def _libraries() -> list[str]:
    """What Python's own modules read: shared libraries, time zones, and Python itself where it is the system's."""
    names = [f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64", "/usr/share/zoneinfo"]
    names += map(str, Path("/usr/lib").glob("python3*"))
    return [name for name in names if os.path.isdir(name) and not os.path.islink(name)]


def _pivot(root: str) -> None:
    os.chdir(root)
    os.mkdir("old")
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old", _DETACH), "umount")
    os.rmdir("/old")


def _find_libraries(python: str) -> None:
    """A Python that was built with a shared library finds it by /proc/self/exe; without /proc by the linker's cache."""
    folder = Path(os.path.realpath(python)).parents[1] / "lib"
    if list(folder.glob("libpython3*.so*")):
        with open("/etc/ld.so.conf", "a") as conf:
            conf.write(f"{folder}\n")
        subprocess.run(["/sbin/ldconfig"], stderr=subprocess.DEVNULL, check=False)


def _raise_loopback() -> None:
    """``ip link set lo up``, of which nothing but lo exists here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH22x", b"lo", 0x41))  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING


def _die_with_parent() -> None:
    _check(_libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


# --- Doors -----------------------------------------------------------------------------------------------------------


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def door(listener: socket.socket, port: int) -> asyncio.Server:
    """Pass every connection that ``listener`` gets on to ``port`` of the loopback that this process sees."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return
            with contextlib.closing(far_writer):
                await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))

    return await asyncio.start_server(pass_on, sock=listener)


# --- The program -----------------------------------------------------------------------------------------------------


def _map_ids(pid: int) -> None:
    """Root inside is this user; the other ids inside are its subordinate ones."""
    user = pwd.getpwuid(os.getuid())
    for kind, own in (("uid", os.getuid()), ("gid", os.getgid())):
        found = kit_subids.find(Path(f"/etc/sub{kind}").read_text(), user.pw_name, user.pw_uid)
        if found is None:
            raise OSError(f"/etc/sub{kind} gives {user.pw_name} no range of {kit_subids.FEWEST} ids or more")
        words = [str(pid), "0", str(own), "1", "1", str(found[0]), str(found[1])]
        done = subprocess.run([f"new{kind}map", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"new{kind}map: {done.stderr.strip()}")


def _inside(options: argparse.Namespace, host: socket.socket, listener: socket.socket) -> NoReturn:
    """In a child: make the namespaces, become root there and, in a child of its own, the sandbox's first process."""
    _check(_libc.unshare(_NEWUSER | _NEWNS | _NEWNET | _NEWPID | _NEWIPC | _NEWUTS), "unshare")
    host.send(b"u")
    if host.recv(1) != b"m":
        os._exit(1)
    os.setresgid(0, 0, 0)
    os.setgroups([])
    os.setresuid(0, 0, 0)
    _die_with_parent()
    first = os.fork()
    if first:
        host.close()
        listener.close()
        _, status = os.waitpid(first, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _die_with_parent()
    os.umask(0o022)
    _make_root(options.root, options)
    _pivot(options.root)
    _find_libraries(options.python)
    _raise_loopback()
    proxy = socket.create_server(("127.0.0.1", PROXY_PORT))
    socket.send_fds(host, [b"p"], [proxy.fileno()])
    proxy.close()
    host.close()
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    main = os.fork()
    if main == 0:
        listener.close()
        address = f"http://127.0.0.1:{PROXY_PORT}"
        os.chdir("/sandbox")
        environment = {
            "API_KEY": os.environ["API_KEY"],
            "ENABLE_NETWORK": "true",
            "HTTP_PROXY": address,
            "HTTPS_PROXY": address,
            "MAX_REQUESTS": "50",
            "MAX_WORKERS": str(options.workers),
            "NODEJS_PATH": "/sandbox/node",
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHON_LIB_PATH": "/etc/hosts",  # the rest is there already
            "PYTHON_PATH": options.python,
            "SANDBOX_PORT": str(INSIDE_PORT),
            "WORKER_TIMEOUT": str(options.timeout),
        }
        os.execve("/sandbox/main", ["/sandbox/main"], environment)
    asyncio.run(_first_process(listener, main))
    os._exit(1)


async def _first_process(listener: socket.socket, main: int) -> None:
    """Pass the API's connections in, and bury what user code leaves behind, until the sandbox ends."""
    ended = asyncio.Event()

    def bury() -> None:
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                if pid == main:
                    ended.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, bury)
    server = await door(listener, INSIDE_PORT)
    bury()
    await ended.wait()
    server.close()


def run(options: argparse.Namespace) -> int:
    """Run the sandbox until it ends or somebody ends this process."""
    listener = socket.create_server(("127.0.0.1", options.port))
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        here.close()
        try:
            _inside(options, there, listener)
        except OSError as error:
            print(f"The sandbox cannot be set up: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    there.close()
    listener.close()
    try:
        if here.recv(1) != b"u":
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        _map_ids(child)
        here.send(b"m")
        message, descriptors, _, _ = socket.recv_fds(here, 1, 1)
        if message != b"p":
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return asyncio.run(_outside(socket.socket(fileno=descriptors[0]), options.egress, child))
    except OSError as error:
        print(f"The sandbox cannot be set up: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


async def _outside(proxy: socket.socket, egress: int, child: int) -> int:
    """Pass user code's connections out to the egress proxy, until the sandbox ends or this process is told to."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    told = []

    def stop(number: int) -> None:
        told.append(number)
        over.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    ended = loop.run_in_executor(None, os.waitpid, child, 0)
    ended.add_done_callback(lambda _: over.set())
    server = await door(proxy, egress)
    await over.wait()
    server.close()
    if not told:
        print("The sandbox has ended by itself.", file=sys.stderr, flush=True)
        return 1
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # the kernel ends all processes of its namespace with the first one
    await ended
    return 0


def main() -> int:
    """The program's entry point."""
    parser = argparse.ArgumentParser(description="dify-sandbox in namespaces of its own; API_KEY is in the environment")
    parser.add_argument("--port", type=int, required=True, help="where the API listens on this host's loopback")
    parser.add_argument("--egress", required=True, type=int, help="the egress proxy's port on this host's loopback")
    parser.add_argument("--binary", required=True, help="dify-sandbox")
    parser.add_argument("--python", required=True, help="python of a virtual environment, with which user code runs")
    parser.add_argument("--node", required=True, help="node, with which user code runs")
    parser.add_argument("--ca", required=True, help="root certificates that user code trusts")
    parser.add_argument("--root", required=True, help="an empty folder, over which the sandbox's root is mounted")
    parser.add_argument("--timeout", type=int, default=15, help="seconds that user code may take")
    parser.add_argument("--workers", type=int, default=4, help="user code that runs at a time")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
