"""What is measured by which way, and how the figures are shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import kit
from inference import bench, catalog, cli, planner
from inference.bench import Load, Way
from inference.hardware import Gpus
from inference.problem import Problem

PLAIN: dict[str, Any] = {
    "output_throughput": 50.0,
    "p50_ttft_ms": 200.0,
    "p99_ttft_ms": 400.0,
    "p50_itl_ms": 60.0,
    "p99_itl_ms": 90.0,
    "failed": 0,
}


def host(**changes: Any) -> dict[str, Any]:
    service = {"python": "/h/v/bin/python", "weights": "/h/w", "engines": {"inference": 17807}, "plain_port": 17819}
    return {
        "kit_home": "/h",
        "dify_mode": "source",
        "services": ["inference"],
        "model": "m",
        "ports": {"inference": 17807, "gateway": 17800},
        "model_service": service | changes,
    }


def read(command: list[str]) -> Any:
    """As the host's command line reads it."""
    return cli.parser().parse_args(command[command.index("bench") :])


def test_a_better_figure_is_a_ratio_above_one() -> None:
    half = PLAIN | {"output_throughput": 25.0, "p50_itl_ms": 120.0, "p50_ttft_ms": 100.0, "failed": 2}
    lines = bench.table({bench.PLAIN: PLAIN, "Dify": half}).splitlines()
    assert lines[2] == "| vllm serve | 50.0 | 200.0 ms | 400.0 ms | 60.0 ms | 90.0 ms | 0 |"
    assert lines[3] == (
        "| Dify | 25.0 (0.50) | 100.0 ms (2.00) | 400.0 ms (1.00) | 120.0 ms (0.50) | 90.0 ms (1.00) | 2 |"
    )


def test_without_a_plain_server_there_are_no_ratios() -> None:
    assert "(" not in bench.table({"engine": PLAIN})


def test_the_floor_of_a_card() -> None:
    # 2.6 billion active parameters of 2 bytes on an A100 (1,555 GB/s).
    gpus = Gpus(planner.card("a100-40g"), (0,), "580.65.06")
    floor = bench.floor_ms(catalog.load("kimi-vl-a3b-instruct"), gpus)
    assert floor
    assert floor == pytest.approx(3.4, abs=0.5)
    assert bench.table({bench.PLAIN: PLAIN}, floor).splitlines()[2].endswith(f"| {60 / floor:.1f} | 0 |")


def test_no_floor_without_a_gpu() -> None:
    assert bench.floor_ms(catalog.load("kimi-vl-a3b-instruct"), None) is None


def test_no_key_on_the_command_line() -> None:
    way = Way("engine", "http://127.0.0.1:1/v1", "secret-key")
    command = bench.client(way, "m", Path("/w"), Load(), Path("/f"))
    assert command[:5] == [sys.executable, "-m", "inference.vllm_cli", "bench", "serve"]
    assert "secret-key" not in " ".join(command)
    assert command[command.index("--base-url") + 1 :][:3] == [
        "http://127.0.0.1:1",
        "--endpoint",
        "/v1/chat/completions",
    ]


def test_dify_is_asked_its_own_way() -> None:
    command = bench.client(Way("Dify", "http://127.0.0.1:1/v1", "k", dify=True), "m", Path("/w"), Load(), Path("/f"))
    assert command[command.index("--backend") + 1] == "dify"
    assert "/v1/chat-messages" in command
    assert "--ignore-eos" not in command


def test_ways_of_a_single_engine() -> None:
    options = read(kit.bench_command("one", host(), ["--questions=3"]))
    assert options.way == [["engine", "http://127.0.0.1:17807/v1"]]
    assert (options.dify, options.questions, options.engines) == ("http://127.0.0.1:17800/v1", 3, ["inference"])


def test_ways_with_replicas_and_without_dify() -> None:
    engines = {"inference-1": 17820, "inference-2": 17821}
    command = kit.bench_command("one", host(engines=engines) | {"dify_mode": "skip"}, [])
    options = read(command)
    assert dict(options.way) == {"engine": "http://127.0.0.1:17820/v1", "router": "http://127.0.0.1:17807/v1"}
    assert (options.dify, options.engines) == ("", ["inference-1", "inference-2"])
    assert not any("sample-app" in part for part in command)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"services": ["api"]}, "a model server that the kit does not run"), ({"model_service": None}, "make deploy")],
)
def test_nothing_to_measure(changes: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {name: value for name, value in (host() | changes).items() if value is not None}
    with pytest.raises(SystemExit) as ended:
        kit.bench_command("one", changed, [])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_what_cannot_be_measured_is_a_problem() -> None:
    way = Way("engine", "http://127.0.0.1:9/v1", "k")
    with pytest.raises(Problem, match="could not be measured"):
        bench.measure(way, "m", Path("/nowhere"), Load(questions=1, seconds=60))
