"""Where a model service's engines run: replicas side by side on a host, or one engine across several hosts.

Decides only: nothing here looks at a machine or starts anything. Two ways to grow, which do not mix on one host:

* replicas: `count` engines on one host, each with GPUs (or processor cores) of its own, behind vllm-router;
* nodes: one model over several hosts, by vLLM's own multi-node start or on Ray.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inference.problem import Problem

BACKENDS = ("mp", "ray")


@dataclass(frozen=True)
class Interface:
    """A host's network interface. ``network`` as ``10.0.0.0/24``; ``mbit`` is the link's speed, 0 if unknown."""

    name: str
    address: str
    network: str
    mbit: int = 0


@dataclass(frozen=True)
class Host:
    """A host that could run a part of a model: its GPUs (0: vLLM's CPU build) and interfaces."""

    name: str
    gpus: int
    interfaces: tuple[Interface, ...]


@dataclass(frozen=True)
class Node:
    """One host's part of an engine that spans hosts. Rank 0 has the API; the others only calculate.

    ``address`` and ``interface`` are this host's own in the network that all the nodes share.
    """

    host: str
    rank: int
    nodes: int
    address: str
    interface: str
    master_address: str
    master_port: int
    tensor_parallel: int
    pipeline_parallel: int
    gpus: int
    backend: str = "mp"


def share(
    index: int, count: int, gpus: Sequence[int], cores: Sequence[int], tensor_parallel: int = 1
) -> dict[str, str]:
    """The environment that gives one of ``count`` engines on a host its share of it.

    Args:
        index: which engine, from 1.
        count: how many there are; a single one gets all there is.
        gpus: the GPUs that the kit may use, by number; none for vLLM's CPU build.
        cores: the processor cores that the kit may use, by number; shared out on the CPU build only.
        tensor_parallel: GPUs that one engine needs.

    Raises:
        Problem: the host has too few GPUs or cores.
    """
    if not 1 <= index <= count:
        raise Problem(f"There is no engine {index} of {count}. Remedy: inference_replicas must be 1 or more.")
    if gpus and count * tensor_parallel > len(gpus):
        raise Problem(
            f"{count} replicas with {tensor_parallel} GPUs each need {count * tensor_parallel}, the kit may use "
            f"{len(gpus)} here. "
            f"Remedy: inference_replicas: {max(1, len(gpus) // tensor_parallel)}, or a model that needs fewer GPUs."
        )
    if not gpus and count > len(cores):
        raise Problem(
            f"{count} replicas need a processor core each, the kit may use {len(cores)} here. "
            f"Remedy: inference_replicas: {len(cores)} or less."
        )
    if gpus:
        first = (index - 1) * tensor_parallel
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus[first : first + tensor_parallel]))}
    if count == 1:
        return {}
    # Left alone, each engine pins its threads to the same cores as its neighbours. Cores side by side share caches.
    ordered = sorted(cores)
    own = ordered[(index - 1) * len(ordered) // count : index * len(ordered) // count]
    return {"VLLM_CPU_OMP_THREADS_BIND": ranges(own)}


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2,5"``, as taskset and vLLM read it."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def nodes(
    hosts: Sequence[Host],
    master_port: int,
    *,
    interface: str = "",
    pipeline_parallel: int = 0,
    backend: str = "mp",
) -> list[Node]:
    """One engine across hosts, in the inventory's order: the first is rank 0 and has the API.

    Args:
        hosts: two or more, alike in their GPUs.
        master_port: where rank 0 listens for the other ranks.
        interface: name of the interface to use on every host; empty chooses the fastest network that all share.
        pipeline_parallel: stages that the model's layers are cut into; 0: one a host, each layer inside a host,
            which needs little of the network. 1 spreads every layer over all hosts: for InfiniBand and the like.
            Without GPUs there is only the latter.
        backend: ``mp``, vLLM's own start, or ``ray``.

    Raises:
        Problem: hosts that do not go together, no common network, or a backend that cannot be.
    """
    if len(hosts) < 2:
        raise Problem("A model across hosts needs two hosts or more. Remedy: add some to the group inference_workers.")
    if backend not in BACKENDS:
        raise Problem(f"inference_nodes_backend is {backend!r}. Remedy: one of {', '.join(BACKENDS)}.")
    gpus = {host.name: host.gpus for host in hosts}
    if len(set(gpus.values())) > 1:
        counted = ", ".join(f"{name} {count}" for name, count in gpus.items())
        raise Problem(
            f"Hosts that share a model must have equally many GPUs; they have: {counted}. Remedy: leave some out."
        )
    if backend == "ray" and not hosts[0].gpus:
        raise Problem(
            "vLLM's CPU build does not run on Ray: it refuses to start. Remedy: inference_nodes_backend: mp, "
            "which does the same without Ray."
        )
    if pipeline_parallel > 1 and not hosts[0].gpus:
        raise Problem(
            "vLLM's CPU build cannot cut a model into stages across hosts: its workers fail at the first question. "
            "Remedy: inference_pipeline_parallel: 1, or 0 for the kit's choice."
        )
    world = len(hosts) * (hosts[0].gpus or 1)
    stages = pipeline_parallel or (len(hosts) if hosts[0].gpus else 1)
    if world % stages:
        raise Problem(
            f"inference_pipeline_parallel is {stages}, which does not divide the {world} GPUs of all hosts. "
            f"Remedy: one of {', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}."
        )
    chosen = common_network(hosts, interface)
    return [
        Node(
            host=host.name,
            rank=rank,
            nodes=len(hosts),
            address=chosen[host.name].address,
            interface=chosen[host.name].name,
            master_address=chosen[hosts[0].name].address,
            master_port=master_port,
            tensor_parallel=world // stages,
            pipeline_parallel=stages,
            gpus=host.gpus,
            backend=backend,
        )
        for rank, host in enumerate(hosts)
    ]


def check_gpus(node: Node, gpus: int) -> None:
    """Whether a host has the GPUs that its part of the model was placed with.

    Raises:
        Problem: it has not, or none were counted where the engine finds some.
    """
    if node.gpus > gpus:
        raise Problem(
            f"inference_gpus of {node.host} is {node.gpus}, but the engine can use {gpus} there. "
            "Remedy: the right number in the inventory, the same for all of the model's hosts."
        )
    if gpus and not node.gpus:
        raise Problem(
            f"{node.host} has GPUs ({gpus}), but its inference_gpus is 0. "
            "Remedy: say in the inventory how many each of the model's hosts gives, or set inference_hardware: cpu."
        )


def common_network(hosts: Sequence[Host], interface: str = "") -> dict[str, Interface]:
    """Each host's interface in the network that all of them share; of several the one whose slowest link is fastest.

    Raises:
        Problem: there is none; lists what each host has.
    """
    by_network: dict[str, dict[str, Interface]] = {}
    for host in hosts:
        for link in host.interfaces:
            if interface in ("", link.name) and not ipaddress.ip_address(link.address).is_loopback:
                by_network.setdefault(link.network, {}).setdefault(host.name, link)
    # Bridges of container engines have one and the same address on every host.
    shared = [links for links in by_network.values() if len({link.address for link in links.values()}) == len(hosts)]
    if shared:
        return max(shared, key=lambda links: min(link.mbit for link in links.values()))
    have = "; ".join(
        f"{host.name}: " + ", ".join(f"{link.name} {link.address} in {link.network}" for link in host.interfaces)
        for host in hosts
    )
    named = f" called {interface}" if interface else ""
    raise Problem(
        f"The hosts of the model share no network{named} ({have}). "
        "Remedy: name the interface that connects them (inference_interface), or put them into one network."
    )


def interfaces(facts: Mapping[str, Any]) -> tuple[Interface, ...]:
    """A host's interfaces that are up and have an IPv4 address, from ``ansible_facts`` (gather_subset ``network``)."""
    found = []
    for name in facts.get("interfaces", []):
        # A fact's name has underscores where the interface's has dashes, dots or colons.
        link = facts.get("".join(char if char.isalnum() else "_" for char in name), {})
        ipv4 = link.get("ipv4") or {}
        if link.get("active") and ipv4.get("address") and ipv4.get("netmask"):
            network = ipaddress.ip_network(f"{ipv4['address']}/{ipv4['netmask']}", strict=False)
            found.append(
                Interface(link.get("device", name), ipv4["address"], str(network), max(0, int(link.get("speed") or 0)))
            )
    return tuple(found)


def arguments(node: Node) -> list[str]:
    """What a node's engine gets beside the model's own arguments."""
    parallel = [f"--tensor-parallel-size={node.tensor_parallel}", f"--pipeline-parallel-size={node.pipeline_parallel}"]
    if node.backend == "ray":
        return [*parallel, "--distributed-executor-backend=ray"]
    return [
        *parallel,
        f"--nnodes={node.nodes}",
        f"--node-rank={node.rank}",
        f"--master-addr={node.master_address}",
        f"--master-port={node.master_port}",
        *(["--headless"] if node.rank else []),
    ]


def environment(node: Node | None) -> dict[str, str]:
    """Where the engine's processes meet: vLLM, Gloo and NCCL would each guess an address of the host, and listen there.

    What speaks only within a host does so on loopback, where nobody else hears it: Gloo and NCCL ask for no key.
    """
    if node is None:
        return {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {
        "VLLM_HOST_IP": node.address,
        "GLOO_SOCKET_IFNAME": node.interface,
        **({"NCCL_SOCKET_IFNAME": node.interface} if node.gpus else {}),
    }


def ray_command(node: Node, ray: str) -> list[str]:
    """The node's Ray process; the engine itself then starts on rank 0 alone and finds the GPUs through Ray."""
    where = (
        ["--head", f"--port={node.master_port}", "--include-dashboard=false"]
        if node.rank == 0
        else [f"--address={node.master_address}:{node.master_port}"]
    )
    return [
        ray,
        "start",
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={node.address}",
        f"--num-gpus={node.gpus}",
        *where,
    ]


def runs_engine(node: Node) -> bool:
    """Whether the host starts an engine of its own: all of them do by vLLM's own way, rank 0 alone on Ray."""
    return node.backend == "mp" or node.rank == 0
