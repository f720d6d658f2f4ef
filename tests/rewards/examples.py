"""Rollouts for the tests of rewards: random ones, and ones that spell given texts."""

import numpy as np

from rlhf_jax.text.tokenizer import ByteTokenizer
from rlhf_jax.types import Prompts, Rollouts

TOKENIZER = ByteTokenizer()


def pad(rows, width, *, left=False):
    """Token lists -> (tokens [B width], mask [B width])."""
    tokens = np.full((len(rows), width), TOKENIZER.pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask


def rollouts_of(prompts, completions, *, group, step_ends=None, width=None, records=None):
    """Rollouts as numpy from token lists; a completion's last token ends its last step."""
    tokens, mask = pad(completions, width or max(map(len, completions)))
    prompt_tokens, prompt_mask = pad(prompts, max(map(len, prompts)), left=True)
    assert len(completions) == group * len(prompts)
    if step_ends is None:
        step_ends = mask & (np.cumsum(mask, 1) == mask.sum(1, keepdims=True))
    count = len(prompts)
    rows = len(completions)
    return Rollouts(
        prompts=Prompts(
            tokens=prompt_tokens,
            mask=prompt_mask,
            record=np.asarray(range(count) if records is None else records, np.int32),
            source=np.zeros(count, np.int32),
            draw=np.zeros(count, np.int32),
        ),
        tokens=tokens,
        mask=mask,
        step_ends=step_ends,
        logprobs=np.zeros(mask.shape, np.float32),
        behaviour_logprobs=np.zeros(mask.shape, np.float32),
        truncated=np.zeros(rows, bool),
        sample=np.tile(np.arange(group, dtype=np.int32), count),
        version=np.zeros(rows, np.int32),
    )


def spell(prompts, completions, *, group=1, **kwargs):
    """Rollouts whose rows are the given texts, each completion closed by end-of-text."""
    eos = TOKENIZER.eos_ids[0]
    return rollouts_of(
        [TOKENIZER.encode(text) for text in prompts],
        [[*TOKENIZER.encode(text), eos] for text in completions],
        group=group,
        **kwargs,
    )


def random_rollouts(seed, *, prompts=4, group=2, prompt_width=5, width=9, vocab=64):
    """Rows of random tokens and lengths, with step ends at random and at the last token."""
    rng = np.random.default_rng(seed)

    def draw(rows, most):
        return [rng.integers(3, vocab, rng.integers(1, most + 1)).tolist() for _ in range(rows)]

    rollouts = rollouts_of(
        draw(prompts, prompt_width), draw(prompts * group, width), group=group, width=width
    )
    ends = (rng.random(rollouts.mask.shape) < 0.3) & rollouts.mask
    return type(rollouts)(**{**vars(rollouts), "step_ends": ends | rollouts.step_ends})


def permute_groups(rollouts, order):
    """The same rollouts with their groups in another order."""
    group = rollouts.group_size
    rows = (np.asarray(order)[:, None] * group + np.arange(group)).reshape(-1)
    prompts = {name: leaf[np.asarray(order)] for name, leaf in vars(rollouts.prompts).items()}
    fields = {name: leaf[rows] for name, leaf in vars(rollouts).items() if name != "prompts"}
    return type(rollouts)(prompts=type(rollouts.prompts)(**prompts), **fields), rows
