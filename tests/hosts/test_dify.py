"""Dify answers: page, queues, plugin and the sample app, in one piece and streamed."""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from cryptography import x509
from module_utils import kit_certificate
from module_utils.kit_dify import WORKFLOW_QUEUES

from tests.hosts.kit_host import KitHost

RELEASES = Path(__file__).resolve().parents[2] / "deploy" / "releases"
QUESTION = "What is the capital of France?"
IMAGE_QUESTION = "Which shapes are in this picture, and which colour has each?"


@pytest.mark.dify
def test_gateway_serves_the_page(kit: KitHost) -> None:
    answer = kit.probe("page", url=f"{kit.url}/")
    assert answer["status"] == 200, (
        f"{kit.url}/ said {answer['status']}: {answer['html']}. Read `make logs SERVICE=web`."
    )
    assert answer["type"].startswith("text/html"), f"{kit.url}/ is {answer['type']}, not a page"
    assert answer["script_status"] == 200, (
        f"the page's script {answer['script']} said {answer['script_status']}: static files are missing"
    )


def test_browsers_are_shown_a_certificate_of_the_site(kit: KitHost) -> None:
    if "gateway-https" not in kit.ports:
        return  # gateway_tls: none
    host = urlsplit(kit.facts["url"]).hostname or ""
    shown = x509.load_pem_x509_certificate(
        kit.probe("certificate", port=kit.ports["gateway-https"], name=host).encode()
    )
    assert kit_certificate.covers(kit_certificate.names(shown), host), f"the certificate is not for {host}"
    left = shown.not_valid_after_utc - datetime.now(UTC)
    assert left > timedelta(0), f"the certificate ended on {shown.not_valid_after_utc}. Renew it, then `make deploy`."


@pytest.mark.deep
@pytest.mark.service("api")
def test_mail_can_be_sent(kit: KitHost) -> None:
    problem = kit.probe("mail")
    assert not problem, f"Dify cannot send mail: {problem}. Mend dify_source_mail, then `make deploy`."


@pytest.mark.deep
@pytest.mark.service("worker")
def test_every_queue_is_consumed(kit: KitHost) -> None:
    workers = {name for name in kit.services if "worker" in name}
    consumed = kit.probe("queues", python="current/api/.venv/bin/python", workers=len(workers))
    assert len(consumed) == len(workers), (
        f"of {sorted(workers)} only {sorted(consumed)} answered within 10 s. Read `make logs SERVICE=worker`."
    )
    release = yaml.safe_load((RELEASES / f"{kit.facts['release']}.yml").read_text())
    missing = set(release["celery"]["queues"]) - {name for names in consumed.values() for name in names}
    assert not missing, f"nobody consumes {sorted(missing)}; workers consume {consumed}. Run `make deploy`."
    # Workflows wait for models: where they have workers of their own, nothing else may wait behind them.
    for worker, names in consumed.items():
        workflows = {name for name in names if name in WORKFLOW_QUEUES}
        if "workflow-worker" in kit.services:
            apart = set(names) if worker.startswith("workflow-worker") else set()
            assert workflows == apart, f"{worker} consumes {names}. Run `make deploy`."


@pytest.mark.deep
@pytest.mark.dify
def test_sockets_are_answered_through_the_gateway(kit: KitHost) -> None:
    own = "websocket" in kit.services or "api_websocket" in kit.containers
    process = "websocket" if own else "api"
    answer = kit.probe("websocket", port=kit.ports["gateway"], behind=kit.port(process))
    assert "101" in answer["status"], f"the gateway said {answer['status']}. Read `make logs SERVICE={process}`."
    assert answer["session"], f"no session was named. Read `make logs SERVICE={process}`."
    assert answer["behind"] >= 1, f"the socket was not answered by {process}. Run `make deploy`."


