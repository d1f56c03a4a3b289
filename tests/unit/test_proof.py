"""What the engine says of itself is held against what it was told; a silent fallback is a failure with its reason.

The lines of GPU engines are made from the format strings in the sources of vLLM 0.33; the CPU's are a real start's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference import catalog, causes, proof
from inference.problem import Problem

KIMI = catalog.load("kimi-vl-a3b-instruct")
TINY = catalog.load("tiny-kimi-vl")
SMALL = catalog.load("smollm2-135m")
CPU_START = (Path(__file__).with_name("engine_logs") / "cpu-start.txt").read_text()
ARGV = (
    "python -m inference.vllm_cli serve /w --dtype=float16 --tensor-parallel-size=1 --max-model-len=131072 "
    "--gpu-memory-utilization=0.93 --enable-prefix-caching --attention-backend=FLASH_ATTN_MLA "
    "--attention-config.mla_prefill_backend=FLASH_ATTN --mm-encoder-attn-backend=FLASH_ATTN --moe-backend=triton "
    '\'--limit-mm-per-prompt={"image": 8, "video": 0}\''
)
GPU_LOG = f"""\
{causes.START}kimi-vl-a3b-instruct: {ARGV}
(EngineCore pid=7) INFO [core.py:140] Initializing a V1 LLM engine (v0.33.0) with config: model='/w', \
dtype=torch.float16, max_seq_len=131072, tensor_parallel_size=1, pipeline_parallel_size=1, device_config=cuda, x=1
(EngineCore pid=7) INFO [cuda.py:512] Using AttentionBackendEnum.FLASH_ATTN_MLA backend.
(EngineCore pid=7) INFO [selector.py:123] Using FLASH_ATTN MLA prefill backend.
(EngineCore pid=7) INFO [cuda.py:601] Using backend AttentionBackendEnum.FLASH_ATTN for vit attention
(EngineCore pid=7) INFO [unquantized.py:294] Using TRITON Unquantized MoE backend out of potential backends: ['TRITON'].
(EngineCore pid=7) INFO [gpu_model_runner.py:5089] Model loading took 30.62 GiB memory and 61.2 seconds
(EngineCore pid=7) INFO [gpu_worker.py:773] Available KV cache memory: 39.81 GiB
(EngineCore pid=7) INFO [kv_cache_utils.py:1148] GPU KV cache size: 1,374,288 tokens, Maximum concurrency for 131,072 \
tokens per request: 10.48x
(EngineCore pid=7) INFO [gpu_model_runner.py:6519] Graph capturing finished in 9 secs, took 0.61 GiB
"""
METRICS = (
    'vllm:cache_config_info{block_size="64",cache_dtype="auto",enable_prefix_caching="True",engine="0",'
    'gpu_memory_utilization="0.93",num_gpu_blocks="21473"} 1.0\n'
)


def test_a_gpu_engine_as_planned() -> None:
    found = proof.from_log(KIMI, GPU_LOG)
    assert found.failures == []
    assert found.lines == [
        "engine: vLLM 0.33.0 on cuda",
        "data type: float16",
        "context: 131072",
        "tensor parallel: 1",
        "attention: FLASH_ATTN_MLA",
        "MLA prefill: FLASH_ATTN",
        "vision attention: FLASH_ATTN",
        "experts: triton",
        "GiB on each GPU: weights 30.62, KV cache 39.81, CUDA graphs 0.61",
    ]


@pytest.mark.parametrize(
    ("said", "instead", "failure"),
    [
        ("dtype=torch.float16", "dtype=torch.bfloat16", "data type is bfloat16, asked for was float16"),
        ("max_seq_len=131072", "max_seq_len=8192", "context is 8192, asked for was 131072"),
        (
            "Using AttentionBackendEnum.FLASH_ATTN_MLA backend.",
            "Using TRITON_MLA attention backend out of potential backends: ['TRITON_MLA'].",
            "attention is TRITON_MLA, asked for was FLASH_ATTN_MLA",
        ),
        ("Using FLASH_ATTN MLA prefill", "Using TRTLLM_RAGGED MLA prefill", "MLA prefill is TRTLLM_RAGGED"),
        (
            "Using backend AttentionBackendEnum.FLASH_ATTN for vit",
            "Using backend AttentionBackendEnum.TORCH_SDPA for vit",
            "vision attention is TORCH_SDPA, asked for was FLASH_ATTN",
        ),
        ("Using TRITON Unq", "Using FlashInfer CUTLASS Unq", "experts is flashinfer cutlass, asked for was triton"),
        ("Using FLASH_ATTN MLA prefill backend.", "", "MLA prefill is not in the log"),
    ],
)
def test_a_silent_fallback_fails(said: str, instead: str, failure: str) -> None:
    assert said in GPU_LOG
    found = proof.from_log(KIMI, GPU_LOG.replace(said, instead))
    assert any(line.startswith(failure) for line in found.failures), found.failures


def test_the_engines_own_reason_is_told() -> None:
    log = GPU_LOG.replace("dtype=torch.float16", "dtype=torch.float32")
    reason = "WARNING [fa_utils.py:124] Cannot use FA version 3 on Blackwell platform, defaulting to FA version 4"
    found = proof.from_log(KIMI, f"{log}{reason}\n")
    assert any("Cannot use FA version 3" in line for line in found.failures)


def test_flash_attention_names_its_version() -> None:
    log = GPU_LOG.replace("FLASH_ATTN_MLA", "FLASH_ATTN")
    assert any("no version of FlashAttention" in line for line in proof.from_log(SMALL, log).failures)
    log += "(EngineCore pid=7) INFO [flash_attn.py:1122] Using FlashAttention version 2\n"
    assert "FlashAttention: version 2" in proof.from_log(SMALL, log).lines


def test_only_the_last_start_counts(tmp_path: Path) -> None:
    log = tmp_path / "inference.log"
    log.write_text(GPU_LOG.replace("dtype=torch.float16", "dtype=torch.bfloat16") + GPU_LOG)
    assert proof.from_log(KIMI, proof.read_log(log)).failures == []


def test_a_rotated_log_is_read_from_its_beginning(tmp_path: Path) -> None:
    log, half = tmp_path / "inference.log", len(GPU_LOG) // 2
    (tmp_path / "inference.log.2").write_text(GPU_LOG.replace("dtype=torch.float16", "dtype=torch.bfloat16"))
    (tmp_path / "inference.log.1").write_text(GPU_LOG[:half])
    log.write_text(GPU_LOG[half:])
    assert proof.from_log(KIMI, proof.read_log(log)).failures == []
    (tmp_path / "inference.log.1").unlink()
    assert proof.read_log(log) == ""
    [line] = proof.check(KIMI, "http://127.0.0.1:9/v1", log, numbers=False)
    assert "make restart SERVICE=inference" in line


def test_a_cpu_engine() -> None:
    start = f"{causes.START}smollm2-135m: x --dtype=bfloat16 --max-model-len 8192\n"
    found = proof.from_log(SMALL, start + CPU_START)
    assert found.failures == []
    assert "engine: vLLM 0.32.0 on cpu" in found.lines
    start = start.replace("--max", "--attention-backend=CPU_MLA --max")
    mla = proof.from_log(TINY, start + CPU_START)
    assert mla.failures == ["attention is not in the log, asked for was CPU_MLA"]
    assert "attention: CPU_MLA" in proof.from_log(TINY, f"{start}{CPU_START}INFO Using CPU_MLA backend.\n").lines
    other = proof.from_log(TINY, f"{start}{CPU_START}INFO Using AMX_MLA backend.\n")
    assert other.failures == ["attention is AMX_MLA, asked for was CPU_MLA"]


def test_metrics() -> None:
    found = proof.from_metrics(GPU_LOG, METRICS)
    assert found.failures == []
    assert found.lines[0] == "KV cache: 1374272 tokens, 10.5 conversations of 131072"
    assert "GPU memory share: 0.93" in found.lines


@pytest.mark.parametrize(
    ("said", "instead", "failure"),
    [
        ('num_gpu_blocks="21473"', 'num_gpu_blocks="100"', "KV cache has 6400 tokens, a conversation may have 131072"),
        ('num_gpu_blocks="21473"', 'num_gpu_blocks="None"', "does not say how large"),
        ('utilization="0.93"', 'utilization="0.9"', "GPU memory share is 0.9, asked for was 0.93"),
        ('prefix_caching="True"', 'prefix_caching="False"', "prefix caching is False"),
        ("vllm:cache_config_info", "vllm:other", "has no vllm:cache_config_info"),
    ],
)
def test_metrics_that_contradict(said: str, instead: str, failure: str) -> None:
    found = proof.from_metrics(GPU_LOG, METRICS.replace(said, instead))
    assert any(failure in line for line in found.failures), found.failures


def test_the_engines_own_memory_report() -> None:
    assert proof.memory(GPU_LOG) == {"weights": 30.62, "kv": 39.81, "kv_tokens": 1374288.0, "graphs": 0.61}


def answered(text: str, tokens: list[str] | None = None, logprob: float = -0.5) -> dict[str, Any]:
    words = tokens if tokens is not None else text.split()
    content = [{"token": word, "logprob": logprob} for word in words]
    return {
        "choices": [{"message": {"content": text}, "logprobs": {"content": content}}],
        "usage": {"completion_tokens": len(words)},
    }


def test_numbers_in_range() -> None:
    asked: list[dict[str, Any]] = []

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        return answered("The capital of France is Paris .")

    found = proof.calculates(KIMI, ask)
    assert found.failures == []
    assert found.lines == ["numbers: in range in 5 fixed prompts"]
    assert sum("image_url" in str(body["messages"]) for body in asked) == 1
    assert not any("image_url" in str(content) for content in proof.prompts(SMALL).values())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (answered("!!!!!!!!!!!!!!!!"), "as when numbers overflow"),
        (answered("a b c", logprob=float("nan")), "no number"),
        (answered("", []), "empty"),
        (answered("!!!", ["!", "!", "!"]), "3 times '!'"),
    ],
)
def test_overflow(answer: dict[str, Any], said: str) -> None:
    found = proof.calculates(SMALL, lambda body: answer)
    assert len(found.failures) == 4
    assert all(said in failure for failure in found.failures), found.failures


def test_an_answer_that_cannot_be_written_as_json_is_a_failure() -> None:
    def ask(body: dict[str, Any]) -> Any:
        raise Problem("said 500: Out of range float values are not JSON compliant")

    assert "no number" in proof.calculates(SMALL, ask).failures[0]


def test_an_engine_that_is_gone_is_no_overflow() -> None:
    def ask(body: dict[str, Any]) -> Any:
        raise Problem("said 500: EngineCore encountered an issue")

    with pytest.raises(Problem, match="EngineCore"):
        proof.calculates(SMALL, ask)


def test_words_of_a_model_without_meaning_are_in_range() -> None:
    assert proof.calculates(TINY, lambda body: answered("zq! !! x 好 zz")).failures == []
