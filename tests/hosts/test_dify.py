"""Dify answers: page, queues, plugin and the sample app, in one piece and streamed."""

from pathlib import Path

import pytest
import yaml

from tests.hosts.kit_host import KitHost

RELEASES = Path(__file__).resolve().parents[2] / "deploy" / "releases"
QUESTION = "What is the capital of France?"
IMAGE_QUESTION = "Which shapes are in this picture, and which colour has each?"


@pytest.mark.service("web")
def test_gateway_serves_the_page(kit: KitHost) -> None:
    answer = kit.probe("page", url=f"{kit.url}/")
    assert answer["status"] == 200, (
        f"{kit.url}/ said {answer['status']}: {answer['html']}. Read `make logs SERVICE=web`."
    )
    assert answer["type"].startswith("text/html"), f"{kit.url}/ is {answer['type']}, not a page"
    assert answer["script_status"] == 200, (
        f"the page's script {answer['script']} said {answer['script_status']}: static files are missing"
    )


@pytest.mark.deep
@pytest.mark.service("worker")
def test_every_queue_is_consumed(kit: KitHost) -> None:
    consumed = kit.probe("queues", python="current/api/.venv/bin/python")
    assert consumed, "no Celery worker answered within 5 s. Read `make logs SERVICE=worker`."
    release = yaml.safe_load((RELEASES / f"{kit.facts['release']}.yml").read_text())
    missing = set(release["celery"]["queues"]) - {name for names in consumed.values() for name in names}
    assert not missing, f"nobody consumes {sorted(missing)}; workers consume {consumed}. Run `make deploy`."


@pytest.mark.service("plugin-daemon")
def test_plugin_daemon_lists_the_provider(kit: KitHost) -> None:
    answer = kit.probe("plugins", port=kit.ports["plugin-daemon"])
    assert answer["health"] == 200, (
        f"the plugin daemon's health is {answer['health']}. Read `make logs SERVICE=plugin-daemon`."
    )
    assert answer["plugins"], f"no plugin is installed ({answer['message']}). Run `make deploy`."


@pytest.mark.deep  # a deploy has just asked itself
@pytest.mark.service("api")
def test_question_is_answered(kit: KitHost) -> None:
    answer = kit.probe("ask", url=kit.url, question=QUESTION)
    assert answer["status"] == 200, f"Dify said {answer['status']}: {answer['answer']}. Read `make logs SERVICE=api`."
    assert answer["answer"].strip(), "Dify's answer is empty. Read `make logs SERVICE=inference`."
    assert answer["tokens"], "Dify counted no tokens: the answer did not come from a model"
    assert answer["stranger_status"] == 401, (
        f"a wrong app key was answered with {answer['stranger_status']} instead of 401"
    )


@pytest.mark.deep  # a deploy has just asked and read the answer as it came
@pytest.mark.service("api")
def test_answer_is_streamed_unbuffered(kit: KitHost) -> None:
    answer = kit.probe("stream", url=kit.url, question=QUESTION)
    assert answer["status"] == 200, f"Dify said {answer['status']}: {answer['answer']}. Read `make logs SERVICE=api`."
    assert answer["last"] == "message_end", f"the stream ended with {answer['last']!r}: {answer['answer']}"
    assert answer["pieces"] > 1, f"the answer came in {answer['pieces']} piece: {answer['answer']!r}"
    assert answer["seconds"] > 0.01, (
        f"{answer['pieces']} pieces came at once: something buffers between the API and {kit.url}"
    )


@pytest.mark.deep  # a deploy has just asked about the picture itself
@pytest.mark.sees
@pytest.mark.service("api")
@pytest.mark.service("inference")
def test_a_picture_reaches_the_model_whole(kit: KitHost) -> None:
    answer = kit.probe(
        "picture", url=kit.url, endpoint=kit.facts["endpoint"], name=kit.facts["model"], question=IMAGE_QUESTION
    )
    assert answer["status"] == 200, f"Dify said {answer['status']}: {answer['answer']}. Read `make logs SERVICE=api`."
    assert answer["answer"].strip(), "Dify's answer is empty. Read `make logs SERVICE=inference`."
    assert answer["streamed"].strip(), "Dify's streamed answer is empty. Read `make logs SERVICE=inference`."
    counted = {answer["blocking_tokens"], answer["streaming_tokens"], answer["direct_tokens"]}
    assert len(counted) == 1, (
        f"the engine counted {answer['blocking_tokens']} tokens in one piece, {answer['streaming_tokens']} streamed, "
        f"{answer['direct_tokens']} asked directly: something changes the picture or the question on its way"
    )
    assert answer["direct_tokens"] > answer["text_tokens"] > 0, "the picture has no tokens: the model did not see it"