@pytest.mark.service("plugin-daemon")
def test_plugin_daemon_lists_the_provider(kit: KitHost) -> None:
    answer = kit.probe("plugins", port=kit.ports["plugin-daemon"])
    assert answer["health"] == 200, (
        f"the plugin daemon's health is {answer['health']}. Read `make logs SERVICE=plugin-daemon`."
    )
    assert answer["plugins"], f"no plugin is installed ({answer['message']}). Run `make deploy`."


@pytest.mark.deep  # a deploy has just asked itself
@pytest.mark.dify
def test_question_is_answered(kit: KitHost) -> None:
    answer = kit.probe("ask", url=kit.url, question=QUESTION)
    assert answer["status"] == 200, f"Dify said {answer['status']}: {answer['answer']}. Read `make logs SERVICE=api`."
    assert answer["answer"].strip(), "Dify's answer is empty. Read `make logs SERVICE=inference`."
    assert answer["tokens"], "Dify counted no tokens: the answer did not come from a model"
    assert answer["stranger_status"] == 401, (
        f"a wrong app key was answered with {answer['stranger_status']} instead of 401"
    )


@pytest.mark.deep  # a deploy has just asked and read the answer as it came
@pytest.mark.dify
def test_answer_is_streamed_unbuffered(kit: KitHost) -> None:
    # A busy host with a fast model delivers all of an answer late, now and then. What buffers does it every time.
    for _ in range(3):
        answer = kit.probe("stream", url=kit.url, question=QUESTION)
        assert answer["status"] == 200, (
            f"Dify said {answer['status']}: {answer['answer']}. Read `make logs SERVICE=api`."
        )
        assert answer["last"] == "message_end", f"the stream ended with {answer['last']!r}: {answer['answer']}"
        assert answer["pieces"] > 1, f"the answer came in {answer['pieces']} piece: {answer['answer']!r}"
        if answer["seconds"] > 0.01:
            break
    else:
        pytest.fail(f"{answer['pieces']} pieces came at once: something buffers between the API and {kit.url}")


@pytest.mark.deep  # a deploy has just asked about the picture itself
@pytest.mark.sees
@pytest.mark.dify
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


@pytest.mark.deep
@pytest.mark.service("egress")
def test_apps_do_not_reach_the_inside(kit: KitHost) -> None:
    opened = [ipaddress.ip_network(entry) for entry in kit.facts["egress_allow"]]
    addresses = [
        address
        for address in ("127.0.0.1", "169.254.169.254", "10.0.0.1")
        if not any(ipaddress.ip_address(address) in network for network in opened if network.version == 4)
    ]
    urls = [f"{scheme}://{address}:{kit.ports['gateway']}" for address in addresses for scheme in ("http", "https")]
    found = kit.probe("egress", python="current/api/.venv/bin/python", urls=urls)
    reached = {url: answer for url, answer in found.items() if not answer.startswith("407")}
    assert not reached, f"not refused by the egress proxy: {reached}. Read `make logs SERVICE=egress`."


# Whether it sees a file, whether it reaches a port of this host; in this order, "no" for what must not be.
PYTHON = """
import os, socket
print(6 * 7)
try:
    print(len(os.listdir({home!r})))
except OSError:
    print("no")
try:
    print(socket.create_connection(("127.0.0.1", {port}), 5))
except OSError:
    print("no")
"""


@pytest.mark.service("sandbox")
def test_code_runs_apart_from_the_site(kit: KitHost) -> None:
    text = PYTHON.format(home=f"{kit.home}/etc", port=kit.ports["api"])
    found = kit.probe("code", port=kit.ports["sandbox"], runs={"python3": text, "nodejs": "console.log(6 * 7)"})
    said = {language: answer["stdout"].split() for language, answer in found.items()}
    assert said["nodejs"] == ["42"], f"JavaScript: {found['nodejs']}. Read `make logs SERVICE=sandbox`."
    assert said["python3"][:1] == ["42"], f"Python: {found['python3']}. Read `make logs SERVICE=sandbox`."
    assert said["python3"] == ["42", "no", "no"], (
        f"code sees the site's files or reaches its services: {said['python3']}"
    )
