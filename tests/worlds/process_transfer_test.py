"""Process against outcome reward models: best of 16 at home and where the cue of a step has turned.

A process model wins on the tasks that it was trained for and does not carry over, says "Does RLHF
Scale?" (Hou et al. 2024, https://arxiv.org/abs/2412.06000). Its experiment made small: a solution
is six steps, each wrong with probability 0.15, and an end; its answer is right if all steps are.
Each step shows whether it is right, the end whether the answer is, both by a cue along one
direction of four in noise of 1/2: 0.75 for a step, 0.18 for an answer. Away from home the cue of
steps is turned by an angle, that of answers is not. So it is built in that the process model loses
its lead: what is tested is that labels, losses, heads, aggregation and best-of-k together show it.

Both models read one trunk, a token's features beside the mean of those so far (a layer of uniform
attention), and are trained by the shipped trainer, with a ridge of 1e-3, on 2,000 solutions with
8 % of the labels flipped. How often the best of 16 is right, means over 10 seeds of 400 prompts:

     angle     min  product    mean    last   outcome model   any sample
     0       0.976    0.967   0.964   0.455           0.915        0.378
     1.2     0.637    0.652   0.653   0.432           0.738
     π/2     0.381    0.367   0.367   0.379           0.544

Rules: min less outcome is above 0.03 at angle 0 (0.061), and below -0.03 at π/2 (-0.163).
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.reward_metrics import best_of_k
from rlhf_jax.ops.step_labels import aggregate
from rlhf_jax.types import Steps
from tests.worlds.linear import labelled, linear_model, scorer, texts, trainer, zero_heads

STEPS, WRONG, FLIPPED = 6, 0.15, 0.08
WIDTH, NOISE = 4, 0.5  # of each of the two cues
STEP_CUE, ANSWER_CUE = 0.75, 0.18
SOLUTIONS, RIDGE = 2000, 1e-3
PROMPTS, SAMPLES, SEEDS = 400, 16, 10
HOWS = ("min", "product", "mean", "last")
HOME, FAR, AWAY = 0.0, 1.2, math.pi / 2
HIDDEN = 4 * WIDTH + 1


def running_mean(tree, rows, mask):
    """[M S 2F + 1]: each token's features, the mean of those up to it, and a constant, which the
    outcome head has not: most solutions are wrong."""
    del tree
    sofar = jnp.cumsum(jnp.where(mask[..., None], rows, 0.0), axis=1)
    count = jnp.maximum(jnp.cumsum(mask, axis=1), 1)
    constant = jnp.ones((*rows.shape[:-1], 1))
    return jnp.concatenate([rows, sofar / count[..., None], constant], axis=-1)


class World:
    """The cues of one seed."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        turned, _ = np.linalg.qr(self.rng.normal(size=(WIDTH, 2)))
        self._step, self._other = turned.T
        answer = self.rng.normal(size=WIDTH)
        self._answer = answer / np.linalg.norm(answer)

    def draw(self, count):
        """Solutions: which steps are right [M 6], which answers [M], and noise."""
        right = self.rng.random((count, STEPS)) > WRONG
        noise = NOISE * self.rng.normal(size=(count, STEPS + 1, WIDTH))
        return right, right.all(axis=1), noise

    def features(self, solutions, angle):
        """[7M 8]: rows 7i to 7i + 6 are the tokens of solution i."""
        right, answer, noise = solutions
        step = math.cos(angle) * self._step + math.sin(angle) * self._other
        rows = np.zeros((len(right), STEPS + 1, 2 * WIDTH), np.float32)
        rows[:, :STEPS, :WIDTH] = STEP_CUE * sign(right)[..., None] * step + noise[:, :STEPS]
        rows[:, STEPS, WIDTH:] = ANSWER_CUE * sign(answer)[:, None] * self._answer + noise[:, STEPS]
        return rows.reshape(-1, 2 * WIDTH)

    def flipped(self, labels):
        return (labels ^ (self.rng.random(labels.shape) < FLIPPED)).astype(np.float32)


def sign(truth):
    return np.where(truth, 1.0, -1.0)


def tokens_of(count):
    return np.arange(count * (STEPS + 1)).reshape(count, STEPS + 1)


def step_ends(count):
    return np.broadcast_to(np.arange(STEPS + 1) < STEPS, (count, STEPS + 1))


@functools.cache
def tools(head):
    """The compiled trainer of one head, and the score of every token."""
    model = linear_model(HIDDEN, (head,), running_mean)
    return trainer(model, zero_heads(HIDDEN, (head,)), {"rows": 1.0}, RIDGE), scorer(model)


def trained(world, solutions):
    """Parameters of the process and of the outcome model."""
    right, answer, _ = solutions
    count = len(answer)
    features = world.features(solutions, HOME)
    labels = np.full((count, STEPS + 1), np.nan, np.float32)  # the end's is not read
    labels[:, :STEPS] = world.flipped(right)
    steps = Steps(texts=texts(tokens_of(count)), step_ends=step_ends(count), labels=labels)
    answers = labelled(tokens_of(count), world.flipped(answer))
    process, outcome = tools("process")[0], tools("outcome")[0]
    return process(features, {"rows": steps}), outcome(features, {"rows": answers})


def best(scores, gold):
    """The share of prompts whose best of 16 is right."""
    by_prompt = (np.reshape(x, (PROMPTS, SAMPLES)) for x in (scores, gold))
    return best_of_k(*by_prompt, (SAMPLES,))[0]


@functools.cache
def right_answers():
    """{angle: {"min": ..., "outcome": ..., "any": of a sample}}, means over the seeds."""
    found = {angle: [] for angle in (HOME, FAR, AWAY)}
    for seed in range(SEEDS):
        world = World(seed)
        process, outcome = trained(world, world.draw(SOLUTIONS))
        samples = world.draw(PROMPTS * SAMPLES)
        gold = samples[1].astype(np.float64)
        tokens, ends = tokens_of(len(gold)), step_ends(len(gold))
        for angle, rows in found.items():
            features = world.features(samples, angle)
            logits = tools("process")[1](process, features, tokens)["process"]
            scores = {how: aggregate(logits, ends, how=how) for how in HOWS}
            scores["outcome"] = tools("outcome")[1](outcome, features, tokens)["outcome"][:, -1]
            rows.append({name: best(x, gold) for name, x in scores.items()})
            rows[-1]["any"] = gold.mean()
    return {
        angle: {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}
        for angle, rows in found.items()
    }


def test_the_process_model_wins_at_home():
    found = right_answers()[HOME]
    assert found["min"] - found["outcome"] > 0.03, found


def test_the_process_model_does_not_transfer():
    found = right_answers()[AWAY]
    assert found["min"] - found["outcome"] < -0.03, found


def test_the_last_step_alone_says_no_more_than_that_it_is_right():
    """So the answer is as right as the five steps before it: 0.85^5."""
    found = right_answers()[HOME]
    assert found["last"] == pytest.approx((1 - WRONG) ** (STEPS - 1), abs=0.03), found
