"""Published tokenizers: whatever transformers loads from a folder, a file, or the hub."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_jax.text.chat_template import ChatTemplate, read_template, render_chat
from rlhf_jax.text.hub import local_folder

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
# One of these is there wherever a tokenizer is.
_KINDS = ("tokenizer*.json", "*.model", "vocab.*", "*.tiktoken", "merges.txt")
_PROBE = "ypsilon"  # an answer to find in what a template writes


class _Fast:
    """A tokenizer with a Rust backend, as nearly all have; its file's own truncation and padding
    are switched off."""

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    def ids(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, rows: list[list[int]]) -> list[str]:
        return self._backend.decode_batch(rows, skip_special_tokens=True)


class _Slow:
    """A tokenizer without a Rust backend (some SentencePiece and older ones)."""

    def __init__(self, loaded: PreTrainedTokenizerBase):
        self._loaded = loaded

    def ids(self) -> dict[str, int]:
        return self._loaded.get_vocab()

    def encode(self, text: str) -> list[int]:
        return self._loaded.encode(text, add_special_tokens=False)

    def decode(self, rows: list[list[int]]) -> list[str]:
        values = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [self._loaded.decode(row, **values) for row in rows]


class HFTokenizer:
    """A Hugging Face tokenizer.

    Args:
        backend: what encodes and decodes.
        eos_ids: end-of-text ids; the first one is written after training texts.
        pad_id: padding; None takes the first end-of-text id.
        rows: how many ids its model knows; special tokens above them are refused in texts.
        bos_id, expects_bos, starts, chat, name: see `Tokenizer`.
    """

    def __init__(
        self,
        backend: _Fast | _Slow,
        *,
        eos_ids: tuple[int, ...],
        pad_id: int | None,
        bos_id: int | None,
        expects_bos: bool,
        starts: tuple[int, ...],
        chat: ChatTemplate | None,
        name: str,
        rows: int | None,
    ):
        self._backend = backend
        self.name = name
        self.eos_ids = eos_ids
        self.pad_id = eos_ids[0] if pad_id is None else pad_id
        self.bos_id = bos_id
        self.expects_bos = expects_bos
        self.starts = starts
        self.chat = chat
        # Not the number of tokens: added ids may leave holes below them.
        self._above = {i: t for t, i in backend.ids().items() if rows is not None and i >= rows}
        self.vocab_size = max(i for i in backend.ids().values() if i not in self._above) + 1

    def encode(self, text: str) -> list[int]:
        ids = self._backend.encode(text)
        unknown = [i for i in ids if i in self._above] if self._above else []
        if unknown:
            raise ValueError(
                f"the text holds {self._above[unknown[0]]!r}, token {unknown[0]} of {self.name}, "
                f"whose model knows ids below {self.vocab_size} only; leave it out"
            )
        return ids

    def decode(self, ids: Ids) -> str:
        return self._backend.decode([[int(i) for i in ids if i < self.vocab_size]])[0]

    def token_texts(self) -> list[str | None]:
        return [
            text or None for text in self._backend.decode([[i] for i in range(self.vocab_size)])
        ]


def load_published(name: str, *, chat_template: str | None, bos: bool | None) -> HFTokenizer:
    """The tokenizer of a folder, a tokenizer.json, or a model on the hub; see `load_tokenizer`."""
    path = pathlib.Path(local_folder(name, f"tokenizer {name!r}", weights=False))
    if path.is_dir():
        loaded, eos_ids = _from_folder(path), _generation_ends(path)
    elif path.is_file():
        loaded, eos_ids = PreTrainedTokenizerFast(tokenizer_file=str(path)), ()
    else:
        raise ValueError(
            f"tokenizer {name!r} is neither 'byte', 'chars:<alphabet>', a folder nor a "
            "tokenizer.json, nor the name of a model on the Hugging Face hub, such as 'org/name'"
        )
    names = {k: v for k, v in loaded.special_tokens_map.items() if isinstance(v, str)}
    chat = _own_template(loaded, name, names)
    if chat_template is not None:
        chat = read_template(chat_template, names)
    eos_ids = _ends(loaded, path, eos_ids, chat, given=chat_template is not None)
    bos_id, before = _beginning(loaded)
    if bos and bos_id is None:
        raise ValueError(f"bos is set, but tokenizer {name!r} names no beginning-of-text token")
    values: dict[str, Any] = dict(
        eos_ids=eos_ids,
        pad_id=loaded.pad_token_id,
        bos_id=bos_id,
        expects_bos=bool(before) and bos is None,
        starts=(before or (bos_id,)) if bos else (),
        chat=chat,
        name=name,
    )
    fast = isinstance(loaded, PreTrainedTokenizerFast)
    backend = _Fast(loaded.backend_tokenizer) if fast else _Slow(loaded)
    used = {*eos_ids, *values["starts"], *(before or ()), loaded.pad_token_id, bos_id}
    return HFTokenizer(backend, **values, rows=_rows(path, loaded, chat, used))


def _from_folder(folder: pathlib.Path) -> PreTrainedTokenizerBase:
    if not any(any(folder.glob(kind)) for kind in _KINDS):
        raise ValueError(f"{folder} holds no tokenizer, such as a tokenizer.json")
    bare = folder / "tokenizer.json"
    if bare.is_file() and not (folder / "tokenizer_config.json").is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(bare))
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        said = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"{folder}: transformers loads no tokenizer from it ({type(error).__name__}: {said}); "
            "wanted a tokenizer.json, or other files with a tokenizer_config.json that names their "
            'class (those of SentencePiece need "pip install sentencepiece protobuf")'
        ) from error


def _generation_ends(folder: pathlib.Path) -> tuple[int, ...]:
    """The end-of-text ids of generation_config.json: chat models end on more than one."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        named = json.loads(path.read_text("utf-8")).get("eos_token_id")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    found = tuple(named) if isinstance(named, list) else () if named is None else (named,)
    if not all(isinstance(one, int) and one >= 0 for one in found):
        raise ValueError(f"{path}: eos_token_id is {named!r}; wanted an id or a list of ids")
    return found


