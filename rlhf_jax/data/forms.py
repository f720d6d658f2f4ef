"""How the records of a source become tokens: through a plain template, or as messages."""

import logging
from typing import Any

from rlhf_jax.data.examples import Row, encode_row, first_field, pick
from rlhf_jax.data.sources import Record
from rlhf_jax.text.chat import TURNS, chat_of, encode_prompt, encode_turns
from rlhf_jax.text.chat_template import Message, read_messages
from rlhf_jax.text.template import render
from rlhf_jax.text.tokenizer import Tokenizer, encode_start

_log = logging.getLogger(__name__)


def check_form(template: str | None, chat: str | None) -> None:
    """Raises a ValueError unless exactly one of the two is given."""
    if template is None and chat is None:
        raise ValueError(
            "template is missing; set it to the prompt's text, with fields in braces, or set chat "
            "to the field that holds messages"
        )
    if template is not None and chat is not None:
        raise ValueError(
            f"template={template!r} and chat={chat!r} are both set; a record is written by one of "
            "them: leave out template, or chat"
        )


class Form:
    """One source's way from records to tokens.

    With a template, prompts are text and so are replies. With chat, the prompt is the messages
    under that field (text there is one user's message), and a reply is text (one assistant's
    message) or messages.

    Args:
        template: the prompt's text, in the form of ``str.format`` over a record's fields.
        chat: the field that holds messages, which the tokenizer's chat template writes.
        turns: "all" assistant turns of a conversation or a reply train, or the "last" one.

    Raises:
        ValueError: not one of template and chat is given, `turns` is unknown, or the tokenizer has
            no chat template.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, template: str | None, chat: str | None, turns: str = "all"
    ):
        check_form(template, chat)
        if turns not in TURNS:
            raise ValueError(f"turns={turns!r} is not one of {', '.join(TURNS)}")
        if chat is not None:
            chat_of(tokenizer)
        elif tokenizer.expects_bos and tokenizer.encode(template or "")[:1] != [tokenizer.bos_id]:
            _log.warning(
                "tokenizer %s begins a text with its token %s; template %r does not write it, so "
                "rows go without: set data.bos to true (to add it) or false (to say so)",
                tokenizer.name,
                tokenizer.bos_id,
                template,
            )
        self.chat = chat
        self._template, self._tokenizer, self._turns = template or "", tokenizer, turns

    def prompt(self, record: Record) -> list[int]:
        """Ids of what a policy is to go on from.

        Answers at the end of a conversation are no part of its prompt.
        """
        if self.chat is None:
            tokens = encode_start(self._tokenizer, render(self._template, record))
            if not tokens:
                raise ValueError(f"the prompt is empty; template {self._template!r}")
            return tokens
        messages = self._messages(record)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError(f"field {self.chat!r} holds nothing but answers; wanted a question")
        return encode_prompt(self._tokenizer, messages)

    def conversation(self, record: Record, fields: tuple[str, ...]) -> Row:
        """A row of the messages under the field, if they end in an answer: all answers train.

        Else, and with a template, `row` with the first of `fields` as the reply.
        """
        if self.chat is not None:
            messages = self._messages(record)
            if messages[-1]["role"] == "assistant":
                return self._encode(messages, 0, False)
        return self.row(record, fields)

    def row(self, record: Record, fields: tuple[str, ...], *, truncated: bool = False) -> Row:
        """A row of the prompt and the reply under the first of `fields`, which trains.

        Messages of a reply may repeat those of the prompt at their beginning.

        Args:
            truncated: the reply is cut off and has no end-of-text.
        """
        if self.chat is None:
            return self.written(record, pick(record, fields), truncated=truncated)
        name = first_field(record, fields)
        prompt, reply = self._messages(record), _reply(record[name], name)
        return self._join(prompt, reply, truncated)

    def written(self, record: Record, text: str, *, truncated: bool = False) -> Row:
        """A row of the prompt and a reply of this text."""
        if self.chat is None:
            prompt = render(self._template, record)
            return encode_row(self._tokenizer, prompt, text, truncated=truncated)
        return self._join(self._messages(record), _reply(text, "reply"), truncated)

    def halves(self, record: Record, names: tuple[str, str], cut: tuple[bool, bool]) -> list[Row]:
        """Rows of the prompt with the replies under two fields.

        Records without the chat field have their prompt in the replies: the messages with which
        both begin.

        Args:
            cut: which of the replies are cut off.
        """
        if self.chat is None or self.chat in record:
            pairs = zip(names, cut, strict=True)
            return [self.row(record, (name,), truncated=one) for name, one in pairs]
        first, second = (_reply(record[name], name) for name in names)
        shared = 0
        while first[shared : shared + 1] == second[shared : shared + 1] != []:
            shared += 1
        shared = min(shared, len(first) - 1, len(second) - 1)
        while shared and not first[shared]["role"] == second[shared]["role"] == "assistant":
            shared -= 1
        if not shared:
            raise ValueError(
                f"no field {self.chat}, and {names[0]} and {names[1]} have no messages in common "
                f"before an answer; the record has {', '.join(record)}"
            )
        return [
            self._join(whole[:shared], whole, one)
            for whole, one in zip((first, second), cut, strict=True)
        ]

    def _messages(self, record: Record) -> list[Message]:
        if self.chat not in record:
            raise ValueError(f"no field {self.chat}; the record has {', '.join(record)}")
        return read_messages(record[self.chat], self.chat)

    def _join(self, prompt: list[Message], reply: list[Message], truncated: bool) -> Row:
        repeated = reply[: len(prompt)] == prompt and len(reply) > len(prompt)
        if not repeated and reply[0]["role"] != "assistant":
            raise ValueError(
                f"the reply begins with a message of the role {reply[0]['role']!r} and does not "
                f"repeat the prompt under {self.chat!r}; wanted what the assistant says, or the "
                "whole conversation"
            )
        return self._encode(reply if repeated else [*prompt, *reply], len(prompt), truncated)

    def _encode(self, messages: list[Message], first: int, truncated: bool) -> Row:
        found = encode_turns(
            self._tokenizer, messages, first=first, turns=self._turns, truncated=truncated
        )
        start = found.trains.index(True) if True in found.trains else len(found.tokens)
        return Row(found.tokens, start, found.trains)


def _reply(value: Any, field: str) -> list[Message]:
    """The messages of a reply; text is what the assistant says."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return read_messages(value, field)
