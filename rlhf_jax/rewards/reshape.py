"""Functions from a reward to a reward: aggregate steps, normalise, then clip, then shrink.

`clip` and `shrink` act on outcome scores only. Process scores telescope (what a solution gains
step by step it must lose again when it goes back), and bending gains and losses differently would
pay a policy for going wrong and mending it.
"""

import jax.numpy as jnp

from rlhf_jax.ops.step_labels import aggregate, check_how
from rlhf_jax.rewards.host import HostBatch, HostScore
from rlhf_jax.types import Reward, Scores

FLAT = 1e-6  # a spread below this is a constant score, which is centred but not scaled


def wrap(reward, change):
    """`score` run through ``change(score, state, given)``; one on the host stays one."""
    inner = reward.score
    if isinstance(inner, HostScore):
        return HostScore(lambda state, batch: change(inner.judge, state, batch))
    return lambda state, rollouts: change(inner, state, rollouts)


def aggregate_steps(reward: Reward, how: str) -> Reward:
    """outcome ← outcome + A(process at step ends),  process ← 0: one score to rank solutions by.

    A is `ops.step_labels.aggregate`: min, product, mean, last, sum. It reads the logits of steps,
    as a process model with ``transform="logit"`` says them. `parts` stay as the source said them.

    Example:
        >>> steps = process_model(model=model, params=params, transform="logit")
        >>> weakest = aggregate_steps(steps, "min")
    """
    check_how(how)

    def change(score, state, given):
        scores, state = score(state, given)
        rollouts = given.rollouts if isinstance(given, HostBatch) else given
        ends = rollouts.step_ends & rollouts.mask
        changed = Scores(
            outcome=scores.outcome + aggregate(scores.process, ends, how=how),
            process=jnp.zeros_like(scores.process),
            parts=scores.parts,
        )
        return changed, state

    return reward._replace(score=wrap(reward, change))


def normalise(reward: Reward) -> Reward:
    """Scales scores by the statistics of a reference batch, frozen by `calibrate`.

    outcome ← (outcome − mean) / std            over completions of the reference
    process ← process / std(Σ_t process)        not centred: a step that says nothing stays at 0

    Before `calibrate` the statistics are 0 and 1, so nothing is changed. A score that is constant
    over the reference batch is centred and not scaled. `parts` stay as the source said them.
    """

    def init():
        return {
            "inner": reward.init(),
            "mean": jnp.zeros(()),
            "std": jnp.ones(()),
            "process_std": jnp.ones(()),
        }

    def change(score, state, given):
        scores, inner = score(state["inner"], given)
        scaled = Scores(
            outcome=(scores.outcome - state["mean"]) / state["std"],
            process=scores.process / state["process_std"],
            parts=scores.parts,
        )
        return scaled, {**state, "inner": inner}

    def spread_of(x):
        std = jnp.std(x)
        return jnp.where(std > FLAT, std, 1.0)

    def calibrate(state, rollouts):
        inner = state["inner"]
        if reward.calibrate is not None:
            inner = reward.calibrate(inner, rollouts)
        scores, inner = reward.score(inner, rollouts)
        return {
            "inner": inner,
            "mean": jnp.mean(scores.outcome),
            "std": spread_of(scores.outcome),
            "process_std": spread_of(jnp.sum(scores.process, axis=-1)),
        }

    def update(state, rollouts, scores, key):
        inner, metrics = reward.update(state["inner"], rollouts, scores, key)
        return {**state, "inner": inner}, metrics

    return reward._replace(
        init=init,
        score=wrap(reward, change),
        update=update if reward.update is not None else None,
        calibrate=calibrate,
    )


def _change_outcome(reward, fn):
    def change(score, state, given):
        scores, state = score(state, given)
        changed = Scores(outcome=fn(scores.outcome), process=scores.process, parts=scores.parts)
        return changed, state

    return reward._replace(score=wrap(reward, change))


def clip(reward: Reward, limit: float | int) -> Reward:
    """outcome ← min(max(outcome, −limit), limit); in standard deviations after `normalise`."""
    if not limit > 0:
        raise ValueError(f"clip: limit={limit}, wanted a number above 0")
    return _change_outcome(reward, lambda outcome: jnp.clip(outcome, -limit, limit))


def shrink(reward: Reward, negative: float | int, positive: float | int = 1.0) -> Reward:
    """outcome ← positive · outcome where it is ≥ 0, negative · outcome where it is below.

    With negative < positive a few scores far below the rest move the policy less (0.2 to 0.5
    where scores have a heavy negative tail and are not clipped).
    """
    if not 0 < negative <= positive:
        raise ValueError(
            f"shrink: negative={negative}, positive={positive}, wanted 0 < negative <= positive"
        )
    return _change_outcome(
        reward, lambda outcome: jnp.where(outcome >= 0, positive * outcome, negative * outcome)
    )
