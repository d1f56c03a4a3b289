"""Files over an unreliable network: gone on with where they broke off, checked by hash, with visible progress."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

from inference.problem import Problem

SIDE_BY_SIDE = 4  # one connection seldom fills a fast line, and hubs slow down a caller who has many
TRIES = 6  # in a row without a new byte
LONGEST_WAIT = 15 * 60  # seconds; a hub that asks for more is not waited for
BLOCK = 1 << 20

T = TypeVar("T")
#: Opens a file from a byte on: where the content really begins (0 where the server cannot begin elsewhere), its blocks.
Reader = Callable[["File", int], tuple[int, Iterator[bytes]]]


class Unavailable(Problem):
    """This source cannot give the weights; another one may."""


class Passing(Exception):
    """A fault that may be gone at the next try; ``wait`` is in seconds, None where the server did not say."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Stopped(Exception):
    """Another file failed, so this one does not go on."""


@dataclass(frozen=True)
class File:
    """What a source says of a file: name, size in bytes, and its sha256 or (small files of git) its blob's SHA-1."""

    name: str
    size: int
    sha256: str = ""
    git: str = ""


class Digest:
    """Size and hashes of a file that is being read or written."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._git = None if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        self.size = 0

    def update(self, block: bytes) -> None:
        """Take the next bytes."""
        self._sha256.update(block)
        if self._git:
            self._git.update(block)
        self.size += len(block)

    @property
    def sha256(self) -> str:
        """Of what was taken so far, in hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def right(self) -> bool:
        """Whether this is the file that the source named."""
        found = self._git.hexdigest() if self._git else self.sha256
        return self.size == self._file.size and found == (self._file.sha256 or self._file.git)


class Progress:
    """How far a fetch is, its rate over the last half minute and the time left.

    On a terminal a line that lives; otherwise a line every ``seconds``, as `kit_jobs` shows the last one.
    """

    def __init__(self, total: int, out: TextIO | None = None, seconds: float = 5) -> None:
        self._total = total
        self._out = out or sys.stdout
        self._live = self._out.isatty()
        self._open = False
        self._seconds = 0.5 if self._live else seconds
        self._done = self._old = 0
        self._began = time.monotonic()
        self._next = self._began + self._seconds
        self._samples: deque[tuple[float, int]] = deque([(self._began, 0)], maxlen=max(2, int(30 / self._seconds)))
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Note so many new bytes."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + self._seconds
            self._samples.append((now, self._done))
            self._write(self._line(now))

    def there(self, count: int) -> None:
        """Note bytes of an earlier fetch; less than 0 takes back what turned out wrong. They do not count as speed."""
        with self._lock:
            if self._done == self._old:  # nor does the time to check them
                self._began = time.monotonic()
                self._next = self._began + self._seconds
                self._samples = deque([(self._began, self._done)], maxlen=self._samples.maxlen)
            self._done += count
            self._old += count
            self._samples = deque(((at, done + count) for at, done in self._samples), maxlen=self._samples.maxlen)

    def tell(self, text: str) -> None:
        """Say something between the figures."""
        with self._lock:
            self._write(text, last=True)

    def end(self) -> str:
        """The summary, such as ``32.8 GB in 5 min (105 MB/s)``."""
        seconds = time.monotonic() - self._began
        new = self._done - self._old
        return f"{size(new)} in {duration(seconds)} ({size(new / max(seconds, 0.001))}/s)"

    def close(self) -> None:
        """Leave a line that lives: what others print begins a new one."""
        if self._open:
            self._out.write("\n")
            self._open = False

    def _line(self, now: float) -> str:
        begin, before = self._samples[0]
        rate = (self._done - before) / max(now - begin, 0.001)
        left = duration((self._total - self._done) / rate) + " left" if rate > 0 else "waiting"
        share = 100 * self._done // max(self._total, 1)
        return f"{size(self._done)} of {size(self._total)}, {share} %, {size(rate)}/s, {left}"

    def _write(self, text: str, last: bool = False) -> None:
        if self._live:
            self._out.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
            self._open = not last
        else:
            self._out.write(text + "\n")
        self._out.flush()


def size(count: float) -> str:
    """``32_820_000_000`` -> ``32.8 GB`` (decimal, as hubs and disks count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """``40`` -> ``40 s``, ``400`` -> ``7 min``, ``8000`` -> ``2 h 13 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def persist(work: Callable[[], T], tries: int, tell: Callable[[str], None], stop: threading.Event) -> T:
    """Do ``work`` until it succeeds, waiting as the server asks, else 1, 2, 4 ... seconds.

    Raises:
        Unavailable: it failed ``tries`` times, or the server asks to wait for very long.
        Stopped: ``stop`` was set meanwhile.
    """
    failures = 0
    while True:
        try:
            return work()
        except Passing as fault:
            failures += 1
            wait = 2.0 ** (failures - 1) if fault.wait is None else fault.wait
            if failures >= tries:
                raise Unavailable(
                    f"{fault}; {failures} tries in a row. Remedy: run again later, what was fetched is kept; or see "
                    "whether the proxy is right (kit_https_proxy), or choose another source (inference_weights_source)."
                ) from None
            if wait > LONGEST_WAIT:
                raise Unavailable(
                    f"{fault}, and asks to wait {duration(wait)}. Remedy: run again then, what was fetched is kept; "
                    "with a token (HF_TOKEN, inference_hub_token) a hub lets one ask more often."
                ) from None
            tell(f"{fault}; going on in {duration(wait)}")
            if stop.wait(wait):
                raise Stopped from None


