"""The model service answers those who hold its key."""

import pytest

from tests.hosts.kit_host import KitHost

pytestmark = pytest.mark.service("inference")


def test_model_answers(kit: KitHost) -> None:
    answer = kit.probe(
        "model", url=kit.facts["endpoint"], name=kit.facts["model"], question="What is the capital of France?"
    )
    assert answer["without_key"] == 401, (
        f"asked without a key, the model service said {answer['without_key']} instead of 401"
    )
    assert kit.facts["model"] in answer["models"], (
        f"{kit.facts['model']} is not served, only {answer['models']}. Run `make deploy`."
    )
    assert answer["status"] == 200, (
        f"the model service said {answer['status']}: {answer['answer']}. Read `make logs SERVICE=inference`."
    )
    assert answer["answer"].strip(), "the model's answer is empty. Read `make logs SERVICE=inference`."


def check_engines(kit: KitHost, *options: str) -> None:
    """Each engine of the host, held against what it was told."""
    service = kit.facts["model_service"]
    bind = kit.facts["binds"]["inference"] if list(service["engines"]) == ["inference"] else "127.0.0.1"
    for name, port in service["engines"].items():
        said = kit.run(
            f"{kit.home}/runtime/bin/kit-exec",
            *["--env-file", f"{kit.home}/etc/env/inference.env", "--"],
            *[service["python"], "-m", "inference", "check", kit.facts["model"]],
            f"--url=http://{bind.replace('0.0.0.0', '127.0.0.1')}:{port}/v1",
            f"--log={kit.home}/var/log/{name}.log",
            *options,
        )
        kit.proved[name] = said.splitlines()


def test_the_engine_does_what_it_was_told(kit: KitHost) -> None:
    # A GPU answers the fixed prompts in a second, and FP16 may overflow there.
    check_engines(kit, *([] if kit.facts["model_service"].get("hardware") == "cuda" else ["--quick"]))


@pytest.mark.deep
def test_its_numbers_are_in_range(kit: KitHost) -> None:
    check_engines(kit)
