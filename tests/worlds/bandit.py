"""Policies of a few parameters, which the shipped algorithms train on rewards with known gold.

A prompt is a number, a completion T answers out of V, drawn independently of each other (T = 1: a
bandit). What a world brings is a `Policy`: logits and values as functions of its own arrays and of
parameters. Everything else is shipped: `targets` and `loss` of an algorithm on an `Experience`,
and a `Reward`, reshaped as in a run. `trainer` makes whole runs of it, compiled as one program and
meant for `jax.vmap` over seeds, rates and worlds; the optimizer is plain gradient descent.

`Linear` is the world in which most papers' claims are tried (its settings are those below): the
answers to a prompt have 12 features, gold and proxy are linear in them, a policy is a softmax of a
linear score, and what a run is worth is the exact gain in expected gold on prompts of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.ops.groups import repeat_groups
from rlhf_jax.rewards.base import outcome_scores
from rlhf_jax.training.experience import make_experience
from rlhf_jax.types import Algorithm, CompletionOutput, Prompts, Reward, Rollouts, Texts

WIDTH, ANSWERS = 12, 40
PROMPTS, NEW_PROMPTS = 2000, 400
PER_STEP, STEPS, RATE = 32, 80, 0.6


class Policy(NamedTuple):
    """``logits(world, params, record [N])`` [N T V]; ``values`` alike [N T], None without critic.

    `ends` are the answers that end a completion; without any, all of them have T.
    """

    logits: Callable[[Any, Any, jax.Array], jax.Array]
    values: Callable[[Any, Any, jax.Array], jax.Array] | None = None
    ends: tuple[int, ...] = ()


class Plan(NamedTuple):
    """How much is sampled, from how many prompts, and how often it is used."""

    prompts: int = PROMPTS
    per_step: int = PER_STEP
    samples: int = 8
    steps: int = STEPS
    epochs: int = 1


class Trained(NamedTuple):
    params: Any
    reward: Any  # the mean outcome of each step


def sample(policy: Policy, world, params, record, key, plan: Plan, step=0) -> Rollouts:
    """K completions for each prompt of `record` [N], with the log-probs they were drawn with."""
    share = jax.nn.softmax(policy.logits(world, params, record))
    upto = share @ jnp.triu(jnp.ones((share.shape[-1],) * 2))  # P(answer <= v), drawn from below
    chance = jax.random.uniform(key, (len(record) * plan.samples, share.shape[1], 1))
    passed = chance > repeat_groups(upto[..., :-1], plan.samples)
    tokens = jnp.sum(passed, axis=-1, dtype=jnp.int32)
    there = jnp.ones(tokens.shape, bool)
    mask = _through_first(jnp.isin(tokens, jnp.array(policy.ends, jnp.int32)))
    logprobs = evaluate(policy, world, params, record, tokens).logprobs
    column = jnp.zeros((len(record), 1), jnp.int32)
    zeros = jnp.zeros(len(record), jnp.int32)
    return Rollouts(
        prompts=Prompts(tokens=column, mask=column == 0, record=record, source=zeros, draw=zeros),
        tokens=tokens,
        mask=mask,
        step_ends=there,
        logprobs=logprobs,
        behaviour_logprobs=logprobs,
        truncated=jnp.zeros(len(tokens), bool),
        sample=jnp.arange(len(tokens)) % plan.samples,
        version=jnp.full(len(tokens), step, jnp.int32),
    )


def _through_first(ends):
    """True through the first end of each row, and everywhere in a row without one."""
    before = jnp.cumsum(ends, axis=-1) - ends
    return before == 0


def evaluate(policy: Policy, world, params, record, tokens) -> CompletionOutput:
    """What the policy says about completions [B T] to the prompts `record` [N]."""
    rows = len(tokens) // len(record)
    logprobs = jax.nn.log_softmax(policy.logits(world, params, record))
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    scores = {}
    if policy.values is not None:
        scores["value"] = repeat_groups(policy.values(world, params, record), rows)
    place = jnp.arange(len(tokens))[:, None] // rows, jnp.arange(tokens.shape[1])[None, :]
    return CompletionOutput(
        logprobs=logprobs[*place, tokens], entropy=repeat_groups(entropy, rows), scores=scores
    )


class Rows(NamedTuple):
    """Auxiliary rows: answers [M T] to the prompts `record` [M], all of them in every step."""

    record: jax.Array
    answers: jax.Array

    def texts(self) -> Texts:
        there = jnp.ones(self.answers.shape, bool)
        return Texts(tokens=self.answers, mask=there, loss_mask=there, segment=there.astype(int))


def trainer(policy: Policy, algorithm: Algorithm, reward: Reward, plan: Plan):
    """A pure function (world, params, reward state, rates, key, extra) -> `Trained`.

    `rates` has the form of `params`, or of its upper levels. The reference is the policy as it
    starts. All rows of a step are one minibatch, used `epochs` times. `extra` are `Rows` by name.
    """

    def total(params, world, experience, targets, extra):
        rollouts = experience.rollouts
        output = evaluate(policy, world, params, rollouts.prompts.record, rollouts.tokens)
        read = {
            name: evaluate(policy, world, params, rows.record, rows.answers).logprobs
            for name, rows in extra.items()
        }
        output = dataclasses.replace(output, extra=read or None)
        terms, _ = algorithm.loss(output, experience, targets, plan.samples)
        return sum(t.weight * t.mean.total / jnp.maximum(t.mean.count, 1) for t in terms.values())

    def run(world, start, state, rates, key, extra=None):
        extra = extra or {}
        texts = {name: rows.texts() for name, rows in extra.items()}

        def one(carry, step):
            params, state, memory = carry
            to_draw, to_sample = jax.random.split(jax.random.fold_in(key, step))
            record = jax.random.randint(to_draw, (plan.per_step,), 0, plan.prompts)
            rollouts = sample(policy, world, params, record, to_sample, plan, step)
            scores, state = reward.score(state, rollouts)
            own, reference = (
                evaluate(policy, world, p, record, rollouts.tokens) for p in (params, start)
            )
            value = own if algorithm.needs.value else None
            experience = make_experience(rollouts, scores, own, reference, value, texts)
            targets, memory = algorithm.targets(experience, plan.samples, memory)
            for _ in range(plan.epochs):
                slope = jax.grad(total)(params, world, experience, targets, extra)
                params = _descend(params, slope, rates)
            return (params, state, memory), jnp.mean(scores.outcome)

        carry = (start, state, algorithm.init())
        (params, _, _), reward_of_steps = jax.lax.scan(one, carry, jnp.arange(plan.steps))
        return Trained(params, reward_of_steps)

    return run


def _descend(params, slope, rates):
    def of_branch(rate, p, g):
        return jax.tree.map(lambda x, d: x - rate * d, p, g)

    return jax.tree.map(of_branch, rates, params, slope)


def table_reward() -> Reward:
    """outcome = Σ_t table[record, t, answer_t] + noise · N(0, 1) over the valid answers.

    Its state is ``{"table" [N T V], "noise", "key"}``; `table_state` makes it.
    """

    def score(state, rollouts):
        use, kept = jax.random.split(state["key"])
        record = repeat_groups(rollouts.prompts.record, rollouts.group_size)
        column = jnp.arange(rollouts.tokens.shape[1])[None, :]
        said = state["table"][record[:, None], column, rollouts.tokens]
        outcome = jnp.sum(jnp.where(rollouts.mask, said, 0.0), axis=-1)
        outcome = outcome + state["noise"] * jax.random.normal(use, outcome.shape)
        return outcome_scores("table", outcome, rollouts), {**state, "key": kept}

    return Reward(name="table", where="device", init=dict, score=score)


def table_state(table, key, noise=0.0):
    return {"table": table, "noise": jnp.asarray(noise, jnp.float32), "key": key}


class Linear(NamedTuple):
    """Features of answers, [N 40 12] and those of prompts that are never trained on, and gold."""

    features: jax.Array
    new: jax.Array
    gold: jax.Array  # weights [12]
    other: jax.Array  # [12], what a proxy believes beside the gold

    def proxy(self, rho):
        """Weights [12] that correlate with those of the gold by rho, on average over seeds."""
        return rho * self.gold + jnp.sqrt(1 - rho**2) * self.other

    def table(self, weights):
        """[N 1 40]: what each answer is worth."""
        return (self.features @ weights)[:, None, :]

    def expected(self, theta, weights):
        """What a policy's answers to new prompts are worth: exact, no sampling."""
        share = jax.nn.softmax(self.new @ theta)
        return jnp.mean(jnp.sum(share * (self.new @ weights), axis=-1))

    def gain(self, theta, start=None):
        """Gold that training brought; the start is the uniform policy if it is not given."""
        start = jnp.zeros(WIDTH) if start is None else start
        return self.expected(theta, self.gold) - self.expected(start, self.gold)


