"""Texts for supervised fine-tuning: a prompt, and a completion that the loss is on."""

from collections.abc import Sequence

from rlhf_jax.data.examples import ExampleSource, Row, encode_row, pad_rows, pick
from rlhf_jax.data.sources import Record, RecordSource
from rlhf_jax.text.template import render
from rlhf_jax.text.tokenizer import Tokenizer


def texts(
    sources: Sequence[RecordSource],
    tokenizer: Tokenizer,
    *,
    template: str,
    max_length: int,
    seed: int,
    shuffle: bool = True,
    overlong: str = "error",
    completion: tuple[str, ...] = ("completion", "solution", "answer"),
) -> ExampleSource:
    """Batches of `Texts`.

    Args:
        template: the prompt's text; "" for plain texts, which train from their second token.
        max_length: S, in tokens, end-of-text included; longer rows are cut at the right.
        seed, shuffle, overlong: see `Draws`.
        completion: the first of these fields that a record has is what the loss is on.
    """

    def encode(record: Record) -> Row:
        return encode_row(tokenizer, render(template, record), pick(record, completion))

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
