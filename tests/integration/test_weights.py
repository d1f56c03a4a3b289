"""`python -m inference fetch` against a real hub server that breaks off, lies, is busy, wants a token; and killed.

What an engine does with fetched weights, without a network, is in test_inference.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference import catalog
from tests.integration.model_hub import ModelHub, serving

REPO = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BIG = SHARDS[0]
MIB = 1 << 20
CLOSED = "http://127.0.0.1:9"
WAIT = 120  # seconds: on a machine where much else runs
TOKEN = "hf_a_token_for_this_test"
NAME = catalog.load(MODEL).repositories["huggingface"].name
COMMIT = catalog.load(MODEL).repositories["huggingface"].revision or "main"


def safetensors(size: int, seed: int) -> bytes:
    """A sound file with one tensor of so many bytes."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(size)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository: what an engine needs, and what it must not get."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}" * 1000)
    (folder / "README.md").write_text("# A model\n")
    (folder / "LICENSE").write_text("Apache-2.0\n")
    for seed, (name, size) in enumerate(zip(SHARDS, (6 * MIB, MIB), strict=True)):
        (folder / name).write_bytes(safetensors(size, seed))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))})
    )
    (folder / "modeling_evil.py").write_text("raise SystemExit\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"x")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[ModelHub]:
    with serving(model, COMMIT) as running:
        yield running


class Fetch:
    """The command of a person, with an environment and folders of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = root / "home" / MODEL
        self.work = root / "cache" / f".{MODEL}.partial"
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(root), "PYTHONUNBUFFERED": "1"}
        self.revision: str | None = COMMIT  # another one than the catalog's, in the catalog's place

    def argv(self, *options: str, model: str = MODEL) -> list[str]:
        program = ["-m", "inference"]
        if self.revision != COMMIT:
            script = (
                "import sys\nfrom dataclasses import replace\nfrom inference import catalog, cli\nload = catalog.load\n"
                f"other = catalog.Repository({NAME!r}, {self.revision!r}, False)\n"
                "catalog.load = lambda name: replace(load(name), repositories={'huggingface': other})\n"
                "sys.exit(cli.main(sys.argv[1:]))\n"
            )
            program = ["-c", script]
        options = (f"--output={self.output}", f"--cache={self.root / 'cache'}", *options)
        return [sys.executable, *program, "fetch", model, *options]

    def __call__(self, *options: str, model: str = MODEL, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*options, model=model),
            cwd=REPO,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT,
        )

    def start(self, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv(*options),
            cwd=REPO,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def record(self) -> dict[str, Any]:
        raw: dict[str, Any] = json.loads((self.output / "kit-weights.json").read_text())
        return raw


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    return Fetch(tmp_path)


def mirror(hub: ModelHub) -> tuple[str, str]:
    return "--source=mirror", f"--mirror={hub.url}"


def test_what_an_engine_needs_is_fetched_checked_and_recorded(hub: ModelHub, fetch: Fetch, model: Path) -> None:
    done = fetch(*mirror(hub))
    assert done.returncode == 0, done.stdout
    names = {"config.json", "tokenizer.json", "README.md", "LICENSE", "model.safetensors.index.json", *SHARDS}
    assert {path.name for path in fetch.output.iterdir()} == names | {"kit-weights.json"}
    for name in names:
        data = (model / name).read_bytes()
        assert (fetch.output / name).read_bytes() == data
        assert fetch.record["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert fetch.record | {"files": 0} == {
        "model": MODEL,
        "source": "mirror",
        "address": hub.url,
        "name": NAME,
        "requested": COMMIT,
        "revision": COMMIT,
        "files": 0,
    }
    assert re.search(r"fetched 7\.3 MB in \d+ s \(.*/s\); all hashes are right", done.stdout)
    assert not fetch.work.exists()


def test_a_second_fetch_asks_nobody(hub: ModelHub, fetch: Fetch) -> None:
    assert fetch(*mirror(hub)).returncode == 0
    asked = len(hub.asked)
    again = fetch("--source=mirror", f"--mirror={CLOSED}", "--verify")
    assert again.returncode == 0, again.stdout
    assert len(hub.asked) == asked
    assert COMMIT in again.stdout


def test_modelscope(hub: ModelHub, fetch: Fetch) -> None:
    done = fetch("--source=modelscope", MODELSCOPE_ENDPOINT=hub.url, MODELSCOPE_API_TOKEN=TOKEN)
    assert done.returncode == 0, done.stdout
    # It does not tell the commit of a branch: then what was asked for is all that is known, besides the hashes.
    assert (fetch.record["source"], fetch.record["revision"]) == ("modelscope", "master")
    assert set(SHARDS) < set(fetch.record["files"])
    assert ("127.0.0.1", f"Bearer {TOKEN}") in hub.tokens


def test_gone_on_with_after_the_connection_broke(hub: ModelHub, fetch: Fetch, model: Path) -> None:
    hub.trouble.cut = {BIG: 3 * MIB + 5, "tokenizer.json": 100}
    done = fetch(*mirror(hub))
    assert done.returncode == 0, done.stdout
    assert re.search(rf"{BIG} (broke off|ended early).*going on", done.stdout)
    first, second = [one for one in hub.ranges if one[0] == BIG]
    assert first[:2] == (BIG, 0)
    assert 2 * MIB <= second[1] <= 3 * MIB + 5
    assert second[1] + second[2] == (model / BIG).stat().st_size


def test_killed_half_way_and_gone_on_with(hub: ModelHub, fetch: Fetch, model: Path) -> None:
    """Counted at the hub: the second process asks for the rest only."""
    hub.trouble.stall = {BIG: 4 * MIB}
    process = fetch.start(*mirror(hub))
    assert hub.stalled.wait(WAIT)
    until(lambda: (fetch.work / BIG).stat().st_size >= 3 * MIB)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.go_on.set()
    until(lambda: hub.sent(BIG))
    assert not fetch.output.exists()
    there = (fetch.work / BIG).stat().st_size
    hub.ranges.clear()

    done = fetch(*mirror(hub))
    assert done.returncode == 0, done.stdout
    total = (model / BIG).stat().st_size
    assert [one for one in hub.ranges if one[0] == BIG] == [(BIG, there, total - there)]
    assert hub.sent(SHARDS[1]) == 0, "what was complete was fetched again"
    assert re.search(r"\d\.\d MB are there from an earlier fetch", done.stdout)
    assert (fetch.output / BIG).read_bytes() == (model / BIG).read_bytes()


def test_an_interrupt_keeps_what_is_there(hub: ModelHub, fetch: Fetch) -> None:
    hub.trouble.stall = {BIG: 4 * MIB}
    process = fetch.start(*mirror(hub))
    assert hub.stalled.wait(WAIT)
    until(lambda: (fetch.work / BIG).stat().st_size >= 3 * MIB)
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # nothing outside shows that it was taken; on a busy machine the rest would arrive first
    hub.go_on.set()
    text, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert "Interrupted." in text
    assert "Traceback" not in text
    assert (fetch.work / BIG).stat().st_size >= 3 * MIB


def test_a_hub_that_cannot_begin_in_the_middle(hub: ModelHub, fetch: Fetch, model: Path) -> None:
    hub.trouble.ignore_range = True
    hub.trouble.cut = {BIG: 3 * MIB}
    done = fetch(*mirror(hub))
    assert done.returncode == 0, done.stdout
    assert (fetch.output / BIG).read_bytes() == (model / BIG).read_bytes()


def test_two_at_once_fetch_once(hub: ModelHub, fetch: Fetch, model: Path) -> None:
    hub.trouble.stall = {BIG: MIB}
    first = fetch.start(*mirror(hub))
    assert hub.stalled.wait(WAIT)
    second = fetch.start(*mirror(hub))
    assert second.stdout
    assert "another fetch of smollm2-135m is under way" in second.stdout.readline()
    hub.go_on.set()
    for process in (first, second):
        text, _ = process.communicate(timeout=WAIT)
        assert process.returncode == 0, text
    assert hub.sent(BIG) == (model / BIG).stat().st_size


@pytest.mark.parametrize("name", [BIG, "config.json"])
def test_a_wrong_hash_is_refused(hub: ModelHub, fetch: Fetch, name: str) -> None:
    """By sha256 for large files, by git's hash for small ones."""
    hub.trouble.lie = {name}
    done = fetch(*mirror(hub))
    assert done.returncode == 2, done.stdout
    assert f"{name} came twice, both times with another hash than the one its source names" in done.stdout
    assert "Remedy" in done.stdout
    assert not fetch.output.exists()
    assert not (fetch.work / name).exists()
    hub.trouble.lie = set()
    assert fetch(*mirror(hub)).returncode == 0


def test_one_bad_copy_is_fetched_again(hub: ModelHub, fetch: Fetch) -> None:
    hub.trouble.lie_once = {SHARDS[1]}
    done = fetch(*mirror(hub))
    assert done.returncode == 0, done.stdout
    assert f"{SHARDS[1]} does not have the hash that its source names: fetching it again" in done.stdout


def test_waits_as_long_as_a_busy_hub_asks(hub: ModelHub, fetch: Fetch) -> None:
    hub.trouble.busy, hub.trouble.retry_after = 2, "2"
    begin = time.monotonic()
    done = fetch(*mirror(hub))
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - begin >= 4
    assert done.stdout.count("the mirror is asked too often: it answers 429; going on in 2 s") == 2


def test_does_not_wait_for_hours(hub: ModelHub, fetch: Fetch) -> None:
    hub.trouble.busy, hub.trouble.retry_after = 1, "7200"
    done = fetch(*mirror(hub))
    assert done.returncode == 2
    assert re.search(r"429, and asks to wait 2 h 00 min. Remedy: .*HF_TOKEN", done.stdout)


def test_a_licence_that_was_not_accepted(hub: ModelHub, fetch: Fetch) -> None:
    hub.trouble.token = TOKEN
    done = fetch(*mirror(hub))
    assert done.returncode == 2
    assert "only to who has accepted its licence: it answers 401" in done.stdout
    assert f"accept it at {hub.url}/{NAME}" in done.stdout
    assert "inference_hub_token or HF_TOKEN" in done.stdout
    done = fetch(*mirror(hub), HF_TOKEN="hf_of_somebody_else")
    assert done.returncode == 2
    assert f"does not give {NAME} to this token: it answers 403" in done.stdout
    assert "somebody_else" not in done.stdout


def test_the_token_reaches_the_hub_and_nobody_else(hub: ModelHub, fetch: Fetch) -> None:
    hub.trouble.token = TOKEN
    secret = fetch.root / "token"
    secret.write_text(f"{TOKEN}\n")
    secret.chmod(0o644)
    done = fetch(*mirror(hub), f"--token-file={secret}")
    assert done.returncode == 2
    assert f"Others can read the token in {secret}. Remedy: chmod 600" in done.stdout
    secret.chmod(0o600)
    done = fetch(*mirror(hub), f"--token-file={secret}")
    assert done.returncode == 0, done.stdout
    assert TOKEN not in done.stdout
    assert {host for (host, authorization) in hub.tokens if authorization} == {"127.0.0.1"}
    assert "localhost" in {host for host, _ in hub.tokens}, "the store was asked"
    assert not [path for path in fetch.output.iterdir() if TOKEN.encode() in path.read_bytes()]


def test_a_revision_that_is_not_there(hub: ModelHub, fetch: Fetch) -> None:
    """As after a repository was rewritten, or a slip in the catalog."""
    fetch.revision = "0" * 40
    done = fetch(*mirror(hub))
    assert done.returncode == 2, done.stdout
    assert f"no such revision of {NAME}: it answers 404 (Invalid rev: {fetch.revision})" in done.stdout
    assert "correct repository and revision in the model's catalog entry" in done.stdout


def test_no_revision_in_the_catalog_yet(hub: ModelHub, fetch: Fetch) -> None:
    """The newest is taken, named and recorded; it stays, whatever the hub has later."""
    fetch.revision = None
    done = fetch(*mirror(hub))
    assert done.returncode == 0, done.stdout
    assert f"the mirror has main at commit {COMMIT}" in done.stdout
    assert f"write revision: {COMMIT} into inference/catalog/{MODEL}.yml" in done.stdout
    assert (fetch.record["requested"], fetch.record["revision"]) == ("main", COMMIT)
    hub.commit = "f" * 40
    asked = len(hub.asked)
    assert fetch(*mirror(hub)).returncode == 0
    assert len(hub.asked) == asked
    assert fetch.record["revision"] == COMMIT


def test_a_mirror_that_lists_names_only(hub: ModelHub, fetch: Fetch) -> None:
    hub.trouble.names_only = True
    done = fetch(*mirror(hub))
    assert done.returncode == 0, done.stdout
    assert set(SHARDS) < set(fetch.record["files"])


def test_too_small_a_disk_is_found_before_the_first_byte(hub: ModelHub, fetch: Fetch) -> None:
    hub.trouble.sizes = {BIG: 10**15}
    done = fetch(*mirror(hub))
    assert done.returncode == 2
    assert re.search(
        rf"The weights need 1000\.00 TB more in {fetch.work}, but only [\d.]+ .B are free there. Remedy: free ",
        done.stdout,
    )
    assert hub.ranges == []


def test_a_disk_that_fills_up_meanwhile(hub: ModelHub, fetch: Fetch) -> None:
    """On a tmpfs of its own, in a mount namespace: a program beside fills it up."""
    cache = fetch.root / "cache"
    cache.mkdir()
    fill, full = fetch.root / "fill", fetch.root / "full"
    script = (
        f"mount -t tmpfs -o size=12m tmpfs {cache} || exit 77\n"
        f"(until [ -e {fill} ]; do sleep 0.05; done; cat /dev/zero > {cache}/other 2> /dev/null; touch {full}) &\n"
        'exec "$@"\n'
    )
    hub.trouble.stall = {BIG: MIB}
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *fetch.argv(*mirror(hub))]
    process = subprocess.Popen(
        command, cwd=REPO, env=fetch.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until(lambda: hub.stalled.is_set() or process.poll() is not None)
    if process.poll() in (1, 77):
        pytest.skip(
            f"no mount namespaces for tests here: {process.communicate()[0]}; kernel.unprivileged_userns_clone=1"
        )
    fill.touch()
    until(full.exists)
    hub.go_on.set()
    text, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 2, text
    assert f"The disk became full, or its quota is used up, while the weights of {MODEL} were written to" in text
    assert "what was fetched is kept" in text


def test_another_model_than_the_catalog_says(hub: ModelHub, fetch: Fetch, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (folder / "model.safetensors").write_bytes(safetensors(100, 3))
    hub.folder = folder
    done = fetch(*mirror(hub))
    assert done.returncode == 2
    assert "of the architecture GPT2LMHeadModel, but the catalog's smollm2-135m is LlamaForCausalLM" in done.stdout


def test_a_damaged_folder_is_mended_by_what_is_missing(hub: ModelHub, fetch: Fetch, model: Path) -> None:
    assert fetch(*mirror(hub)).returncode == 0
    (fetch.output / SHARDS[1]).unlink()
    (fetch.root / "cache" / MODEL / SHARDS[1]).unlink()
    with (fetch.output / BIG).open("r+b") as file:
        file.write(b"\1")
    hub.ranges.clear()
    done = fetch(*mirror(hub), "--verify")
    assert done.returncode == 0, done.stdout
    assert {name for name, _, _ in hub.ranges} == set(SHARDS)
    assert (fetch.output / BIG).read_bytes() == (model / BIG).read_bytes()


def test_verify_names_a_changed_file(hub: ModelHub, fetch: Fetch) -> None:
    assert fetch(*mirror(hub)).returncode == 0
    with (fetch.output / BIG).open("r+b") as file:
        file.write(b"\1")
    done = fetch(*mirror(hub), "--verify")
    assert done.returncode == 2
    assert f"{BIG} in {fetch.output} is not what was fetched" in done.stdout


def test_a_new_revision_fetches_what_has_changed(hub: ModelHub, fetch: Fetch, model: Path, tmp_path: Path) -> None:
    """In a folder of its own, as a deploy names it after the revision."""
    assert fetch(*mirror(hub)).returncode == 0
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in model.glob("*.*"):
        (changed / path.name).write_bytes(path.read_bytes())
    (changed / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "more": 1}')
    hub.folder, hub.commit, fetch.revision = changed, "f" * 40, "f" * 40
    hub.ranges.clear()
    before = (fetch.output / "config.json").read_bytes()
    first, fetch.output = fetch.output, fetch.root / "home" / f"{MODEL}-2"
    done = fetch(*mirror(hub))
    assert done.returncode == 0, done.stdout
    assert {name for name, _, _ in hub.ranges} == {"config.json"}
    assert f"at {COMMIT}: what has not changed since is kept" in done.stdout
    assert (first / "config.json").read_bytes() == before
    assert fetch.record["revision"] == "f" * 40


def test_a_folder_with_a_record(hub: ModelHub, fetch: Fetch, tmp_path: Path) -> None:
    """As a person carries it into a network without hubs."""
    assert fetch(*mirror(hub)).returncode == 0
    carried = Fetch(tmp_path / "there")
    carried.root.mkdir()
    copy = tmp_path / "disk" / MODEL
    copy.mkdir(parents=True)
    for path in fetch.output.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    done = carried("--source=folder", f"--folder={copy.parent}")
    assert done.returncode == 0, done.stdout
    assert (carried.record["source"], carried.record["revision"]) == ("folder", COMMIT)
    again = Fetch(tmp_path / "again")
    again.root.mkdir()
    (copy / BIG).write_bytes((copy / BIG).read_bytes()[:-1])
    done = again("--source=folder", f"--folder={copy}")
    assert done.returncode == 2
    assert f"{BIG} in {copy} is not what its kit-weights.json says" in done.stdout
    assert not again.output.exists()


def test_a_folder_without_a_record(fetch: Fetch, model: Path, tmp_path: Path) -> None:
    done = fetch(f"--folder={model}")
    assert done.returncode == 0, done.stdout
    assert f"weights of {MODEL} from folder: {model}" in done.stdout
    assert "only checked that the files are whole" in done.stdout
    assert not (fetch.output / "modeling_evil.py").exists()
    short = tmp_path / "short"
    short.mkdir()
    for path in model.glob("*.*"):
        (short / path.name).write_bytes(path.read_bytes())
    (short / BIG).write_bytes((model / BIG).read_bytes()[:-1])
    done = fetch(f"--folder={short}", "--source=folder")
    assert done.returncode == 2
    assert f"{BIG} is cut off or no safetensors file: it has 6.3 MB" in done.stdout
    (short / BIG).unlink()
    done = fetch(f"--folder={short}", "--source=folder")
    assert done.returncode == 2
    assert f"names files that the source does not have: {BIG}" in done.stdout


def test_no_folder(fetch: Fetch, tmp_path: Path) -> None:
    done = fetch("--source=folder", f"--folder={tmp_path}")
    assert done.returncode == 2
    assert f"Neither {tmp_path} nor {tmp_path / MODEL} has a model's config.json" in done.stdout
    done = fetch("--source=folder")
    assert done.returncode == 2
    assert "needs inference_weights_folder (--folder)" in done.stdout


def test_auto_says_which_source_it_took(hub: ModelHub, fetch: Fetch, tmp_path: Path) -> None:
    """Neither the mirror nor Hugging Face answer (through a proxy that is not there), ModelScope does."""
    folder = tmp_path / "kimi"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["KimiVLForConditionalGeneration"]}')
    (folder / "model.safetensors").write_bytes(safetensors(100, 3))
    hub.folder = folder
    done = fetch(
        f"--mirror={CLOSED}",
        model="kimi-vl-a3b-instruct",
        https_proxy=CLOSED,
        no_proxy="127.0.0.1",
        MODELSCOPE_ENDPOINT=hub.url,
    )
    assert done.returncode == 0, done.stdout
    tried = re.findall(r"^weights of kimi-vl-a3b-instruct from (\w+):", done.stdout, re.MULTILINE)
    assert tried == ["mirror", "huggingface", "modelscope"]
    assert "the mirror (http://127.0.0.1:9) does not answer: Connection refused; 3 tries in a row" in done.stdout
    assert "Hugging Face (https://huggingface.co) does not answer: the proxy does not let it through" in done.stdout
    assert fetch.record["source"] == "modelscope"


def test_through_a_proxy(hub: ModelHub, fetch: Fetch) -> None:
    """The hub as its own proxy: a name that only the proxy knows."""
    done = fetch("--source=mirror", "--mirror=http://hub.invalid", http_proxy=hub.url, no_proxy="localhost")
    assert done.returncode == 0, done.stdout
    assert any(path.startswith("http://hub.invalid/api/models/") for path in hub.asked)


def test_a_password_in_the_mirrors_address_stays_secret(hub: ModelHub, fetch: Fetch) -> None:
    address = hub.url.replace("//", "//somebody:hidden@")
    done = fetch("--source=mirror", HF_ENDPOINT=address)
    assert done.returncode == 0, done.stdout
    assert any(authorization.startswith("Basic ") for _, authorization in hub.tokens)
    assert "hidden" not in done.stdout + json.dumps(fetch.record)
    done = Fetch(fetch.root / "other")("--source=mirror", HF_ENDPOINT=CLOSED.replace("//", "//somebody:hidden@"))
    assert done.returncode == 2
    assert "hidden" not in done.stdout


def test_a_private_certificate_authority(hub: ModelHub, fetch: Fetch, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"],
            *["-days", "1", "-subj", "/CN=hub", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
            *["-keyout", str(key), "-out", str(certificate)],
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    hub.socket = context.wrap_socket(hub.socket, server_side=True)
    hub.url = hub.url.replace("http:", "https:")
    done = fetch(*mirror(hub))
    assert done.returncode == 2
    assert f"{hub.url} shows a certificate that is not trusted here" in done.stdout
    assert "kit_ca_bundle (SSL_CERT_FILE)" in done.stdout
    done = fetch(*mirror(hub), SSL_CERT_FILE=str(certificate))
    assert done.returncode == 0, done.stdout


def until(true: Any) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
