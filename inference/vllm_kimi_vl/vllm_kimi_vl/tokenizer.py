"""Moonshot's tokenizer: byte pair encoding by tiktoken, with named special tokens after the last rank."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
from transformers import PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# How text is cut before merging: Han runs; words with one leading mark and an English contraction; up to three digits;
# marks; white space. The format's own pattern (Moonshot's tokenization_moonshot.py), in tiktoken's regex dialect.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
SPECIAL_TOKENS = 256
# tiktoken's regex engine gives up on longer texts and longer runs without (or of) white space.
MAX_CHARACTERS = 400_000
MAX_RUN = 25_000


def load_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks from a tiktoken model file: a line each, base64 and decimal.

    Not tiktoken's own loader: that keeps a copy in /tmp by the file's path and would not notice another file there.

    Raises:
        ValueError: the file is damaged.
    """
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        raise ValueError(f"{path} is not a tiktoken model file. Remedy: fetch the model's files again.") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} has gaps or doubles. Remedy: fetch the model's files again.")
    return ranks


def pieces(text: str) -> Iterator[str]:
    """Text in pieces that tiktoken's regex engine can take, cut where Moonshot's tokenizer cuts."""
    for begin in range(0, len(text), MAX_CHARACTERS):
        part = text[begin : begin + MAX_CHARACTERS]
        start = run = 0
        space = part[0].isspace()
        for position, character in enumerate(part):
            run += 1
            if character.isspace() != space:
                space = not space
                run = 1
            elif run > MAX_RUN:
                yield part[start:position]
                start = position
                run = 1
        yield part[start:]


class TikTokenTokenizer(PreTrainedTokenizer):  # the name that the repository's configuration says
    """Kimi-VL's tokenizer on transformers' interface.

    Tokens are shown as transformers shows byte-level tokens: a printable character for each byte. In text, names of
    special tokens become these tokens, as in the published tokenizer.

    Args:
        vocab_file: ``tiktoken.model``; ids 0 to n-1 are its ranks.
        added_tokens_decoder: names of ids n to n+255; the others are called ``<|reserved_token_ID|>``.

    Raises:
        ValueError: the file is damaged, or shorter than the named special tokens expect.
    """

    vocab_files_names = {"vocab_file": "tiktoken.model"}  # noqa: RUF012  # transformers' own declaration
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        bos_token: Any = "[BOS]",
        eos_token: Any = "[EOS]",
        unk_token: Any = "[UNK]",
        pad_token: Any = "[PAD]",
        added_tokens_decoder: dict[int, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        ranks = load_ranks(Path(vocab_file))
        ids = range(len(ranks), len(ranks) + SPECIAL_TOKENS)
        names = {id_: str(token) for id_, token in (added_tokens_decoder or {}).items()}
        if outside := sorted(names.keys() - set(ids)):
            raise ValueError(
                f"{vocab_file} has {len(ranks)} tokens, but special tokens have the ids {outside[0]} to {outside[-1]}. "
                "Remedy: fetch the model's files again."
            )
        special = {names.get(id_, f"<|reserved_token_{id_}|>"): id_ for id_ in ids}
        self.vocab_file = vocab_file
        self.encoding = tiktoken.Encoding("kimi_vl", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        printable = bytes_to_unicode()
        self._tokens = {id_: "".join(map(printable.__getitem__, token)) for token, id_ in ranks.items()}
        self._tokens |= {id_: name for name, id_ in special.items()}
        self._ids = {token: id_ for id_, token in self._tokens.items()}
        self._unknown = special[str(unk_token)]
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            added_tokens_decoder=added_tokens_decoder or {},
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Ids in all, special tokens included."""
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        """Every token's id."""
        return dict(self._ids)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [
            self._tokens[id_] for piece in pieces(text) for id_ in self.encoding.encode(piece, allowed_special="all")
        ]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._unknown)

    def _convert_id_to_token(self, index: int) -> str | None:
        return self._tokens.get(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        # A token that somebody added later is its own text.
        known = (
            self.encoding.decode_single_token_bytes(self._ids[token]) if token in self._ids else token.encode()
            for token in tokens
        )
        return b"".join(known).decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the tiktoken model file into a folder."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory, prefix + self.vocab_files_names["vocab_file"])
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
