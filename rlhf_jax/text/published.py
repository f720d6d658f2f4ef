"""Published tokenizers: whatever transformers loads from a folder, a file, or the hub."""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import huggingface_hub
import numpy as np
import tokenizers
from jaxtyping import Int
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_jax.text.chat_template import ChatTemplate, read_template, render_chat

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
# What a tokenizer may consist of. Weights stay where they are.
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PROBE = "ypsilon"  # an answer to find in what a template writes


class HFTokenizer:
    """A Hugging Face tokenizer with a Rust backend, as nearly all have.

    Args:
        backend: the Rust tokenizer; truncation and padding set in its file are switched off.
        eos_ids: end-of-text ids; the first one is written after training texts.
        pad_id: padding; None takes the first end-of-text id.
        bos_id, expects_bos, starts, chat, name: see `Tokenizer`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: tuple[int, ...],
        pad_id: int | None = None,
        bos_id: int | None = None,
        expects_bos: bool = False,
        starts: tuple[int, ...] = (),
        chat: ChatTemplate | None = None,
        name: str = "a Hugging Face tokenizer",
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.name = name
        self.eos_ids = eos_ids
        self.pad_id = eos_ids[0] if pad_id is None else pad_id
        self.bos_id = bos_id
        self.expects_bos = expects_bos
        self.starts = starts
        self.chat = chat
        # Not get_vocab_size(): added ids may leave holes below them.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Ids) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_texts(self) -> list[str | None]:
        ids = [[i] for i in range(self.vocab_size)]
        return [text or None for text in self._backend.decode_batch(ids, skip_special_tokens=True)]


class SlowTokenizer:
    """A Hugging Face tokenizer without a Rust backend (some SentencePiece and older ones).

    Args:
        loaded: what transformers loaded.
        eos_ids, pad_id, bos_id, expects_bos, starts, chat, name: see `HFTokenizer`.
    """

    def __init__(
        self,
        loaded: PreTrainedTokenizerBase,
        *,
        eos_ids: tuple[int, ...],
        pad_id: int | None = None,
        bos_id: int | None = None,
        expects_bos: bool = False,
        starts: tuple[int, ...] = (),
        chat: ChatTemplate | None = None,
        name: str = "a Hugging Face tokenizer",
    ):
        self._loaded = loaded
        self.name = name
        self.eos_ids = eos_ids
        self.pad_id = eos_ids[0] if pad_id is None else pad_id
        self.bos_id = bos_id
        self.expects_bos = expects_bos
        self.starts = starts
        self.chat = chat
        self.vocab_size = max(loaded.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._loaded.encode(text, add_special_tokens=False)

    def decode(self, ids: Ids) -> str:
        known = [int(i) for i in ids if i < self.vocab_size]
        return self._loaded.decode(
            known, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def token_texts(self) -> list[str | None]:
        return [self.decode([i]) or None for i in range(self.vocab_size)]


def load_published(
    name: str, *, chat_template: str | None, bos: bool | None
) -> HFTokenizer | SlowTokenizer:
    """The tokenizer of a folder, a tokenizer.json, or a model on the hub; see `load_tokenizer`."""
    path = pathlib.Path(name)
    if not path.exists() and _HUB_NAME.fullmatch(name):
        path = _from_hub(name)
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
    if isinstance(loaded, PreTrainedTokenizerFast):
        return HFTokenizer(loaded.backend_tokenizer, **values)
    return SlowTokenizer(loaded, **values)


def _from_hub(name: str) -> pathlib.Path:
    """The folder in the hub's cache with the tokenizer's files, after asking the hub for news."""
    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=list(_FILES), ignore_patterns=["*/*"]
        )
    except OSError as error:  # all errors of the hub's client are of this kind
        said = str(error).strip().splitlines()
        raise ValueError(
            f"tokenizer {name!r} is no local path, is not in the local cache of the Hugging Face "
            f"hub, and the hub does not give it ({type(error).__name__}: {said[0] if said else ''})"
            "; name a local folder, or make the hub reachable and log in where the model is gated"
        ) from error
    return pathlib.Path(found)


def _from_folder(folder: pathlib.Path) -> PreTrainedTokenizerBase:
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