def _rows(
    path: pathlib.Path, loaded: PreTrainedTokenizerBase, chat: ChatTemplate | None, used: set
) -> int | None:
    """How many ids the model beside the tokenizer knows, where all above are special tokens that
    plain texts do without; None where there is no model, or it knows all, or lacks others.

    Gemma 3's models for text alone have one such token, which stands for an image.
    """
    config = path / "config.json"
    if not config.is_file():
        return None
    rows = json.loads(config.read_text("utf-8")).get("vocab_size")
    if not isinstance(rows, int):
        return None
    above = {i: token for token, i in loaded.get_vocab().items() if i >= rows}
    special = set(loaded.all_special_tokens) | {
        token.content for token in loaded.added_tokens_decoder.values() if token.special
    }
    needed = any(i in used or token not in special for i, token in above.items())
    written = chat is not None and any(token in chat.text for token in above.values())
    return None if needed or written or not above else rows


def _own_template(
    loaded: PreTrainedTokenizerBase, name: str, names: dict[str, str]
) -> ChatTemplate | None:
    """The chat template of a tokenizer; of several, the one named "default"."""
    found = loaded.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return None if found is None else ChatTemplate(found, names, name)


def _beginning(loaded: PreTrainedTokenizerBase) -> tuple[int | None, tuple[int, ...]]:
    """The beginning-of-text id, and what the tokenizer puts before a text by itself: () if nothing,
    two ids for GLM-4's "[gMASK]<sop>".

    A file that names none may still write one, which then is it.
    """
    whole, bare = loaded.encode("a"), loaded.encode("a", add_special_tokens=False)
    before = tuple(whole[: len(whole) - len(bare)])
    while before and whole[len(before) : len(before) + len(bare)] != bare:
        before = before[:-1]  # something stands behind the text, too
    named = loaded.bos_token_id
    return (before[0] if named is None and before else named), before


def _ends(
    loaded: PreTrainedTokenizerBase,
    path: pathlib.Path,
    eos_ids: tuple[int, ...],
    chat: ChatTemplate | None,
    *,
    given: bool,
) -> tuple[int, ...]:
    """End-of-text ids, each once: the tokenizer's, the generation config's, the end of a turn.

    Args:
        given: the template was asked for, so it must be sound.
    """
    size = max(loaded.get_vocab().values()) + 1
    wrong = [one for one in eos_ids if one >= size]
    if wrong:
        raise ValueError(
            f"{path / 'generation_config.json'}: eos_token_id {wrong[0]} is not in the vocabulary "
            f"of {size} ids; it belongs to another tokenizer"
        )
    own = loaded.eos_token_id
    eos_ids = (*(() if own is None else (own,)), *eos_ids)
    if not eos_ids:
        vocab = loaded.get_vocab()
        eos_ids = tuple(vocab[name] for name in END_NAMES if name in vocab)[:1]
    if chat is not None:
        eos_ids = (*eos_ids, *_end_of_turn(loaded, chat, given))
    if not eos_ids:
        raise ValueError(
            f"{path} names no end-of-text token and has none of {END_NAMES}; "
            'put a tokenizer_config.json with "eos_token" beside tokenizer.json and load the folder'
        )
    return tuple(dict.fromkeys(eos_ids))


def _end_of_turn(
    loaded: PreTrainedTokenizerBase, chat: ChatTemplate, given: bool
) -> tuple[int, ...]:
    """The first added token that a template writes behind an answer; none where it writes none."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
    try:
        behind = render_chat(chat, messages).rpartition(_PROBE)[2]
    except ValueError:
        if given:
            raise
        return ()  # a model's own template may want other messages; plain texts do not need it
    ids = loaded.encode(behind, add_special_tokens=False)
    added = loaded.added_tokens_decoder
    # Some vocabularies add runs of blanks, which end nothing.
    return tuple(i for i in ids if i in added and added[i].content.strip())[:1]
