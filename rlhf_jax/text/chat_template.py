"""Lists of messages as text, through a tokenizer's own chat template.

A template is Jinja, rendered by transformers as its ``apply_chat_template`` does
(https://huggingface.co/docs/transformers/chat_templating), so what it strips, repeats or leaves out
is the template's affair. It sees a special token's name inside a message as text, and the tokenizer
then reads that name as the token, as with ``apply_chat_template``: a message can end its own turn.
A template that writes today's date gives other rows tomorrow.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]
Span = tuple[int, int]  # first character, and the one behind the last

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate(NamedTuple):
    """A template and the names of special tokens that it may write, such as ``bos_token``."""

    text: str
    names: Mapping[str, str]
    origin: str  # the tokenizer or the file, for messages

    @property
    def marks_answers(self) -> bool:
        """Whether ``{% generation %}`` blocks say what the assistant writes."""
        return _GENERATION.search(self.text) is not None


def read_template(path: str, names: Mapping[str, str]) -> ChatTemplate:
    """The chat template of a Jinja file.

    Raises:
        ValueError: there is no such file, or it is empty.
    """
    file = pathlib.Path(path)
    text = file.read_text("utf-8") if file.is_file() else ""
    if not text.strip():
        found = "is empty" if file.is_file() else "is no file"
        raise ValueError(f"chat_template={path!r} {found}; wanted a Jinja file")
    return ChatTemplate(text, names, path)


def read_messages(value: Any, field: str) -> list[Message]:
    """The messages under a record's `field`: a list of them, or text, which is one user's.

    Columns (``{"role": [...], "content": [...]}``, as TFDS keeps sequences) are put into rows.
    Keys that hold None are left out; ``content`` may be absent where there are ``tool_calls``.

    Raises:
        ValueError: it is empty, or something else.

    Example:
        >>> read_messages("37+8?", "prompt")
        [{'role': 'user', 'content': '37+8?'}]
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping) and value and all(_is_list(v) for v in value.values()):
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not _is_list(value) or not value:
        raise ValueError(
            f"field {field!r} holds {'no message' if _is_list(value) else type(value).__name__}; "
            'wanted a list of messages {"role": ..., "content": ...}'
        )
    return [_read_message(one, f"{field}[{i}]") for i, one in enumerate(value)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _read_message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is {type(value).__name__}; wanted a message with role, content")
    message = {key: held for key, held in value.items() if held is not None}
    for key in ("role",) if "tool_calls" in message else ("role", "content"):
        if not isinstance(message.get(key), str):
            kind = type(message[key]).__name__ if key in message else "nothing"
            raise ValueError(f"{place}.{key} holds {kind} where text is wanted")
    return message


def render_chat(chat: ChatTemplate, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """The text of `messages`; with `prompt`, through the words that begin an answer.

    Raises:
        ValueError: the template refuses the messages, or is malformed.
    """
    return _render(chat, messages, prompt=prompt, spans=False)[0]


def render_marked(chat: ChatTemplate, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The text of `messages` and what its ``{% generation %}`` blocks wrote; see `render_chat`."""
    return _render(chat, messages, prompt=False, spans=True)


def _render(
    chat: ChatTemplate, messages: Sequence[Message], *, prompt: bool, spans: bool
) -> tuple[str, list[Span]]:
    try:
        texts, found = render_jinja_template(
            conversations=[list(messages)],
            chat_template=chat.text,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            **chat.names,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template of {chat.origin}, line {error.lineno}: {error.message}"
        ) from error
    except (jinja2.TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise ValueError(
            f"the chat template of {chat.origin} refuses messages with the roles {roles}: {error}"
        ) from error
    return texts[0], [tuple(span) for span in found[0]] if found else []
