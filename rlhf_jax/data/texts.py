"""Texts for supervised fine-tuning: a prompt, and a completion that the loss is on."""

from collections.abc import Sequence

from rlhf_jax.data.examples import ExampleSource, Row, pad_rows
from rlhf_jax.data.forms import Form
from rlhf_jax.data.sources import Record, RecordSource
from rlhf_jax.text.tokenizer import Tokenizer


def texts(
    sources: Sequence[RecordSource],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    chat: str | None = None,
    turns: str = "all",
    max_length: int,
    seed: int,
    shuffle: bool = True,
    overlong: str = "error",
    completion: tuple[str, ...] = ("completion", "solution", "answer"),
) -> ExampleSource:
    """Batches of `Texts`.

    Args:
        template: the prompt's text; "" for plain texts, which train from their second token.
        chat: in place of a template, the field that holds messages. Where they end in an answer,
            all the assistant says trains; else they are the prompt of the completion, which is
            text or messages.
        turns: "all" assistant turns train, or the "last" one only.
        max_length: S, in tokens, end-of-text included; longer rows are cut at the right.
        seed, shuffle, overlong: see `Draws`.
        completion: the first of these fields that a record has is what the loss is on.
    """

    form = Form(tokenizer, template=template, chat=chat, turns=turns)

    def encode(record: Record) -> Row:
        return form.conversation(record, completion)

    return ExampleSource(
        sources,
        encode,
        lambda row: len(row.tokens),
        lambda drawn: pad_rows([one.encoded for one in drawn], max_length, tokenizer.pad_id),
        max_length=max_length,
        seed=seed,
        shuffle=shuffle,
        overlong=overlong,
    )
