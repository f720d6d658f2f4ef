"""Rewards as values: how to make one, and how several become one.

A reward says scores; what enters the return is made of them in this order:
aggregate steps to an outcome -> normalise by frozen reference statistics -> relative to reference
answers -> clip -> shrink -> length_penalty -> scale, each a function from a reward to a reward, and
then `combine` weights and adds. `Scores.parts` stay what
each source said, before any of it. Everything that a new reward needs is imported from here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards.host import Decode, HostScore, Records, host_reward
from rlhf_jax.rewards.reshape import aggregate_steps, clip, normalise, shrink
from rlhf_jax.rewards.shaping import length_penalty, relative, scale
from rlhf_jax.types import Array, Params, Reward, Rollouts, Scores

__all__ = [
    "Decode",
    "Records",
    "add_scores",
    "aggregate_steps",
    "begin_once",
    "clip",
    "combine",
    "device_reward",
    "host_reward",
    "learned_state",
    "lend_base",
    "length_penalty",
    "normalise",
    "outcome_scores",
    "process_scores",
    "relative",
    "scale",
    "shrink",
    "split_places",
]

Weighted = Mapping[str, tuple[Reward, float | int]]
_BASE = "lent_base"  # no label of a reward


def learned_state(model: Model, params: Params) -> dict[str, Params]:
    """The state of a reward that is a model: {"params", "lent_base"}.

    Where `params` are adapters and heads alone, the base under them is not the reward's own: it
    is lent for a call (`lend_base`) and kept nowhere else. Where they are the whole, there is no
    such place.
    """
    lent = {_BASE: {}} if model.config.lora_rank and "embed" not in params else {}
    return {"params": params, **lent}


def begin_once(reward: Reward) -> Reward:
    """A reward that gives its parameters away: `init` works once, and holds nothing after it.

    Whatever wraps the reward keeps its `init` for as long as it lives. Parameters held there would
    lie on the devices beside the state that was made of them, which updates replace.

    Raises:
        RuntimeError: by a second `init`.
    """
    name, held = reward.name, [reward.init]  # and not the reward itself

    def init():
        if not held:
            raise RuntimeError(
                f"{name} gave its parameters away with its first state; keep that state, or "
                "make the reward again"
            )
        return held.pop()()

    return reward._replace(init=init)


def lend_base(state: Any, base: Params) -> Any:
    """A reward's state with `base` in every place that is kept for one; {} takes it back."""
    if not isinstance(state, dict):
        return state
    return {name: base if name == _BASE else lend_base(own, base) for name, own in state.items()}


def outcome_scores(name: str, outcome: Float[Array, " B"], like: Rollouts) -> Scores:
    """Scores of a source that only judges whole completions."""
    outcome = jnp.asarray(outcome, jnp.float32)
    return Scores(
        outcome=outcome,
        process=jnp.zeros(like.mask.shape, jnp.float32),
        parts={name: outcome},
    )


def process_scores(name: str, process: Float[Array, "B T"]) -> Scores:
    """Scores of a source that judges steps; its part is the sum over a completion."""
    process = jnp.asarray(process, jnp.float32)
    total = jnp.sum(process, axis=-1)
    return Scores(outcome=jnp.zeros_like(total), process=process, parts={name: total})


def device_reward(name: str, fn: Callable[[Rollouts], Array]) -> Reward:
    """A reward without parameters: a pure function from rollouts to one number per completion.

    Example:
        >>> digits = device_reward("short", lambda rollouts: -rollouts.mask.sum(-1))
    """

    def score(state, rollouts):
        return outcome_scores(name, fn(rollouts).astype(jnp.float32), rollouts), state

    return Reward(name=name, where="device", init=dict, score=score)


def _judge(score, state, batch):
    """One member's scores, from a batch that is shared if the member can read it."""
    if isinstance(score, HostScore):
        return score.judge(state, batch)
    return score(state, batch.rollouts)


def _relabel(parts, name, label):
    """Parts named after their reward are named after its label in the config instead."""
    renamed = {}
    for part, value in parts.items():
        if part == name or part.startswith(f"{name}/"):
            renamed[label + part[len(name) :]] = value
        else:
            renamed[f"{label}/{part}"] = value
    return renamed


def _weighted(weight, values):
    """weight · values; 0 for the weight 0, whatever the values are (0 · inf is NaN)."""
    return weight * values if weight else jnp.zeros_like(values)


def combine(rewards: Weighted) -> Reward:
    """The weighted sum of rewards of one place is again a reward: Σ weight · score.

    `parts` hold what each member said, unweighted, by label; the state is a dict by label. A
    member of weight 0 is a metric: it is asked and logged like the others, and nothing of it
    enters the sum, a NaN or an infinity neither.

    Raises:
        ValueError: for no rewards, or for rewards of both places.
    """
    places = sorted({reward.where for reward, _ in rewards.values()})
    if len(places) != 1:
        raise ValueError(
            f"combine takes rewards of one place, got {places or 'none'} from {sorted(rewards)}; "
            "split_places separates rewards on the device from those on the host"
        )

    def weigh(score_one, state):
        outcome, process, parts, states = 0.0, 0.0, {}, {}
        for label, (reward, weight) in rewards.items():
            scores, states[label] = score_one(reward.score, state[label])
            outcome = outcome + _weighted(weight, scores.outcome)
            process = process + _weighted(weight, scores.process)
            parts |= _relabel(scores.parts, reward.name, label)
        return Scores(outcome=outcome, process=process, parts=parts), states

    def score(state, rollouts):
        return weigh(lambda one, own: one(own, rollouts), state)

    def judge(state, batch):
        return weigh(lambda one, own: _judge(one, own, batch), state)

    def update(state, rollouts, scores, key):
        states, metrics = dict(state), {}
        for number, label in enumerate(sorted(rewards)):
            learner = rewards[label][0].update
            if learner is not None:
                own_key = jax.random.fold_in(key, number)
                states[label], found = learner(state[label], rollouts, scores, own_key)
                metrics |= {f"{label}/{name}": mean for name, mean in found.items()}
        return states, metrics

    def calibrate(state, rollouts):
        return {
            label: reward.calibrate(state[label], rollouts) if reward.calibrate else state[label]
            for label, (reward, _) in rewards.items()
        }

    members = [reward for reward, _ in rewards.values()]
    return Reward(
        name="combine",
        where=places[0],
        init=lambda: {label: reward.init() for label, (reward, _) in rewards.items()},
        score=HostScore(judge) if places[0] == "host" else score,
        update=update if any(member.update for member in members) else None,
        calibrate=calibrate if any(member.calibrate for member in members) else None,
    )


def split_places(rewards: Weighted) -> tuple[Weighted, Weighted]:
    """(rewards on the device, rewards on the host), labels and weights kept."""
    unknown = {r.where for r, _ in rewards.values()} - {"device", "host"}
    if unknown:
        raise ValueError(f"Reward.where is {sorted(unknown)}, wanted 'device' or 'host'")
    device = {label: pair for label, pair in rewards.items() if pair[0].where == "device"}
    return device, {label: pair for label, pair in rewards.items() if label not in device}


def add_scores(a: Scores, b: Scores) -> Scores:
    """The sum of two sources' scores, with the parts of both."""
    twice = sorted(a.parts.keys() & b.parts.keys())
    if twice:
        raise ValueError(f"both scores have parts {twice}; give the rewards different labels")
    return Scores(
        outcome=a.outcome + b.outcome,
        process=a.process + b.process,
        parts={**a.parts, **b.parts},
    )
