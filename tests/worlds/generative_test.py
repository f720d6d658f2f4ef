"""A judge that is a language model, in the world of `implicit_test`: chains that count on.

GenRM (Zhang et al. 2024, https://arxiv.org/abs/2408.15240): the model that writes chains learns
from 4,096 verdicts behind them, in the shipped data source and trainer, and the shipped reward
reads P(yes) of 1,024 others. A right chain (0.36 of them) has no step that is wrong.

Rules: the area under the curve for right chains is at least 0.95, with verdicts dealt out at random
within 0.1 of 0.5; calibrated, so that the mean P(yes) is within 0.05 of the share of right chains.
Measured on two seeds, of which the tests run the first: 0.995 and 0.998, mean P(yes) 0.379 and
0.326 where 0.372 are right; 0.521 with verdicts at random.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.data.verdicts import verdicts
from rlhf_jax.models.transformer import decoder
from rlhf_jax.ops.reward_metrics import auc
from rlhf_jax.rewards.generative_model import generative_model
from rlhf_jax.training.supervised import create_supervised_state, make_supervised_step
from tests.rewards.examples import TOKENIZER, spell
from tests.training.tiny import RULES, config, init, one_device
from tests.worlds.implicit_test import STEPS, draw

ASKED = dict(question="?", yes="+", no="-")
CHAINS, ROWS, TRAINING = 4096, 128, 300


def records(rng, count, shuffled):
    tokens, right = draw(rng, count)
    label = right.all(1)
    label = rng.permutation(label) if shuffled else label
    return [
        {"prompt": str(row[0]), "completion": "".join(map(str, row[1:])), "label": bool(good)}
        for row, good in zip(tokens, label, strict=True)
    ]


@functools.cache
def programs():
    """(the model, its compiled training on verdicts)."""
    sizes = dict(layers=2, width=32, mlp_width=64, vocab_size=TOKENIZER.vocab_size)
    model, optimizer = decoder(config(**sizes), RULES), optax.adam(3e-3)
    step = make_supervised_step(model, {"verdicts": 1.0}, optimizer)

    @jax.jit
    def scan(state, rows):
        def one(state, number):
            first = number * ROWS % CHAINS
            part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, ROWS), rows)
            state, _ = step(state, {"policy": {}}, {"verdicts": part}, jax.random.key(0))
            return state, None

        return jax.lax.scan(one, state, jnp.arange(TRAINING))[0].params["policy"]

    def train(params, rows):
        state = create_supervised_state(params, optimizer, one_device())
        return scan(state, jax.tree.map(jnp.asarray, rows))

    return model, train


@functools.cache
def judged(seed, shuffled=False):
    """P(yes) of chains that were not trained on, and whether they are right."""
    rng = np.random.default_rng(seed)
    model, train = programs()
    given = records(rng, CHAINS, shuffled)
    source = verdicts(
        [given], TOKENIZER, template="{prompt}", max_length=STEPS + 3, seed=seed, **ASKED
    )
    with jax.set_mesh(one_device()):
        params = train(init(model, seed, one_device()), source.batch(0, slice(None), CHAINS))
        fresh = records(rng, 1024, False)
        texts = ([one[name] for one in fresh] for name in ("prompt", "completion"))
        reward = generative_model(model=model, params=params, encode=TOKENIZER.encode, **ASKED)
        scores, _ = jax.jit(reward.score)(reward.init(), spell(*texts))
    return np.asarray(scores.outcome), np.array([one["label"] for one in fresh])


@pytest.mark.slow
def test_a_judge_tells_right_chains_from_wrong_ones():
    found, right = judged(0)
    assert auc(found, right) >= 0.95
    assert abs(found.mean() - right.mean()) < 0.05


@pytest.mark.slow
def test_verdicts_at_random_teach_nothing():
    found, right = judged(0, shuffled=True)
    assert abs(auc(found, right) - 0.5) < 0.1
