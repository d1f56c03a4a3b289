"""Why the engine died, named from its log.

Each entry's words are vLLM's own (0.32, 0.33), PyTorch's or Python's; tests/unit/engine_logs has excerpts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from inference.hardware import MORE_SHM

# What `serve` prints before it becomes the engine: where a start begins in a log of many.
START = "kit: starting "


@dataclass(frozen=True)
class Cause:
    """A named cause: ``what`` happened and the ``remedy``; ``{name}`` in them is a group of ``pattern``."""

    pattern: str
    what: str
    remedy: str


# The first that fits is the cause: what comes first explains what comes later.
CAUSES = (
    Cause(
        r"[Aa]ddress already in use",
        "another program holds the engine's port",
        "`ss -ltnp` shows which: stop that one, or set inference_port (kit_port_base)",
    ),
    Cause(
        r"serve at least one request with the model's max seq len \((?P<length>\d+)\), \((?P<needed>[\d.]+) GiB KV "
        r"cache is needed.*?available KV cache memory \((?P<there>[\d.]+) GiB\)"
        r"(?:.*?maximum model length is (?P<fits>\d+))?",
        "a conversation of {length} tokens needs {needed} GiB of KV cache, and there are {there} GiB",
        "inference_max_model_len: {fits} or less, or more memory (without a GPU: inference_kv_cache_gib)",
    ),
    Cause(
        r"No available memory for the cache blocks",
        "the weights and one step's work leave no memory for the KV cache",
        "a smaller inference_max_num_seqs, fewer images a question, more GPUs or a smaller model; see `make plan`",
    ),
    Cause(
        r"Free memory on device(?: \S+)? \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is "
        r"less than desired GPU memory utilization \((?P<share>[\d.]+), (?P<wanted>[\d.]+) GiB\)",
        "the engine is to take {wanted} GiB, and only {free} of the GPU's {total} are free: something else uses it",
        "`nvidia-smi` shows which process: stop it, or lower inference_gpu_memory_utilization (now {share})",
    ),
    Cause(
        r"(?:torch\.OutOfMemoryError|CUDA out of memory)[^\n]*?Tried to allocate (?P<wanted>[\d.]+ \w+)",
        "the GPU ran out of memory when the engine asked for {wanted} more",
        "a smaller inference_max_num_seqs or inference_max_model_len, fewer images a question, or a lower "
        "inference_gpu_memory_utilization, which leaves more beside the KV cache",
    ),
    Cause(
        r"torch\.OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPU ran out of memory",
        "a smaller inference_max_num_seqs or inference_max_model_len, or a lower inference_gpu_memory_utilization",
    ),
    Cause(
        r"Available memory on node (?P<node>\S+) \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on kv cache "
        r"allocation is less than requested memory for kv \((?P<wanted>[\d.]+)",
        "the KV cache is to have {wanted} GiB, and only {free} of the host's {total} GiB are free",
        "a smaller inference_kv_cache_gib, or stop other programs",
    ),
    Cause(
        r"Available memory on node (?P<node>\S+) \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is "
        r"less than desired CPU",
        "only {free} of the host's {total} GiB of memory are free",
        "stop other programs, or set inference_kv_cache_gib",
    ),
    Cause(
        r"Insufficient space in /dev/shm for [^:\n]*: (?P<needed>\d+) MiB required, (?P<free>\d+) MiB free",
        "the engine's processes need {needed} MiB of /dev/shm, and {free} MiB are free",
        MORE_SHM,
    ),
    Cause(
        # "None" is vLLM's haste: it looks before the system has noted the signal. An error of its own stands before it.
        r"[Ww]orker proc \S+ died unexpectedly \(exit code: (?:None|-9|137)\)|Failed core proc\(s\): \{[^}]*: -9",
        "one of the engine's processes was killed (signal 9), as the kernel does when the host's memory is short",
        "`dmesg | grep -i 'killed process'` tells for sure; then more memory or a smaller inference_kv_cache_gib",
    ),
    Cause(
        r"RPC call to (?P<step>execute_model|sample_tokens) timed out",
        "a step of the model was not done in the five minutes after which vLLM gives up",
        "without a GPU, leave the engine more of the host's processors (`top` shows what takes them); with one, "
        "`dmesg | grep -i xid` tells whether it hangs",
    ),
    Cause(
        r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|MemoryError\b",
        "the host ran out of memory",
        "more memory, a smaller inference_kv_cache_gib, or fewer other programs",
    ),
    Cause(
        r"No space left on device",
        "a disk is full",
        "`df -h` shows which: make room, then `make deploy`",
    ),
    Cause(
        r"safetensors_rust\.SafetensorError|SafetensorError: .*|Error while deserializing header|incomplete metadata",
        "a file of weights is damaged",
        "remove the model's folder below ~/dify-kit/inference/models and run `make deploy`, which fetches it again",
    ),
    Cause(
        r"Cannot find any model weights|There are no weights in|no safetensors|FileNotFoundError[^\n]*safetensors",
        "files of weights are missing",
        "remove the model's folder below ~/dify-kit/inference/models and run `make deploy`, which fetches it again",
    ),
    Cause(
        r"weights were not initialized from checkpoint|There is no module or parameter named|size mismatch|"
        r"Attempted to load weight|The size of tensor a \(\d+\) must match|"
        r"assert param(?:_data)?\.(?:shape|size\(\)) == loaded_weight\.",
        "the weights are another model's than config.json describes",
        "remove the model's folder below ~/dify-kit/inference/models and run `make deploy`, which fetches it again",
    ),
    Cause(
        r"Model architectures \[(?P<names>[^\]]*)\] (?:are not supported|failed to be inspected)",
        "this engine doesn't have the model's architecture ({names})",
        "the engine's version that has it, as `engines` of the model's catalog entry, or another model",
    ),
    Cause(
        r"User-specified max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len "
        r"\([^)]*?=(?P<most>\d+)",
        "inference_max_model_len is {asked}, and the model was trained for {most} tokens",
        "{most} or less, or 0 for all of them",
    ),
    Cause(
        r"Selected (?:MLA prefill )?backend (?:\w+\.)?(?P<name>\w+) is not valid for this "
        r"configuration\. Reason: (?P<why>[^\n]*)",
        "the attention backend {name} cannot be had here: {why}",
        "report it with the log and what `nvidia-smi` says; until it is mended, inference_arguments: "
        "[--attention-backend=TRITON_ATTN] (TRITON_MLA for a model with MLA)",
    ),
    Cause(
        r"Bfloat16 is only supported on GPUs with compute capability",
        "the GPU has no bfloat16",
        "inference_dtype: float16, where the model allows it",
    ),
    Cause(
        r"CUDA driver version is insufficient|driver (?:on your system )?is too old|forward compatibility was attemp",
        "the NVIDIA driver is older than the engine's CUDA",
        "update the driver to 580 or newer and reboot",
    ),
    Cause(
        r"no kernel image is available for execution",
        "the engine's packages have no kernels for this GPU",
        "a GPU of compute capability 7.5 or newer",
    ),
    Cause(
        r"Failed to find C compiler|gcc: (?:command )?not found",
        "Triton found no C compiler, with which it builds its kernels' launchers",
        "install gcc or clang on the host",
    ),
    Cause(
        r"fatal error: Python\.h: No such file",
        "Triton found no headers of Python, with which it builds its kernels' launchers",
        "an interpreter with its headers: runtime_python of the kit's own download, or the package python3.12-dev",
    ),
    Cause(
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError",
        "the GPUs cannot speak to each other (NCCL)",
        "`nvidia-smi topo -m` shows how they are connected; /dev/shm must have 1 GiB or more free",
    ),
    Cause(
        r"Failed to import from vllm\._\w+\b[^\n]*?(?P<name>lib[^\s':]+\.so[.\d]*): cannot open shared object file",
        "the host lacks the library {name}, which the engine's compiled part needs",
        "let an administrator install the package that has it: `apt-file search` or `dnf provides` tells its name, and "
        "libnuma.so.1 is in libnuma1 (Debian, Ubuntu) or numactl-libs (Fedora, Rocky)",
    ),
    Cause(
        r"VLLM_API_KEY is empty",
        "the service was started without its key",
        "`make deploy`, which writes etc/env/inference.env",
    ),
    Cause(
        r"No module named '(?P<name>[^']+)'",
        "the engine's environment lacks {name}",
        "remove the venv-* folder below ~/dify-kit/inference and run `make deploy`",
    ),
)


def last_start(log: str) -> str:
    """What the engine has written since it was started last; all of it where the beginning is gone."""
    begin = log.rfind(START)
    return log[begin:] if begin >= 0 else log


def explain(log: str) -> tuple[str, str] | None:
    """What the log of starts that failed says, and the remedy; None where it says nothing that is known.

    Supervisor may have begun the next start already, which says nothing yet: the newest that does counts.
    """
    for start in reversed(log.split(START)):
        found = []
        for cause in CAUSES:
            if match := re.search(cause.pattern, start):
                found.append((match.start(), cause, match))
        if found:
            _, cause, match = min(found, key=lambda item: item[0])
            words = {name: value or "less" for name, value in match.groupdict().items()}
            return cause.what.format_map(words), cause.remedy.format_map(words)
    return None
