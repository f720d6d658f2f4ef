"""Tokenizers behind one small protocol: bytes, characters, and anything transformers loads."""

import json
import pathlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int
from transformers import AutoTokenizer, PreTrainedTokenizerFast

Ids = Sequence[int] | Int[np.ndarray, "_"]

# End-of-text names of published vocabularies, for files that do not say which one they use.
END_NAMES = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|eot_id|>",
    "<eos>",
)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Ids are 0 .. vocab_size-1; some may be unused."""

    pad_id: int  # fills rows; never recognised by its id, so it may equal an end-of-text id
    eos_ids: tuple[int, ...]  # the first one is written after training texts
    bos_id: int | None
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; adds no special ids."""

    def decode(self, ids: Ids) -> str:
        """The text of `ids`; special and unknown ids are dropped."""

    def token_texts(self) -> list[str | None]:
        """What each id alone decodes to; None for special and unused ids."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, end-of-text 256, padding 257."""

    pad_id = 257
    eos_ids = (256,)
    bos_id = None
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_texts(self) -> list[str | None]:
        return [bytes([i]).decode("utf-8", errors="replace") for i in range(256)] + [None, None]


class CharTokenizer:
    """One id per character of a small alphabet: padding 0, end-of-text 1, then the characters."""

    pad_id = 0
    eos_ids = (1,)
    bos_id = None

    def __init__(self, alphabet: str):
        if len(set(alphabet)) != len(alphabet) or not alphabet:
            raise ValueError(f"alphabet {alphabet!r} must hold each character exactly once")
        self.alphabet = alphabet
        self.vocab_size = len(alphabet) + 2
        self._ids = {character: i + 2 for i, character in enumerate(alphabet)}

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - set(self._ids))
        if unknown:
            raise ValueError(f"characters {unknown} of {text!r} are not in {self.alphabet!r}")
        return [self._ids[character] for character in text]

    def decode(self, ids: Ids) -> str:
        return "".join(self.alphabet[i - 2] for i in ids if 2 <= i < self.vocab_size)

    def token_texts(self) -> list[str | None]:
        return [None, None, *self.alphabet]


class HFTokenizer:
    """A Hugging Face fast tokenizer.

    Args:
        backend: the Rust tokenizer; truncation and padding set in its file are switched off.
        eos_ids: end-of-text ids; the first one is written after training texts.
        pad_id: padding; None takes the first end-of-text id.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: tuple[int, ...],
        pad_id: int | None = None,
        bos_id: int | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_ids = eos_ids
        self.pad_id = eos_ids[0] if pad_id is None else pad_id
        self.bos_id = bos_id
        # Not get_vocab_size(): added ids may leave holes below them.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Ids) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_texts(self) -> list[str | None]:
        ids = [[i] for i in range(self.vocab_size)]
        return [text or None for text in self._backend.decode_batch(ids, skip_special_tokens=True)]


def load_tokenizer(name: str) -> Tokenizer:
    """ "byte", "chars:<alphabet>", a Hugging Face folder, or the path of a tokenizer.json.

    In an alphabet the two characters ``\\n`` stand for a line break, so that it can be written on
    a command line.

    Raises:
        ValueError: nothing of that name, or no end-of-text token is known.
    """
    if name == "byte":
        return ByteTokenizer()
    if name.startswith("chars:"):
        return CharTokenizer(name.removeprefix("chars:").replace("\\n", "\n"))
    path = pathlib.Path(name)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _wrap(PreTrainedTokenizerFast(tokenizer_file=str(path)), path, ())
    raise ValueError(
        f"tokenizer {name!r} is neither 'byte', 'chars:<alphabet>', a folder nor a tokenizer.json"
    )


def _from_folder(folder: pathlib.Path) -> HFTokenizer:
    eos_ids: tuple[int, ...] = ()
    generation = folder / "generation_config.json"
    if generation.is_file():  # chat models end on more ids than the tokenizer names
        named = json.loads(generation.read_text("utf-8")).get("eos_token_id")
        eos_ids = tuple(named) if isinstance(named, list) else () if named is None else (named,)
    bare = folder / "tokenizer.json"
    if bare.is_file() and not (folder / "tokenizer_config.json").is_file():
        return _wrap(PreTrainedTokenizerFast(tokenizer_file=str(bare)), folder, eos_ids)
    return _wrap(AutoTokenizer.from_pretrained(str(folder)), folder, eos_ids)


def _wrap(
    loaded: PreTrainedTokenizerFast, path: pathlib.Path, eos_ids: tuple[int, ...]
) -> HFTokenizer:
    backend = loaded.backend_tokenizer
    if loaded.eos_token_id is not None:
        eos_ids = tuple(dict.fromkeys((loaded.eos_token_id, *eos_ids)))
    if not eos_ids:
        known = (backend.token_to_id(name) for name in END_NAMES)
        eos_ids = tuple(i for i in known if i is not None)[:1]
    if not eos_ids:
        raise ValueError(
            f"{path} names no end-of-text token and has none of {END_NAMES}; "
            'put a tokenizer_config.json with "eos_token" beside tokenizer.json and load the folder'
        )
    return HFTokenizer(
        backend, eos_ids=eos_ids, pad_id=loaded.pad_token_id, bos_id=loaded.bos_token_id
    )
