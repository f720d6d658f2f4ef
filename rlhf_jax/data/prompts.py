"""Prompts for sampling: records through a template, left-padded, at a restorable position."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.data.draws import Draws
from rlhf_jax.data.forms import Form
from rlhf_jax.data.sources import Record, RecordSource
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Prompts


def pad_left(
    rows: Sequence[Sequence[int]], width: int, pad: int
) -> tuple[Int[np.ndarray, "N P"], Bool[np.ndarray, "N P"]]:
    """The last ``width`` tokens of each prompt, filled up on the left, and where they lie."""
    tokens = np.full((len(rows), width), pad, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for index, row in enumerate(rows):
        kept = row[-width:]
        tokens[index, width - len(kept) :] = kept
        mask[index, width - len(kept) :] = True
    return tokens, mask


class PromptSource:
    """Batches of prompts: a pure function of (seed, position).

    Args:
        sources: together they are one set; `Prompts.source` numbers them.
        tokenizer: its `pad_id` fills the left.
        template, chat: the prompt's text, or the field that holds its messages; see `Form`.
        max_prompt: P, in tokens.
        seed: decides the order.
        shuffle: False draws in the order of the sources, for evaluation.
        overlong: "error", "skip", or "truncate": keep the last `max_prompt` tokens, whatever the
            template wrote first.

    Raises:
        ValueError: see `Draws`; also for a prompt without tokens.
    """

    def __init__(
        self,
        sources: Sequence[RecordSource],
        tokenizer: Tokenizer,
        *,
        template: str | None = None,
        chat: str | None = None,
        max_prompt: int,
        seed: int,
        shuffle: bool = True,
        overlong: str = "error",
    ):
        form = Form(tokenizer, template=template, chat=chat)
        self._max_prompt, self._pad = max_prompt, tokenizer.pad_id
        self._draws = Draws(
            sources,
            form.prompt,
            len,
            limit=max_prompt,
            limit_name="max_prompt",
            overlong=overlong,
            seed=seed,
            shuffle=shuffle,
        )

    def __len__(self) -> int:
        """Prompts per epoch, without those that were skipped."""
        return len(self._draws)

    @property
    def num_overlong(self) -> int:
        """How many prompts were longer than `max_prompt`."""
        return self._draws.num_overlong

    def batch(self, position: int, rows: slice, n: int) -> Prompts:
        """The rows `rows` of the batch of `n` prompts after `position` draws.

        The next batch is at ``position + n``. Different processes ask for different rows of the
        same batch.
        """
        drawn = self._draws.get(position, rows, n)
        tokens, mask = pad_left([one.encoded for one in drawn], self._max_prompt, self._pad)
        return Prompts(
            tokens=tokens,
            mask=mask,
            record=np.array([one.record for one in drawn], np.int32),
            source=np.array([one.source for one in drawn], np.int32),
            draw=np.array([one.draw for one in drawn], np.int32),
        )

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(source, record) of all prompts of an epoch, in the order of the sources."""
        return self._draws.places

    def place(self, source: int, record: int) -> str:
        """Where a record stands, for messages."""
        return self._draws.place(source, record)

    def record(self, source: int, index: int) -> Record:
        """All fields of a record, as `Prompts.source` and `Prompts.record` name it."""
        return self._draws.sources[source][index]
