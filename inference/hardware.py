"""What a host has to serve a model with: its NVIDIA GPUs, or nothing but processors.

Looks through nvidia-smi, which starts nothing on a GPU.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from dataclasses import dataclass

from inference.planner.cards import Card, reported
from inference.problem import Problem

QUERY = (
    "nvidia-smi",
    "--query-gpu=driver_version,index,name,memory.total,memory.reserved,compute_cap",
    "--format=csv,noheader,nounits",
)
# /dev/shm, which the processes of an engine share.
MORE_SHM = (
    "of a container, --shm-size=1g (Kubernetes: an emptyDir with medium: Memory, mounted there); of a machine, "
    "as root, `mount -o remount,size=1g /dev/shm`"
)
NO_GPU = "no NVIDIA GPU (nvidia-smi not found)"
# All engines that the kit locks are built for CUDA 13, whose first driver this was.
LEAST_DRIVER = 580
CHOICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Gpus:
    """GPUs of one kind. ``indices`` are nvidia-smi's; ``unused`` names GPUs of other kinds."""

    card: Card
    indices: tuple[int, ...]
    driver: str
    unused: tuple[str, ...] = ()


def parse(text: str) -> Gpus | None:
    """The answer to `QUERY`, a line a GPU. Of several kinds the one with the most memory in all; None without a line.

    Raises:
        Problem: nvidia-smi says something else, as where a GPU is cut into MIG instances or its driver is very old.
    """
    kinds: dict[str, list[tuple[Card, int, str]]] = {}
    for line in filter(str.strip, text.splitlines()):
        try:
            driver, index, rest = line.split(",", 2)
            card = reported(rest)
            kinds.setdefault(card.title, []).append((card, int(index), driver.strip()))
        except ValueError:
            raise Problem(
                f"nvidia-smi describes a GPU as {line.strip()!r}, of which the kit can't make sense. Remedy: a driver "
                f"of version {LEAST_DRIVER} or newer, whole GPUs (MIG switched off), or inference_hardware: cpu."
            ) from None
    found = [
        # Of equal cards the one with the least memory to use: an engine takes the same of each.
        Gpus(
            min((card for card, _, _ in kind), key=lambda card: card.memory_gib),
            tuple(i for _, i, _ in kind),
            kind[0][2],
        )
        for kind in kinds.values()
    ]
    if not found:
        return None
    best = max(found, key=lambda gpus: gpus.card.memory_gib * len(gpus.indices))
    unused = tuple(f"{len(gpus.indices)} x {gpus.card.title}" for gpus in found if gpus is not best)
    return Gpus(best.card, best.indices, best.driver, unused)


def seen(status: int, output: str) -> Gpus | None:
    """What nvidia-smi's end means: the GPUs, or None for a driver without one.

    Raises:
        Problem: the driver doesn't work.
    """
    if "No devices were found" in output:
        return None
    if status:
        raise Problem(
            f"nvidia-smi ended with {status}: {output.strip()[:300]}. Remedy: mend the NVIDIA driver (after an update "
            "of the driver or the kernel, reboot), or set inference_hardware: cpu."
        )
    return parse(output)


def find() -> Gpus | None:
    """This host's GPUs; None without any.

    Raises:
        Problem: there is a driver, but it doesn't work.
    """
    try:
        done = subprocess.run(
            QUERY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise Problem("nvidia-smi gave no answer in a minute. Remedy: the driver hangs; reboot the host.") from None
    return seen(done.returncode, done.stdout)


def choose(gpus: Gpus | None, wish: str, engines: Collection[str]) -> Gpus | None:
    """The GPUs that the engine will use, or None for vLLM's CPU build.

    Args:
        gpus: those of the host.
        wish: one of `CHOICES`: what there is, processors, or GPUs.
        engines: what the model's catalog entry runs on: a model for processors only leaves the GPUs alone.

    Raises:
        Problem: GPUs are wished for and there are none, or their driver is too old for the engine.
    """
    if wish == "cpu" or (wish == "auto" and "cuda" not in engines):
        return None
    if gpus is None:
        if wish == "cuda":
            raise Problem(f"inference_hardware is cuda, but the host has {NO_GPU}. Remedy: the driver, or cpu.")
        return None
    major = gpus.driver.split(".")[0]
    if not major.isdigit() or int(major) < LEAST_DRIVER:
        raise Problem(
            f"The NVIDIA driver is {gpus.driver}, but vLLM's packages are built for CUDA 13, which needs "
            f"{LEAST_DRIVER} or newer. Remedy: update the driver and reboot, or set inference_hardware: cpu."
        )
    return gpus