def fetch_file(file: File, path: Path, read: Reader, progress: Progress, stop: threading.Event) -> str:
    """Bring ``path`` to the file's content and keep what is there of it already; returns its sha256.

    Raises:
        Unavailable: the source gives up.
        Problem: the content came twice and never had the hash.
        OSError: it cannot be written.
    """
    for last in (False, True):
        digest = _fill(file, path, read, progress, stop)
        if digest.right:
            return digest.sha256
        path.unlink()
        progress.there(-digest.size)
        if not last:
            progress.tell(f"{file.name} does not have the hash that its source names: fetching it again")
    raise Problem(
        f"{file.name} came twice, both times with another hash than the one its source names "
        f"({file.sha256 or file.git}); it was removed. Remedy: something on the way changes files (a proxy, the "
        "mirror): choose another source (inference_weights_source)."
    )


def _fill(file: File, path: Path, read: Reader, progress: Progress, stop: threading.Event) -> Digest:
    """Write until the file has its size, over as many connections as that takes."""
    digest = Digest(file)
    if path.exists():
        there = path.stat()
        # A file that another folder has as well is not changed under whoever reads it there.
        if there.st_size > file.size or (there.st_size < file.size and there.st_nlink > 1):
            path.unlink()
    with path.open("a+b") as out:
        out.seek(0)
        while block := out.read(BLOCK):
            digest.update(block)
            progress.there(len(block))

        def go_on() -> bool:
            """Whether the file is complete; an exception that is passing counts only if it brought nothing new."""
            nonlocal digest
            before = digest.size
            try:
                begin, blocks = read(file, digest.size)
                if begin != digest.size:
                    out.truncate(0)
                    progress.there(-digest.size)
                    digest = Digest(file)
                for block in blocks:
                    if stop.is_set():
                        raise Stopped
                    out.write(block)
                    digest.update(block)
                    progress.add(len(block))
                    if digest.size > file.size:
                        return True  # never right: the caller sees to it
                if digest.size < file.size:
                    raise Passing(f"{file.name} ended early, at {size(digest.size)} of {size(file.size)}")
            except Passing as fault:
                if digest.size <= before:
                    raise
                out.flush()
                progress.tell(f"{fault}; going on from there")
                return stop.wait(1)
            return True

        while digest.size < file.size and not persist(go_on, TRIES, progress.tell, stop):
            pass
        if stop.is_set() and digest.size < file.size:
            raise Stopped
        out.flush()
        os.fsync(out.fileno())  # a power cut must not leave a folder that only looks whole
    return digest


def fetch_files(files: Sequence[File], folder: Path, read: Reader) -> dict[str, str]:
    """All files of a listing, several at a time; name -> sha256. What an interrupted call fetched is kept.

    Raises:
        Unavailable: the source gives up.
        Problem: the disk is too small, or the source does not give what it names.
        OSError: nothing can be written, or nothing more.
    """
    present = {path.name: path.stat().st_size for path in folder.iterdir()}
    need = sum(max(0, file.size - present.get(file.name, 0)) for file in files)
    check_disk(folder, need)
    progress, stop = Progress(sum(file.size for file in files)), threading.Event()
    if kept := sum(min(file.size, present.get(file.name, 0)) for file in files):
        progress.tell(f"{size(kept)} are there from an earlier fetch: checking them, then fetching {size(need)}")

    def one(file: File) -> str:
        try:
            return fetch_file(file, folder / file.name, read, progress, stop)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        # The largest first: otherwise one of them is left over at the end, alone.
        jobs = {file.name: pool.submit(one, file) for file in sorted(files, key=lambda file: -file.size)}
        try:
            errors = [error for job in jobs.values() if (error := job.exception())]
        except BaseException:  # Ctrl-C
            stop.set()
            progress.close()
            raise
    progress.close()
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    progress.tell(f"fetched {progress.end()}; all hashes are right")
    return {name: job.result() for name, job in jobs.items()}


def check_disk(folder: Path, need: int) -> None:
    """There is room for so many bytes.

    Raises:
        Problem: there is not.
    """
    free = shutil.disk_usage(folder).free
    if need > free:
        raise Problem(
            f"The weights need {size(need)} more in {folder}, but only {size(free)} are free there. Remedy: free "
            f"{size(need - free)}, or put the folder on a larger disk (kit_cache, kit_home)."
        )
