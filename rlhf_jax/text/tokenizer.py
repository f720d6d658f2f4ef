"""Tokenizers behind one small protocol: bytes, characters, and anything transformers loads."""

from typing import Protocol, runtime_checkable

from rlhf_jax.text.chat_template import ChatTemplate, read_template
from rlhf_jax.text.published import Ids, load_published


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Ids are 0 .. vocab_size-1; some may be unused."""

    name: str  # for messages
    pad_id: int  # fills rows; never recognised by its id, so it may equal an end-of-text id
    eos_ids: tuple[int, ...]  # the first one is written after training texts
    bos_id: int | None
    expects_bos: bool  # its own rule puts `bos_id` before a text
    starts: tuple[int, ...]  # what every prompt and row begins with; see `encode_start`
    chat: ChatTemplate | None
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; adds no special ids."""

    def decode(self, ids: Ids) -> str:
        """The text of `ids`; special and unknown ids are dropped."""

    def token_texts(self) -> list[str | None]:
        """What each id alone decodes to; None for special and unused ids."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, end-of-text 256, padding 257."""

    name = "byte"
    pad_id = 257
    eos_ids = (256,)
    bos_id = None
    expects_bos = False
    starts: tuple[int, ...] = ()
    chat: ChatTemplate | None = None
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_texts(self) -> list[str | None]:
        return [bytes([i]).decode("utf-8", errors="replace") for i in range(256)] + [None, None]


class CharTokenizer:
    """One id per character of a small alphabet: padding 0, end-of-text 1, then the characters."""

    name = "chars"
    pad_id = 0
    eos_ids = (1,)
    bos_id = None
    expects_bos = False
    starts: tuple[int, ...] = ()
    chat: ChatTemplate | None = None

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


def encode_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that begins a row: with the ids `starts` before it, unless it writes them.

    `starts` is empty but where a config sets ``data.bos``: a template is taken as it is written.
    """
    ids, starts = tokenizer.encode(text), list(tokenizer.starts)
    return ids if ids[: len(starts)] == starts else starts + ids


def load_tokenizer(
    name: str, *, chat_template: str | None = None, bos: bool | None = None
) -> Tokenizer:
    """ "byte", "chars:<alphabet>", a Hugging Face folder, the path of a tokenizer.json, or the name
    of a model on the Hugging Face hub, such as "org/name", whose files are kept in its cache.

    In an alphabet the two characters ``\\n`` stand for a line break, so that it can be written on
    a command line.

    Args:
        chat_template: the path of a Jinja file that takes the place of the tokenizer's own one.
        bos: every prompt and row begins with the beginning-of-text token. Else what the templates
            write is what there is, whatever the tokenizer would add by itself.

    Raises:
        ValueError: nothing of that name, or no end-of-text token is known, or a special token that
            is asked for is not there.
    """
    if name == "byte":
        made: Tokenizer = ByteTokenizer()
    elif name.startswith("chars:"):
        made = CharTokenizer(name.removeprefix("chars:").replace("\\n", "\n"))
    else:
        return load_published(name, chat_template=chat_template, bos=bos)
    if bos:
        raise ValueError(f"bos is set, but tokenizer {made.name!r} has no beginning-of-text token")
    if chat_template is not None:
        made.chat = read_template(chat_template, {})
    return made
