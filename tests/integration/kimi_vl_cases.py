# ruff: noqa: RUF001  # punctuation of many languages is what is tested
"""What the Kimi-VL plugin computes beside what the published algorithm says, as JSON; run in the engine's environment.

``python kimi_vl_cases.py MODEL_FOLDER PROMPT...`` prints ``{kind: {case: [ours, reference]}}``, and prompts' lengths.
No reference comes from the plugin: ids come from tiktoken with Moonshot's pattern string as published, and from a naive
merge of pieces that were cut by hand; pixels from Pillow and torchvision, step by step as in the published image
processor; counts of image tokens from vLLM.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiktoken
import vllm_kimi_vl
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torchvision.transforms import functional
from transformers import AutoProcessor, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from vllm.model_executor.models.kimi_vl import KimiVLProcessingInfo
from vllm_kimi_vl.images import KimiVLImageProcessor
from vllm_kimi_vl.reasoning import KimiVLReasoningParser, Splitter

# `pat_str` of Moonshot's tokenization_moonshot.py.
PATTERN = r"""[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""  # noqa: E501
NAMES = {
    "[BOS]": 163584,
    "[EOS]": 163585,
    "<|im_end|>": 163586,
    "<|im_user|>": 163587,
    "<|im_assistant|>": 163588,
    "<|im_system|>": 163594,
    "<|im_middle|>": 163601,
    "<|media_start|>": 163602,
    "<|media_content|>": 163603,
    "<|media_end|>": 163604,
    "<|media_pad|>": 163605,
    "[PAD]": 163839,
    # Of the 256 others only these occur below.
    "[EOT]": 163593,
    "<|reserved_token_163600|>": 163600,
}

# Text, and how the published pattern cuts it. A special token is written as its id.
TEXTS: dict[str, tuple[str, list[str | int]]] = {
    "empty": ("", []),
    "words": ("Hello world", ["Hello", " world"]),
    "camel case": ("HelloWorld iPhone", ["Hello", "World", " i", "Phone"]),
    "capitals": ("NASA and NATO", ["NASA", " and", " NATO"]),
    "contractions": ("I'll they'RE can't", ["I'll", " they'RE", " can't"]),
    "not a contraction": ("rock'n'roll", ["rock", "'n", "'roll"]),
    "digits": ("1234567 12 3", ["123", "456", "7", " ", "12", " ", "3"]),
    "decimals": ("3.14159", ["3", ".", "141", "59"]),
    "digits in words": ("GPT4o", ["GPT", "4", "o"]),
    "other digits": ("٣٤٥٦ ½", ["٣٤٥", "٦", " ", "½"]),
    "Chinese": ("你好，世界。", ["你好", "，", "世界", "。"]),
    "Chinese beside Latin": ("用vLLM部署Kimi模型", ["用", "v", "LLM", "部署", "Kimi", "模型"]),
    "Chinese after a space": ("看 图片", ["看", " ", "图片"]),
    "Chinese with digits": ("2025年11月25日", ["202", "5", "年", "11", "月", "25", "日"]),
    "rare Han": ("𠀀㐀豈", ["𠀀㐀豈"]),
    "Japanese": ("東京タワーへ行く", ["東京", "タワーへ", "行", "く"]),
    "Korean": ("안녕하세요 세계", ["안녕하세요", " 세계"]),
    "Arabic": ("مرحبا بالعالم", ["مرحبا", " بالعالم"]),
    "Hindi": ("नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),
    "combining marks": ("e\u0301le\u0300ve", ["e\u0301le\u0300ve"]),
    "one space": (" ", [" "]),
    "spaces before a word": ("   word", ["  ", " word"]),
    "spaces at the end": ("word   ", ["word", "   "]),
    "spaces before a digit": ("  7", [" ", " ", "7"]),
    "line breaks": ("a\n\nb\r\nc", ["a", "\n\n", "b", "\r\n", "c"]),
    "spaces and line breaks": ("a \n \n  b", ["a", " \n \n", " ", " b"]),
    "tabs": ("\tif x:\n\t\treturn", ["\tif", " x", ":\n", "\t", "\treturn"]),
    "wide spaces": ("a\u3000\u00a0b", ["a", "\u3000", "\u00a0b"]),
    "punctuation": ("Wait... what?!\n\nYes", ["Wait", "...", " what", "?!\n\n", "Yes"]),
    "code": ("f(x)=x**2;", ["f", "(x", ")=", "x", "**", "2", ";"]),
    "address": ("https://a.io/b?c=1", ["https", "://", "a", ".io", "/b", "?c", "=", "1"]),
    "emoji": ("ok 🙂", ["ok", " 🙂"]),
    "emoji beside words": ("a🙂b", ["a", "🙂b"]),
    "joined emoji": ("👩\u200d👩\u200d👧", ["👩\u200d👩\u200d👧"]),
    "flag and skin": ("🇨🇳👍🏽", ["🇨🇳👍🏽"]),
    "emoji with a variation mark": ("❤\ufe0f!", ["❤\ufe0f", "!"]),
    "control characters": ("\x00\x1b[0m", ["\x00\x1b[", "0", "m"]),
    "special token": ("<|im_end|>", [163586]),
    "a turn": ("<|im_user|>user<|im_middle|>Hi<|im_end|>", [163587, "user", 163601, "Hi", 163586]),
    "an image": (
        "<|media_start|>image<|media_content|><|media_pad|><|media_end|>",
        [163602, "image", 163603, 163605, 163604],
    ),
    "special tokens side by side": ("[BOS][EOS][PAD][EOT]", [163584, 163585, 163839, 163593]),
    "reserved token": ("a<|reserved_token_163600|>b", ["a", 163600, "b"]),
    "spaces around a special token": (" <|im_end|> x", [" ", 163586, " x"]),
    "half a special token": ("<|im_end", ["<|", "im", "_end"]),
    "no special token": ("<|im_END|>[bos]", ["<|", "im", "_END", "|>[", "bos", "]"]),
    "reasoning marks": ("◁think▷Hm◁/think▷", ["◁think", "▷Hm", "◁/", "think", "▷"]),
    # Longer runs and texts than the regex engine takes are cut first.
    "a long run": ("a" * 25_010 + " b", ["a" * 25_000, "a" * 10, " b"]),
    "a long white space": ("x" + " " * 26_000 + "y", ["x", " " * 25_000, " " * 999, " y"]),
    "a long text": ("ab " * 140_000, ["ab", *[" ab"] * 133_332, " a", "b", *[" ab"] * 6_666, " "]),
}


def ranks(folder: Path) -> dict[bytes, int]:
    lines = (line.split() for line in (folder / "tiktoken.model").read_text().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def learnt(folder: Path, model: Path) -> Path:
    """The model's tokenizer with other ranks, learnt from the cases below without cutting the text.

    So tokens reach over every place where text should have been cut, and a wrong cut gives other ids.
    """
    printable = {character: byte for byte, character in bytes_to_unicode().items()}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, show_progress=False, initial_alphabet=alphabet)
    bpe.train_from_iterator([text[:300] for text, _ in TEXTS.values()], trainer)
    inorder = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(map(printable.__getitem__, token)) for token, _ in inorder if token not in NAMES]
    tokens += [b"\xff" + number.to_bytes(3, "big") for number in range(163_584 - len(tokens))]  # of no text
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)
    return folder


