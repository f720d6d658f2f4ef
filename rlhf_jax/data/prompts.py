"""Prompts for sampling: records through a template, left-padded, at a restorable position."""

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.draws import Draws
from rlhf_jax.data.sources import Record, RecordSource
from rlhf_jax.text.template import render
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Prompts


class PromptSource:
    """Batches of prompts: a pure function of (seed, position).

    Args:
        sources: together they are one set; `Prompts.source` numbers them.
        tokenizer: its `pad_id` fills the left.
        template: the prompt's text, in the form of ``str.format`` over a record's fields.
        max_prompt: P, in tokens.
        seed: decides the order.
        shuffle: False draws in the order of the sources, for evaluation.
        overlong: "error", "skip", or "truncate": keep the last `max_prompt` tokens.

    Raises:
        ValueError: see `Draws`; also for a prompt without tokens.
    """

    def __init__(
        self,
        sources: Sequence[RecordSource],
        tokenizer: Tokenizer,
        *,
        template: str,
        max_prompt: int,
        seed: int,
        shuffle: bool = True,
        overlong: str = "error",
    ):
        def encode(record: Record) -> list[int]:
            tokens = tokenizer.encode(render(template, record))
            if not tokens:
                raise ValueError(f"the prompt is empty; template {template!r}")
            return tokens

        self._max_prompt, self._pad = max_prompt, tokenizer.pad_id
        self._draws = Draws(
            sources,
            encode,
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
        tokens = np.full((len(drawn), self._max_prompt), self._pad, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, one in enumerate(drawn):
            kept = one.encoded[-self._max_prompt :]
            tokens[row, self._max_prompt - len(kept) :] = kept
            mask[row, self._max_prompt - len(kept) :] = True
        return Prompts(
            tokens=tokens,
            mask=mask,
            record=np.array([one.record for one in drawn], np.int32),
            source=np.array([one.source for one in drawn], np.int32),
            draw=np.array([one.draw for one in drawn], np.int32),
        )

    def record(self, source: int, index: int) -> Record:
        """All fields of a record, as `Prompts.source` and `Prompts.record` name it."""
        return self._draws.sources[source][index]
