"""Conversations as token ids: prompts to answer, and rows with a mask of the tokens that train.

The rule. A row is the chat template's text of the messages, encoded at once, as
``apply_chat_template`` does it. What trains is what a policy would have to write: the text of an
assistant turn behind the template's generation prompt, through its end-of-turn token. So

* what stands between an end-of-turn and the next turn (ChatML's line break) does not train;
* a row ends with the last token that trains, which is where sampling would have stopped; a template
  that ends its turns without any end-of-text token gets the tokenizer's first one there;
* where an answer's first characters would merge into one token with the generation prompt, the two
  are encoded apart, as the sampler sees them.

Which text that is, ``{% generation %}`` blocks say where the template has them. Else it is found
from its beginnings: the messages before a turn with the generation prompt, and those through it,
must both be how the whole begins. Templates that write a turn differently once others follow (drop
its reasoning, say) are refused, by name.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_jax.text.chat_template import (
    ChatTemplate,
    Message,
    Span,
    render_chat,
    render_marked,
)
from rlhf_jax.text.tokenizer import Tokenizer, encode_start

TURNS = ("all", "last")
_WAY_OUT = (
    "give data.chat_template a template with {% generation %} blocks around what the assistant "
    "writes"
)


class ChatRow(NamedTuple):
    """Token ids of a conversation, and which of them train."""

    tokens: list[int]
    trains: list[bool]


def chat_of(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.chat is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} has no chat template, which messages need; take the "
            "tokenizer of a chat model, or set data.chat_template to a Jinja file"
        )
    return tokenizer.chat


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation through the words that begin the assistant's next turn."""
    return encode_start(tokenizer, render_chat(chat_of(tokenizer), messages, prompt=True))


def encode_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    first: int = 0,
    turns: str = "all",
    truncated: bool = False,
) -> ChatRow:
    """A conversation through its last assistant turn, and which tokens train, by the module's rule.

    Args:
        first: assistant turns before this message do not train: they are of the prompt.
        turns: "all" of the others train, or the "last" one only.
        truncated: the last turn is cut off and gets no end-of-turn.

    Raises:
        ValueError: there is no such turn, or the template does not tell which text it wrote.
    """
    chat = chat_of(tokenizer)
    said = [i for i, one in enumerate(messages) if one["role"] == "assistant" and i >= first]
    if not said:
        raise ValueError('no message of the role "assistant" to train on')
    said = said[-1:] if turns == "last" else said
    kept = list(messages[: said[-1] + 1])
    text, spans = (_marked if chat.marks_answers else _derived)(chat, kept, said)
    tokens, columns = _encode_cut(tokenizer, text, [at for span in spans for at in span])
    trains = [False] * len(tokens)
    stop = 0
    for start, end in zip(columns[::2], columns[1::2], strict=True):
        stop = _close(tokenizer, tokens, start, end)
        trains[start:stop] = [True] * (stop - start)
    tokens, trains = tokens[:stop], trains[:stop]
    ended = bool(tokens) and trains[-1] and tokens[-1] in tokenizer.eos_ids
    if truncated and ended:
        return ChatRow(tokens[:-1], trains[:-1])
    if not truncated and not ended:
        return ChatRow([*tokens, tokenizer.eos_ids[0]], [*trains, True])
    return ChatRow(tokens, trains)


def _marked(chat: ChatTemplate, messages: list[Message], said: list[int]) -> tuple[str, list[Span]]:
    """The text, and what its generation blocks wrote of the turns `said`."""
    text, spans = render_marked(chat, messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(answers):
        raise ValueError(
            f"the chat template of {chat.origin} wrote {len(spans)} generation blocks for "
            f"{len(answers)} assistant turns; wanted one for each"
        )
    return text, [span for i, span in zip(answers, spans, strict=True) if i in said]


def _derived(
    chat: ChatTemplate, messages: list[Message], said: list[int]
) -> tuple[str, list[Span]]:
    """The text, and where the turns `said` stand in it, from how it begins."""
    text, spans = render_chat(chat, messages), []
    for i in said:
        if i == 0:
            raise ValueError(
                "the conversation begins with an assistant turn that is to train, and nothing "
                'says where its text begins; put a user message first, or set turns to "last"'
            )
        before = render_chat(chat, messages[:i], prompt=True)
        if not text.startswith(before):
            bare = render_chat(chat, messages[:i])
            said_so = (
                f"does not write turn {i} behind its generation prompt {before[len(bare) :]!r}"
                if text.startswith(bare)
                else f"writes what stands before turn {i} differently once that follows"
            )
            raise ValueError(
                f"the chat template of {chat.origin} {said_so}, so which tokens train is not "
                f"known; {_WAY_OUT}"
            )
        through = text if i + 1 == len(messages) else render_chat(chat, messages[: i + 1])
        if not text.startswith(through) or len(through) < len(before):
            raise ValueError(
                f"the chat template of {chat.origin} writes assistant turn {i} differently once "
                "others follow, so which tokens train is not known; set turns to "
                f'"last", or {_WAY_OUT}'
            )
        spans.append((len(before), len(through)))
    return text, spans


def _encode_cut(tokenizer: Tokenizer, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
    """Ids of `text`, and the column at each of the characters `cuts`, which ascend.

    Encoded at once; at a cut that falls into a token, what is before it is encoded by itself.
    """
    settled: list[int] = []
    begin, columns = 0, []
    tokens = encode_start(tokenizer, text)
    for cut in cuts:
        piece = text[begin:cut]
        head = settled + (tokenizer.encode(piece) if begin else encode_start(tokenizer, piece))
        if tokens[: len(head)] != head:
            settled, begin = head, cut
            tokens = head + tokenizer.encode(text[cut:])
        columns.append(len(head))
    return tokens, columns


def _close(tokenizer: Tokenizer, tokens: list[int], start: int, end: int) -> int:
    """Where the turn in columns `start` to `end` stops: behind its end-of-turn token.

    That may stand right behind a generation block that left it out.
    """
    for column in range(end, start - 1, -1):
        if column < len(tokens) and tokens[column] in tokenizer.eos_ids:
            return column + 1
    return end
