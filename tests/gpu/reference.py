"""What a GPU calculated, against the same model in float32 by somebody else's code: transformers' DeepSeek-V3.

    VENV/bin/python tests/gpu/reference.py WEIGHTS ANSWERS.json

runs in an engine's environment. WEIGHTS is the tiny Kimi-VL's folder. ANSWERS has for each text question its 'question'
and the 'tokens' of the greedy answer with their logarithmic probabilities. Each token is predicted from the question
and the answer's tokens before it. Ends with 1 where the GPU chose another token, or its probability is too far off.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

# An H100 with float16 and FlashAttention was 0.018 off at the most; transformers itself with bfloat16 is 0.13 off.
LOGPROB_WITHIN = 0.05


def language_model(weights: Path) -> Any:
    """The language model of a Kimi-VL, alone and in float32."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    prefix = "language_model."
    with tempfile.TemporaryDirectory() as folder:
        own = {
            name.removeprefix(prefix): tensor
            for file in weights.glob("*.safetensors")
            for name, tensor in load_file(file).items()
            if name.startswith(prefix)
        }
        save_file(own, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        config = json.loads((weights / "config.json").read_text())["text_config"]
        Path(folder, "config.json").write_text(json.dumps(config | {"architectures": ["DeepseekV3ForCausalLM"]}))
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    if any(loaded.values()):
        raise ValueError(f"{weights} is not all of a DeepSeek-V3: {loaded}")
    return model


def main(weights: Path, answers: Path) -> int:
    """0 when all is close enough; prints a line a question."""
    import torch
    import vllm_kimi_vl
    from vllm_kimi_vl.tokenizer import TikTokenTokenizer

    template = Path(vllm_kimi_vl.__file__).with_name("chat_template.jinja").read_text()
    model, tokenizer = language_model(weights), TikTokenTokenizer.from_pretrained(weights)
    failed = False
    for name, answer in json.loads(answers.read_text()).items():
        messages = [{"role": "user", "content": answer["question"]}]
        question = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        ids = [tokenizer.encode(token, add_special_tokens=False) for token, _ in answer["tokens"]]
        if any(len(each) != 1 for each in ids):
            raise ValueError(f"the answer to {name} is not made of tokens: {answer['tokens']}")
        chosen = torch.tensor([each[0] for each in ids])
        with torch.no_grad():
            logits = model(torch.tensor([[*question, *chosen.tolist()]])).logits[0, len(question) - 1 : -1]
        found = torch.log_softmax(logits.float(), -1)
        best = int((found.argmax(-1) == chosen).sum())
        said = torch.tensor([logprob for _, logprob in answer["tokens"]])
        off = (found.gather(1, chosen[:, None])[:, 0] - said).abs().max().item()
        print(f"{name}: {best} of {len(chosen)} tokens the same, log probabilities at most {off:.3f} off")
        failed |= best < len(chosen) or not off <= LOGPROB_WITHIN  # NaN is never close
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