def linear_world(seed) -> Linear:
    rng = np.random.default_rng(seed)

    def normal(scale, *shape):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    scale = WIDTH**-0.5
    return Linear(
        features=normal(scale, PROMPTS, ANSWERS, WIDTH),
        new=normal(scale, NEW_PROMPTS, ANSWERS, WIDTH),
        gold=normal(2.0, WIDTH),
        other=normal(2.0, WIDTH),
    )


def linear_worlds(seeds: int) -> Linear:
    """Those of the seeds 0, 1..., stacked for `jax.vmap`."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(linear_world, range(seeds)))


def _linear_logits(world, params, record):
    return (world.features[record] @ params["policy"])[:, None, :]


def _linear_values(world, params, record):
    """A critic that is linear in the mean features of a prompt's answers, and a constant."""
    about = jnp.mean(world.features[record], axis=1)
    return (about @ params["value"]["slope"] + params["value"]["constant"])[:, None]


LINEAR = Policy(_linear_logits)
WITH_CRITIC = Policy(_linear_logits, _linear_values)


def start_at(theta=None):
    """Parameters of both policies above, the uniform one unless a start is given."""
    value = {"slope": jnp.zeros(WIDTH), "constant": jnp.zeros(())}
    return {"policy": jnp.zeros(WIDTH) if theta is None else theta, "value": value}


def keys(seeds):
    """One key for each seed."""
    return jax.vmap(jax.random.key)(jnp.arange(seeds))
