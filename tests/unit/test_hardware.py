"""What nvidia-smi says, and what follows from it."""

from __future__ import annotations

import pytest

from inference import hardware
from inference.problem import Problem

A100 = "580.65.06, {index}, NVIDIA A100-SXM4-40GB, 40960, 624, 8.0\n"
ENGINES = ["cpu", "cuda"]


def test_two_equal_cards() -> None:
    found = hardware.seen(0, A100.format(index=0) + A100.format(index=1))
    assert found is not None
    assert (found.card.id, found.indices, found.driver) == ("a100-40g", (0, 1), "580.65.06")
    assert found.card.compute_capability == 8.0


def test_a_display_card_is_left_alone() -> None:
    text = "580.65.06, 0, NVIDIA T400, 2048, 100, 7.5\n" + A100.format(index=1)
    found = hardware.seen(0, text)
    assert found is not None
    assert (found.card.id, found.indices, found.unused) == ("a100-40g", (1,), ("1 x NVIDIA T400",))


def test_old_drivers_do_not_tell_what_they_keep() -> None:
    found = hardware.seen(0, "580.65.06, 0, Tesla T4, 15360, [N/A], 7.5\n")
    assert found is not None
    assert found.card.id == "t4"


@pytest.mark.parametrize(
    ("status", "output"), [(6, "No devices were found\n"), (0, "No devices were found\n"), (0, "")]
)
def test_a_driver_without_a_card(status: int, output: str) -> None:
    assert hardware.seen(status, output) is None


def test_a_driver_that_does_not_work() -> None:
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    with pytest.raises(Problem, match=r"ended with 9: NVIDIA-SMI has failed.*reboot.*inference_hardware: cpu"):
        hardware.seen(9, said)


@pytest.mark.parametrize(
    "line", ["535.1, 0, NVIDIA A100 MIG 1g.5gb, [N/A], [N/A], 8.0", "garbage", "470.1, 0, K80, 11441, 0, [N/A]"]
)
def test_what_cannot_be_understood(line: str) -> None:
    with pytest.raises(Problem, match=r"can't make sense.*Remedy"):
        hardware.seen(0, line)


def test_an_old_driver() -> None:
    found = hardware.seen(0, "550.54.15, 0, NVIDIA A10, 23028, 500, 8.6\n")
    with pytest.raises(Problem, match=r"driver is 550\.54\.15.*CUDA 13.*580 or newer.*inference_hardware: cpu"):
        hardware.choose(found, "auto", ENGINES)
    assert hardware.choose(found, "cpu", ENGINES) is None


def test_choices() -> None:
    found = hardware.seen(0, A100.format(index=0))
    assert hardware.choose(found, "auto", ENGINES) is found
    assert hardware.choose(found, "auto", ["cpu"]) is None, "a model for processors only"
    assert hardware.choose(None, "auto", ENGINES) is None
    with pytest.raises(Problem, match=r"inference_hardware is cuda.*nvidia-smi not found.*Remedy"):
        hardware.choose(None, "cuda", ENGINES)


def test_a_host_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "QUERY", ("/nonexistent/nvidia-smi",))
    assert hardware.find() is None
