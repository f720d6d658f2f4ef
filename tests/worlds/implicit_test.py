"""A process reward from outcome labels alone, in a world whose errors are planted.

"Free process rewards" (Yuan et al. 2024, https://arxiv.org/abs/2412.01981): a model trained to say
by β log π / π_ref whether a whole answer is right says by the same number of each token what it
adds. A solution here is a chain of eight tokens that count on from a prompt; every step goes wrong
with probability 0.12 (it writes any other token, and the chain counts on from there), and the
answer is right if no step is wrong, in 0.36 of the chains. No step is ever labelled.

The reference is a one-layer transformer that was fine-tuned on such chains, right and wrong; from
there the shipped trainer trains on the outcomes of 4,096 others, and r_t is measured on others
again. Means over three seeds; "shuffled" is trained on labels that say nothing:

                                              labels   shuffled
    r_t of right steps before the first error   0.00      -0.08
        of the first error                     -0.65      -0.01
        of right steps behind it               -0.21      -0.09
    wrong chains with their lowest r_t at an
        error                                   0.47       0.04
    AUC of Σ r_t for right answers              1.00       0.32

Rules: the first error is below both kinds of right steps by 0.3; shuffled labels leave it within
0.1 of 0. Trained on (300 steps in place of 120) the drop doubles at the error, and behind it as
well: once a chain is known to be wrong, the sum may fall anywhere.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models.transformer import decoder
from rlhf_jax.ops.direct_preference import direct_preference
from rlhf_jax.ops.implicit import token_rewards
from rlhf_jax.ops.reward_metrics import auc
from rlhf_jax.training.direct import compare
from rlhf_jax.training.supervised import create_supervised_state, make_supervised_step
from rlhf_jax.types import Labelled, Texts
from tests.training.tiny import RULES, config, init, one_device

VOCABULARY, STEPS, WRONG = 10, 8, 0.12
CHAINS, ROWS, SEEDS = 4096, 128, 3
BETA = 0.05
TUNING, TRAINING = 150, 120  # steps


def draw(rng, count):
    """Chains [count 1 + STEPS] and whether each step is right."""
    right = rng.random((count, STEPS)) > WRONG
    by = np.where(right, 1, rng.integers(2, VOCABULARY + 1, (count, STEPS)))
    prompt = rng.integers(0, VOCABULARY, (count, 1))
    return np.concatenate([prompt, prompt + np.cumsum(by, 1)], 1) % VOCABULARY, right


def texts(tokens):
    there = np.ones(tokens.shape, bool)
    completion = there & (np.arange(tokens.shape[1]) > 0)
    tokens = tokens.astype(np.int32)
    return Texts(tokens=tokens, mask=there, loss_mask=completion, segment=there.astype(np.int32))


@functools.cache
def programs():
    """(the model, {kind: its compiled training}, log-probs of a model and its reference)."""
    model = decoder(config(layers=1, width=32, vocab_size=VOCABULARY, mlp_width=64), RULES)

    def training(source, steps, rate, direct):
        optimizer = optax.adam(rate)
        step = make_supervised_step(model, {source: 1.0}, optimizer, direct=direct)

        @jax.jit
        def scan(state, reference, rows):
            frozen = {"policy": {}, "reference": reference}

            def one(state, number):
                first = number * ROWS % CHAINS
                part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, ROWS), rows)
                return step(state, frozen, {source: part}, jax.random.key(0))[0], None

            return jax.lax.scan(one, state, jnp.arange(steps))[0].params["policy"]

        def run(params, reference, rows):
            state = create_supervised_state(params, optimizer, one_device())
            return scan(state, reference, jax.tree.map(jnp.asarray, rows))

        return run

    tune = training("texts", TUNING, 1e-2, None)
    learn = training("answers", TRAINING, 3e-3, direct_preference(beta=BETA))
    return model, tune, learn, jax.jit(lambda p, r, rows: compare(model, p, {}, r, rows))


@functools.cache
def measured(seed, shuffled=False):
    """Rewards of tokens, and which steps are right, of chains that were not trained on."""
    rng = np.random.default_rng(seed)
    model, tune, learn, said = programs()
    with jax.set_mesh(one_device()):
        tokens, _ = draw(rng, CHAINS)
        reference = tune(init(model, seed, one_device()), {}, texts(tokens))
        tokens, right = draw(rng, CHAINS)
        label = right.all(1).astype(np.float32)
        label = rng.permutation(label) if shuffled else label
        params = learn(reference, reference, Labelled(texts=texts(tokens), label=label))
        tokens, right = draw(rng, CHAINS)
        rows = texts(tokens)
        both = said(params, reference, rows)
    rewards = token_rewards(both.logprobs, both.reference, rows.loss_mask, beta=BETA)
    return np.asarray(rewards)[:, 1:], right


def means(*world):
    """Mean r_t of steps before the first wrong one, at it, and of right ones behind it; how often
    the smallest r_t of a chain that goes wrong is at its first wrong step or a later wrong one; how
    well Σ r_t parts right answers from wrong ones."""
    rewards, right = measured(*world)
    errors = np.cumsum(~right, 1)
    lowest = rewards.argmin(1)[~right.all(1)]
    at_error = ~right[~right.all(1)][np.arange(len(lowest)), lowest]
    return {
        "before": float(rewards[right & (errors == 0)].mean()),
        "first error": float(rewards[~right & (errors == 1)].mean()),
        "behind": float(rewards[right & (errors > 0)].mean()),
        "found": float(at_error.mean()),
        "auc": float(auc(rewards.sum(1), right.all(1))),
    }


def mean_of_seeds(shuffled=False):
    found = [means(seed, shuffled) for seed in range(SEEDS)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


@pytest.mark.slow
def test_the_reward_drops_where_a_step_goes_wrong():
    found = mean_of_seeds()
    assert found["auc"] > 0.95, found
    assert found["first error"] < min(found["before"], found["behind"]) - 0.3, found
    assert found["found"] > 0.3, found  # a step of a wrong chain at random: 0.19


@pytest.mark.slow
def test_labels_that_say_nothing_teach_nothing_of_steps():
    found = mean_of_seeds(shuffled=True)
    assert abs(found["first error"]) < 0.1, found
    assert found["found"] < 0.2, found
