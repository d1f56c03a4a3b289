"""Where engines run: shares of a host, nodes of a model that is larger than one, and what each is started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference import catalog, engine, launcher, planner, router, scale
from inference.hardware import Gpus
from inference.problem import Problem
from inference.scale import Host, Interface

ETHERNET = {
    "active": True,
    "device": "eth0",
    "speed": 1000,
    "ipv4": {"address": "192.0.2.11", "netmask": "255.255.255.0"},
}
INFINIBAND = {
    "active": True,
    "device": "ib0",
    "speed": 200000,
    "ipv4": {"address": "10.1.0.11", "netmask": "255.255.0.0"},
}


def host(name: str, last: int, gpus: int = 8, *, infiniband: bool = True) -> Host:
    links = [
        Interface("lo", "127.0.0.1", "127.0.0.0/8"),
        Interface("docker0", "172.17.0.1", "172.17.0.0/16", 10000),
        Interface("eth0", f"192.0.2.{last}", "192.0.2.0/24", 1000),
    ]
    return Host(name, gpus, tuple(links + [Interface("ib0", f"10.1.0.{last}", "10.1.0.0/16", 200000)] * infiniband))


@pytest.mark.parametrize(
    ("count", "gpus", "tensor_parallel", "shares"),
    [
        (1, 1, 1, ["0"]),
        (2, 2, 1, ["0", "1"]),
        (2, 8, 4, ["0,1,2,3", "4,5,6,7"]),
        (3, 8, 2, ["0,1", "2,3", "4,5"]),
    ],
)
def test_replicas_have_gpus_of_their_own(count: int, gpus: int, tensor_parallel: int, shares: list[str]) -> None:
    found = [scale.share(index + 1, count, range(gpus), range(64), tensor_parallel) for index in range(count)]
    assert found == [{"CUDA_VISIBLE_DEVICES": share} for share in shares]


@pytest.mark.parametrize(
    ("count", "cores", "shares"),
    [
        (2, range(2), ["0", "1"]),
        (2, range(8), ["0-3", "4-7"]),
        (3, range(8), ["0-1", "2-4", "5-7"]),
        (2, [2, 3, 6, 7], ["2-3", "6-7"]),
    ],
)
def test_replicas_on_a_processor_share_its_cores(count: int, cores: list[int], shares: list[str]) -> None:
    found = [scale.share(index + 1, count, [], cores) for index in range(count)]
    assert found == [{"VLLM_CPU_OMP_THREADS_BIND": share} for share in shares]


def test_only_the_gpus_that_the_kit_may_use_are_shared() -> None:
    found = [scale.share(index, 2, [1, 3, 5, 6], range(64), 2) for index in (1, 2)]
    assert found == [{"CUDA_VISIBLE_DEVICES": "1,3"}, {"CUDA_VISIBLE_DEVICES": "5,6"}]


def test_a_single_engine_keeps_the_whole_processor() -> None:
    assert scale.share(1, 1, [], range(8)) == {}


@pytest.mark.parametrize(
    ("index", "count", "gpus", "cores", "tensor_parallel", "says"),
    [
        (1, 3, 8, 64, 4, "inference_replicas: 2"),
        (1, 2, 1, 64, 1, "inference_replicas: 1"),
        (1, 3, 0, 2, 1, "inference_replicas: 2 or less"),
        (1, 0, 0, 2, 1, "1 or more"),
        (3, 2, 0, 4, 1, "no engine 3 of 2"),
    ],
)
def test_too_many_replicas(index: int, count: int, gpus: int, cores: int, tensor_parallel: int, says: str) -> None:
    with pytest.raises(Problem, match=says):
        scale.share(index, count, range(gpus), range(cores), tensor_parallel)


def test_ranges() -> None:
    assert scale.ranges([5, 0, 2, 1]) == "0-2,5"


def test_nodes_take_the_fastest_network_that_all_share() -> None:
    first, second = scale.nodes([host("one", 11), host("two", 12)], 17810)
    assert (first.rank, first.address, first.interface) == (0, "10.1.0.11", "ib0")
    assert (second.rank, second.address, second.master_address) == (1, "10.1.0.12", "10.1.0.11")


def test_a_network_that_one_host_lacks_does_not_count() -> None:
    found = scale.nodes([host("one", 11), host("two", 12, infiniband=False)], 17810)
    assert [node.interface for node in found] == ["eth0", "eth0"]


def test_an_address_that_all_hosts_have_alike_joins_nobody() -> None:
    bridge = Interface("docker0", "172.17.0.1", "172.17.0.0/16", 10000)
    with pytest.raises(Problem, match="share no network"):
        scale.nodes([Host("one", 8, (bridge,)), Host("two", 8, (bridge,))], 17810)


def test_the_interface_can_be_named() -> None:
    found = scale.nodes([host("one", 11), host("two", 12)], 17810, interface="eth0")
    assert [node.address for node in found] == ["192.0.2.11", "192.0.2.12"]
    with pytest.raises(Problem, match=r"no network called eth7 .*one: .*ib0 10\.1\.0\.11 in 10\.1\.0\.0/16"):
        scale.nodes([host("one", 11), host("two", 12)], 17810, interface="eth7")


@pytest.mark.parametrize(
    ("gpus", "stages", "tensor_parallel", "pipeline_parallel"),
    [(8, 0, 8, 2), (8, 1, 16, 1), (1, 0, 1, 2), (0, 0, 2, 1)],
)
def test_layers_are_cut_by_host_unless_said_otherwise(
    gpus: int, stages: int, tensor_parallel: int, pipeline_parallel: int
) -> None:
    hosts = [host("one", 11, gpus), host("two", 12, gpus)]
    for node in scale.nodes(hosts, 17810, pipeline_parallel=stages):
        assert (node.tensor_parallel, node.pipeline_parallel) == (tensor_parallel, pipeline_parallel)


@pytest.mark.parametrize(
    ("hosts", "options", "says"),
    [
        ([host("one", 11)], {}, "two hosts or more"),
        ([host("one", 11, 8), host("two", 12, 4)], {}, "equally many GPUs.*one 8, two 4"),
        ([host("one", 11, 0), host("two", 12, 0)], {"backend": "ray"}, "CPU build does not run on Ray"),
        ([host("one", 11, 0), host("two", 12, 0)], {"pipeline_parallel": 2}, "cannot cut a model into stages"),
        ([host("one", 11), host("two", 12)], {"backend": "slurm"}, "one of mp, ray"),
        ([host("one", 11), host("two", 12)], {"pipeline_parallel": 3}, "one of 1, 2, 4, 8, 16"),
    ],
)
def test_what_cannot_be(hosts: list[Host], options: dict[str, object], says: str) -> None:
    with pytest.raises(Problem, match=says):
        scale.nodes(hosts, 17810, **options)  # type: ignore[arg-type]


def test_arguments_of_vllms_own_way() -> None:
    first, second = scale.nodes([host("one", 11, 4), host("two", 12, 4)], 17810)
    common = ["--tensor-parallel-size=4", "--pipeline-parallel-size=2", "--nnodes=2"]
    where = ["--master-addr=10.1.0.11", "--master-port=17810"]
    assert scale.arguments(first) == [*common, "--node-rank=0", *where]
    assert scale.arguments(second) == [*common, "--node-rank=1", *where, "--headless"]
    assert scale.environment(second) == {
        "VLLM_HOST_IP": "10.1.0.12",
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "ib0",
    }
    assert scale.runs_engine(first)
    assert scale.runs_engine(second)


def test_a_gpu_engine_across_hosts(tmp_path: Path) -> None:
    model = catalog.load("kimi-vl-a3b-instruct")
    gpus = Gpus(planner.card("a100-40g"), (0, 1, 2, 3), "580.65.06")
    [node, _] = scale.nodes([host("one", 11, 4), host("two", 12, 4)], 17810)
    plan = launcher.settle(model, gpus, planner.Wishes(), node=node)
    settings = engine.Settings(tmp_path, tmp_path, "127.0.0.1", 1, plan=plan, gpus=gpus.indices, node=node)
    assert engine.environment(model, settings)["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    # The last of its kind counts.
    parallel = [part for part in engine.command(model, settings) if part.startswith(("--tensor-p", "--pipeline-p"))]
    assert parallel[-2:] == ["--tensor-parallel-size=4", "--pipeline-parallel-size=2"]


@pytest.mark.parametrize(("counted", "there", "says"), [(4, 2, "can use 2 there"), (4, 0, "can use 0"), (0, 2, "is 0")])
def test_gpus_that_were_counted_wrongly(counted: int, there: int, says: str) -> None:
    node, _ = scale.nodes([host("one", 11, counted), host("two", 12, counted)], 17810)
    with pytest.raises(Problem, match=says):
        scale.check_gpus(node, there)
    scale.check_gpus(node, counted)


def test_arguments_with_ray() -> None:
    first, second = scale.nodes([host("one", 11, 4), host("two", 12, 4)], 17810, backend="ray")
    expected = ["--tensor-parallel-size=4", "--pipeline-parallel-size=2", "--distributed-executor-backend=ray"]
    assert scale.arguments(first) == expected
    common = ["ray", "start", "--block", "--disable-usage-stats"]
    head = ["--node-ip-address=10.1.0.11", "--num-gpus=4", "--head", "--port=17810", "--include-dashboard=false"]
    assert scale.ray_command(first, "ray") == [*common, *head]
    worker = ["--node-ip-address=10.1.0.12", "--num-gpus=4", "--address=10.1.0.11:17810"]
    assert scale.ray_command(second, "ray") == [*common, *worker]
    assert scale.runs_engine(first)
    assert not scale.runs_engine(second)


def test_interfaces_from_ansibles_facts() -> None:
    facts = {
        "interfaces": ["lo", "eth0", "ib0", "br-1a.2", "down0"],
        "lo": {"active": True, "device": "lo", "ipv4": {"address": "127.0.0.1", "netmask": "255.0.0.0"}},
        "eth0": ETHERNET,
        "ib0": INFINIBAND,
        "br_1a_2": {
            "active": True,
            "device": "br-1a.2",
            "speed": -1,
            "ipv4": {"address": "172.17.0.1", "netmask": "255.255.0.0"},
        },
        "down0": {"active": False, "device": "down0", "ipv4": {}},
    }
    assert scale.interfaces(facts) == (
        Interface("lo", "127.0.0.1", "127.0.0.0/8", 0),
        Interface("eth0", "192.0.2.11", "192.0.2.0/24", 1000),
        Interface("ib0", "10.1.0.11", "10.1.0.0/16", 200000),
        Interface("br-1a.2", "172.17.0.1", "172.17.0.0/16", 0),
    )


@pytest.mark.parametrize(("engines", "attempts"), [(2, 2), (3, 3), (8, 3)])
def test_a_question_is_tried_elsewhere_but_not_everywhere(engines: int, attempts: int) -> None:
    workers = [f"http://127.0.0.1:{17820 + n}" for n in range(engines)]
    found = router.settings(workers, "127.0.0.1", 17807, 17809, "cache_aware", 1800)
    assert found["retry_max_retries"] == attempts
    assert found["api_key_validation_urls"] == [f"{worker}/v1/models" for worker in workers]


def test_the_router_wants_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert router.main(["--port=1", "--metrics-port=2", "http://127.0.0.1:3"]) == 2
    assert "VLLM_API_KEY is empty" in capsys.readouterr().err
