"""One model on two hosts: two network namespaces with a cable between them, placed from their own facts.

Takes about three minutes on two cores. Needs root, for the namespaces.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference import scale
from inference.scale import Host, Node

from .conftest import REPO, Engine

KEY = "integration-test-key"
PORT = 8000  # inside the namespaces, where nobody else is
QUESTION = "What is the capital of France?"
TOKENS = 24
# Random weights, with heads that two can share; float32, so that the order in which two add up changes no word. Prints
# what transformers answers with them.
TINY_LLAMA = """
import sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
torch.manual_seed(7)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
)
model = LlamaForCausalLM(config)
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
question = [{"role": "user", "content": sys.argv[3]}]
asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**asked, max_new_tokens=int(sys.argv[4]), do_sample=False)[0, asked["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True), end="")
"""
# In a namespace: urllib in this process would look for the server outside.
ASK = """
import sys, urllib.request
headers = {"Content-Type": "application/json", "Authorization": f"Bearer {sys.argv[3]}"}
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), headers)
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Server:
    """One node's part of an engine, in a network namespace of its own."""

    def __init__(self, engine: Engine, model: Path, root: Path, namespace: str, node: Node) -> None:
        root.mkdir()
        (root / "tmp").mkdir()
        self.namespace, self.log = namespace, root / "log"
        self.command = ["ip", "netns", "exec", namespace, str(engine.python), "-m", "inference.vllm_cli", "serve"]
        self.command += [str(model), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(PORT)]
        self.command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
        self.command += scale.arguments(node)
        # A core for each node: they wait for each other, and both on one would take turns with that.
        cores = scale.share(node.rank + 1, node.nodes, [], sorted(os.sched_getaffinity(0)))
        self.environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(REPO),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(root),
            "TMPDIR": str(root / "tmp"),
            "VLLM_API_KEY": KEY,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **cores,
            **scale.environment(node),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, cwd="/", stdout=log, stderr=log, start_new_session=True
            )

    def answer(self, seconds: float = 0) -> str:
        """The model's text; waits for the server for so long."""
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": TOKENS,
        }
        url = f"http://127.0.0.1:{PORT}/v1/chat/completions"
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-c", ASK, url, json.dumps(body), KEY]
        end = time.monotonic() + seconds
        while True:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return str(json.loads(done.stdout)["choices"][0]["message"]["content"])
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert "refused" in done.stderr, done.stderr
            assert time.monotonic() < end, done.stderr[-500:] + self.log.read_text()[-4000:]
            time.sleep(1)

    def kill(self) -> None:
        """All its processes at once, as a host that loses its power."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root: run the tests as root to see a model on two hosts")
    names = [f"kit-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run(
            "ip",
            "link",
            "add",
            "cable1",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable2",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            run("ip", "-n", name, "address", "add", f"10.99.7.{number}/24", "dev", f"cable{number}")
            run("ip", "-n", name, "link", "set", f"cable{number}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name])


def facts(namespace: str) -> dict[str, Any]:
    """What Ansible finds out about a host."""
    ansible = str(Path(sys.executable).with_name("ansible"))
    said = run(
        *["ip", "netns", "exec", namespace, ansible, "localhost", "-i", "localhost,", "-c", "local"],
        *["-e", f"ansible_python_interpreter={sys.executable}", "-m", "setup", "-a", "gather_subset=!all,network"],
    )
    found = json.loads(said.partition(" => ")[2])["ansible_facts"]
    return {name.removeprefix("ansible_"): value for name, value in found.items()}


def test_two_hosts_answer_as_one(engine: Engine, namespaces: list[str], tmp_path: Path) -> None:
    model = tmp_path / "llama"
    script = [str(engine.python), "-c", TINY_LLAMA, str(engine.weights), str(model), QUESTION, str(TOKENS)]
    expected = run(*script)
    assert expected.strip()

    hosts = [Host(name, 0, scale.interfaces(facts(name))) for name in namespaces]
    placed = scale.nodes(hosts, 29501)
    assert [(node.address, node.interface) for node in placed] == [("10.99.7.1", "cable1"), ("10.99.7.2", "cable2")]
    assert (placed[0].tensor_parallel, placed[0].pipeline_parallel) == (2, 1)

    begin = time.monotonic()
    first, second = (
        Server(engine, model, tmp_path / f"node{node.rank}", name, node)
        for name, node in zip(namespaces, placed, strict=True)
    )
    try:
        assert first.answer(600) == expected
        print(f"two hosts: {time.monotonic() - begin:.0f} s")
        # The second host has a part of the model in its memory, and has calculated.
        assert "rank=1" in second.log.read_text()
        # A node that is left alone ends, so that supervisor can start it again together with the first.
        first.kill()
        begin = time.monotonic()
        second.process.wait(60)
        print(f"the second host noticed after {time.monotonic() - begin:.1f} s")
        assert "(10.99.7.1:29502) is gone: ending" in second.log.read_text()
    finally:
        first.kill()
        second.kill()