def merge(piece: bytes, table: dict[bytes, int]) -> list[int]:
    """Byte pair encoding as it is explained to beginners: always merge the pair with the lowest rank."""
    if piece in table:
        return [table[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [(table[a + b], index) for index, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in table]
        if not pairs:
            return [table[part] for part in parts]
        _, index = min(pairs)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


def published_encoding(table: dict[bytes, int]) -> tiktoken.Encoding:
    # Those that no case names.
    others = {f"<|reserved_token_{id_}|>": id_ for id_ in range(163584, 163840) if id_ not in NAMES.values()}
    return tiktoken.Encoding("published", pat_str=PATTERN, mergeable_ranks=table, special_tokens=NAMES | others)


def token_cases(model: Path) -> dict[str, list[Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = learnt(Path(scratch), model)
        tokenizer, table = load(folder), ranks(folder)
    published = published_encoding(table)
    cases: dict[str, list[Any]] = {}
    for name, (text, pieces) in TEXTS.items():
        ours = tokenizer.encode(text, add_special_tokens=False)
        known = {
            piece: merge(piece.encode(), table) for piece in {p for p in pieces if isinstance(p, str) and len(p) < 99}
        }
        by_hand = [
            id_
            for piece in pieces
            for id_ in ([piece] if isinstance(piece, int) else known.get(piece) or published.encode(piece))
        ]
        cases[f"{name}: ids of hand-cut pieces"] = shorter(ours, by_hand)
        if len(text) < 25_000:
            cases[f"{name}: ids by tiktoken"] = [ours, published.encode(text, allowed_special="all")]
        cases[f"{name}: text again"] = shorter(tokenizer.decode(ours), text)
        cases[f"{name}: called"] = shorter(tokenizer(text)["input_ids"], ours)
    generator = random.Random(5)
    alphabet = [*"aZé 9\n\t.'’中。あ한ا🙂\u200d\u0301", *NAMES]
    for number in range(300):
        text = "".join(generator.choices(alphabet, k=generator.randint(1, 40)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        cases[f"random text {number}"] = [
            [ids, tokenizer.decode(ids)],
            [published.encode(text, allowed_special="all"), text],
        ]
    snow = "雪".encode()
    half = [table[bytes([byte])] for byte in snow[:2]]
    cases["a cut character"] = [tokenizer.decode(half), "\ufffd"]
    cases["special tokens left out"] = [
        tokenizer.decode([163587, *published.encode("Hi"), 163586], skip_special_tokens=True),
        "Hi",
    ]
    cases["size"] = [[len(tokenizer), tokenizer.vocab_size, len(tokenizer.get_vocab())], [163840] * 3]
    cases["named ids"] = [
        [
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            tokenizer.convert_tokens_to_ids("<|media_pad|>"),
        ],
        [163584, 163585, 163839, 163605],
    ]
    return cases


def shorter(ours: Any, reference: Any) -> list[Any]:
    """Two long values by their digests, so that a failure can be read."""
    if len(reference) < 1000:
        return [ours, reference]
    return [hashlib.sha256(json.dumps(value).encode()).hexdigest() for value in (ours, reference)]


def load(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


MEAN = STD = [0.5, 0.5, 0.5]
# Width and height: small, odd, whole patches, at the limit, one patch over it, far over it, thin.
SIZES = [
    (280, 224), (1, 1), (14, 14), (28, 28), (27, 29), (29, 27), (100, 57), (640, 481), (896, 896), (910, 896),
    (895, 1023), (1024, 1024), (2001, 1503), (3000, 40), (40, 3000), (7140, 10), (7000, 500),
]  # fmt: skip
MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise on a slope, always the same."""
    noise = np.random.default_rng(width * 10_000 + height).integers(0, 128, (height, width, 4))
    slope = np.add.outer(np.linspace(0, 64, height), np.linspace(0, 63, width))[..., None]
    image = Image.fromarray((noise + slope).astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert(mode)


def published_patches(image: Image.Image, limit: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    """MoonViT's input, step by step as in the published image processor; a ValueError where it raises one."""
    width, height = image.size
    if (width // 14) * (height // 14) > limit:
        scale = math.sqrt(limit / ((width // 14) * (height // 14)))
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    width, height = image.size
    image = functional.pad(image, [0, 0, (28 - width % 28) % 28, (28 - height % 28) % 28])
    width, height = image.size
    if width // 14 >= 512 or height // 14 >= 512:
        raise ValueError("Exceed pos emb")
    tensor = functional.normalize(functional.to_tensor(image.convert("RGB")), MEAN, STD)
    patches = [
        tensor[:, row : row + 14, column : column + 14].numpy()
        for row in range(0, height, 14)
        for column in range(0, width, 14)
    ]
    return np.stack(patches), [height // 14, width // 14]


def image_cases(folder: Path) -> dict[str, list[Any]]:
    cases: dict[str, list[Any]] = {}
    for limit in (4096, 16384):  # of the Instruct and of the 2506 model
        processor = KimiVLImageProcessor(pad_input=True, image_mean=MEAN, image_std=STD, in_token_limit=limit)
        for width, height in SIZES:
            for mode in MODES if width < 100 or (width, height) == (910, 896) else ["RGB"]:
                image = picture(width, height, mode)
                ours = processor(image, return_tensors="pt")
                patches, grid = published_patches(image, limit)
                cases[f"{width} x {height} {mode}, {limit} patches"] = [
                    digest(ours["pixel_values"].numpy(), ours["image_grid_hws"].tolist()),
                    digest(patches, [grid]),
                ]
        several = [picture(280, 224), picture(29, 27)]
        ours = processor(several, return_tensors="pt")
        parts = [published_patches(image, limit) for image in several]
        cases[f"two images, {limit} patches"] = [
            digest(ours["pixel_values"].numpy(), ours["image_grid_hws"].tolist()),
            digest(np.concatenate([part for part, _ in parts]), [grid for _, grid in parts]),
        ]
        for size in [(7141, 10), (10, 7141), (60_000, 28)]:
            cases[f"{size[0]} x {size[1]}, {limit} patches"] = [
                refused(lambda size=size: processor(Image.new("RGB", size))),  # noqa: B023
                refused(lambda size=size: published_patches(Image.new("RGB", size), limit)),  # noqa: B023
            ]
    # As `--mm-processor-kwargs` does it: 16 x 16 patches at most, and what padding adds.
    limited = AutoProcessor.from_pretrained(folder, in_token_limit=256)
    features = limited(text="<|media_pad|>", images=[picture(1000, 1000)], truncation=False, return_tensors="pt")
    _, grid = published_patches(picture(1000, 1000), 256)
    cases["a smaller limit"] = [
        [features["image_grid_hws"].tolist(), features["input_ids"].tolist()],
        [[grid], [[163605] * (grid[0] * grid[1] // 4)]],
    ]
    return cases | count_cases()


def count_cases() -> dict[str, list[Any]]:
    """Our tokens an image against those that vLLM reserves: if they differed, the engine would refuse the image."""
    generator = random.Random(5)
    cases: dict[str, list[Any]] = {}
    for limit in (4096, 16384):
        processor = KimiVLImageProcessor(pad_input=True, in_token_limit=limit)
        info = SimpleNamespace(get_hf_processor=lambda processor=processor: SimpleNamespace(image_processor=processor))
        sizes = [tuple(int(math.exp(generator.uniform(0, math.log(7100)))) for _ in "wh") for _ in range(1000)]
        ours = [math.prod(processor.grid(*size)[2:]) // 4 for size in sizes]
        vllm = [
            KimiVLProcessingInfo.get_num_image_tokens(info, image_width=width, image_height=height)
            for width, height in sizes
        ]
        cases[f"tokens of 1000 sizes, {limit} patches"] = [ours, vllm]
    return cases


def digest(pixels: np.ndarray[Any, Any], grids: list[list[int]]) -> list[Any]:
    """Every bit of the pixels counts."""
    return [grids, list(pixels.shape), str(pixels.dtype), hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()]


def refused(call: Any) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


# Output of the model, its reasoning and its answer.
REASONED: dict[str, tuple[str, str, str]] = {
    "both": ("◁think▷Hm.\n◁/think▷\nYes.", "Hm.\n", "\nYes."),
    "white space first": ("\n ◁think▷Hm◁/think▷Yes", "Hm", "Yes"),
    "no reasoning": ("Yes.", "", "Yes."),
    "no text": ("", "", ""),
    "white space only": (" \n", "", " \n"),
    "unfinished": ("◁think▷Hm", "Hm", ""),
    "unfinished within the mark": ("◁think▷Hm◁/thi", "Hm◁/thi", ""),
    "nothing after it": ("◁think▷Hm◁/think▷", "Hm", ""),
    "empty reasoning": ("◁think▷◁/think▷Yes", "", "Yes"),
    "half a mark": ("◁thin air", "", "◁thin air"),
    "a mark cut off": ("◁thi", "", "◁thi"),
    "a lookalike within": ("◁think▷a ◁/thing b◁ c◁/think▷Yes", "a ◁/thing b◁ c", "Yes"),
    "marks in the answer": ("◁think▷a◁/think▷b ◁think▷c◁/think▷", "a", "b ◁think▷c◁/think▷"),
    "a mark in the middle": ("It writes ◁think▷ first", "", "It writes ◁think▷ first"),
    "an end without begin": ("a◁/think▷b", "", "a◁/think▷b"),
    "begin twice": ("◁think▷◁think▷a◁/think▷b", "◁think▷a", "b"),
    "an end that begins twice": ("◁think▷a◁◁/think▷b", "a◁", "b"),
}


def reasoning_cases(folder: Path) -> dict[str, list[Any]]:
    cases: dict[str, list[Any]] = {}
    tokenizer = load(folder)
    for name, (text, reasoning, answer) in REASONED.items():
        parser = KimiVLReasoningParser(tokenizer)
        cases[f"{name}: at once"] = [list(parser.extract_reasoning(text, None)), [reasoning or None, answer or None]]
        streams = set()
        # Every way to cut the text into three, and character by character.
        cuts = [(text[:a], text[a:b], text[b:]) for b in range(len(text) + 1) for a in range(b + 1)] + [tuple(text)]
        for pieces in cuts:
            splitter = Splitter()
            parts = [splitter.feed(piece) for piece in pieces] + [splitter.finish()]
            streams.add(("".join(part for part, _ in parts), "".join(part for _, part in parts)))
        cases[f"{name}: in pieces"] = [sorted(map(list, streams)), [[reasoning, answer]]]
        if reasoning and answer:
            ids = tokenizer.encode(text.partition("◁/think▷")[0] + "◁/think▷") + tokenizer.encode(answer)
            after = tokenizer.decode(parser.extract_content_ids(ids))
            cases[f"{name}: tokens of the answer"] = [after, text.partition("◁/think▷")[2]]
        whole = tokenizer.encode(text)
        thoughts = text[: text.find("◁/think▷") + 8] if "◁/think▷" in text else text
        counted = len(tokenizer.encode(thoughts)) if reasoning or text.startswith("◁think▷") else 0
        cases[f"{name}: tokens of the reasoning"] = [parser.count_reasoning_tokens(whole), counted]
    parser = KimiVLReasoningParser(tokenizer)
    earlier = "<|im_user|>user<|im_middle|>◁think▷a◁/think▷<|im_end|><|im_assistant|>assistant<|im_middle|>"
    for text, ended in [(earlier, False), (earlier + "◁think▷b", False), (earlier + "◁think▷b◁/think▷", True)]:
        cases[f"ended in {text[len(earlier) :]!r}"] = [parser.is_reasoning_end(tokenizer.encode(text)), ended]
    ids = tokenizer.encode("◁think▷" + "Hm " * 50 + "◁/think▷Yes, a long answer that goes on and on")
    seen = [size for size in range(1, len(ids)) if parser.is_reasoning_end_streaming(ids[:size], ids[size - 1 : size])]
    cases["the token that ends it is seen"] = [seen[0], ids.index(seen and ids[seen[0] - 1], seen[0] - 1) + 1]
    cases["ended with it"] = [tokenizer.decode(ids[: seen[0]])[-8:], "◁/think▷"]
    return cases


def main() -> None:
    folder = Path(sys.argv[1])
    vllm_kimi_vl.register()
    published = published_encoding(ranks(folder))
    cases: dict[str, Any] = {
        "tokens": token_cases(folder),
        "images": image_cases(folder),
        "reasoning": reasoning_cases(folder),
        "lengths": {prompt: len(published.encode(prompt, allowed_special="all")) for prompt in sys.argv[2:]},
    }
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
