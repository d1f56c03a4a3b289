"""The model service answers those who hold its key."""

import pytest

from tests.hosts.kit_host import KitHost

pytestmark = pytest.mark.service("inference")


def test_model_answers(kit: KitHost) -> None:
    answer = kit.probe(
        "model", port=kit.ports["inference"], name=kit.facts["model"], question="What is the capital of France?"
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
