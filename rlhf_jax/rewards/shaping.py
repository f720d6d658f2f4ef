"""Functions from a reward to a reward with something to remember: running statistics, references.

`length_penalty` and `scale` are interventions of Singhal et al. 2023, "A Long Way to Go",
https://arxiv.org/abs/2310.03716, against policies that only grow longer; `relative` is PAR of Fu et
al. 2025, https://arxiv.org/abs/2502.18770. Like `clip`, they change outcome scores only. What they
remember lies in the reward's state, in arrays of a fixed shape, so a run compiles once and a
resumed one goes on bit for bit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from rlhf_jax.mesh import ShardingRules, constrain, replicate
from rlhf_jax.ops.masking import masked_count, masked_mean, masked_var
from rlhf_jax.rewards.host import HostBatch
from rlhf_jax.rewards.reshape import FLAT, wrap
from rlhf_jax.types import Array, Reward, Scores

BATCHES = 10  # of running statistics
# (the reward, its state) -> the score of each record's reference answers, [R]
References = Callable[[Reward, Any], Float[np.ndarray, " R"]]


def length_penalty(
    reward: Reward,
    *,
    tokens: int,
    coef: float | int = 1.0,
    batches: int = BATCHES,
    mesh: Mesh | None = None,
) -> Reward:
    """outcome ← outcome + coef · (1 − length / tokens) · sd: intervention I.5 (PEN).

    sd is the standard deviation of the outcome over the completions of the last `batches` batches,
    the present one among them; how far "running" reaches is our reading. The authors' code has
    2 · sd · (1 − 0.01 · length), which is coef=2, tokens=100. The end-of-text token counts.

    Args:
        tokens: N, the length that costs nothing; shorter completions gain. Counted as the reward
            reads them: of a model with another tokenizer than the policy's, in its own.
        mesh: where the run's arrays lie, so that the first statistics lie there as well.

    Example:
        >>> shorter = length_penalty(reward, tokens=100, coef=2.0)
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}; wanted 1 or more")
    if not coef > 0:
        raise ValueError(f"coef={coef}; wanted a number above 0, or length_penalty left out")

    def change(outcome, mask, mean, std):
        del mean
        length = jnp.sum(mask, axis=-1, dtype=jnp.float32)
        return outcome + coef * (1 - length / tokens) * std

    return _with_statistics(reward, change, batches, mesh)


def scale(
    reward: Reward,
    *,
    limit: float | int = 0.3,
    batches: int = BATCHES,
    mesh: Mesh | None = None,
) -> Reward:
    """outcome ← min(max((outcome − mean) / sd, −limit), limit): intervention I.6 (SCALE).

    Mean and standard deviation are those of the outcome over the completions of the last `batches`
    batches, the present one among them (our reading). Outcomes that are all equal are centred and
    not scaled.

    Args:
        limit: in standard deviations; 0.3 in the paper.
        mesh: as in `length_penalty`.

    Example:
        >>> held = scale(reward, limit=0.3)
    """
    if not limit > 0:
        raise ValueError(f"limit={limit}; wanted a number above 0")

    def change(outcome, mask, mean, std):
        del mask
        return jnp.clip((outcome - mean) / jnp.where(std > FLAT, std, 1.0), -limit, limit)

    return _with_statistics(reward, change, batches, mesh)


def relative(
    reward: Reward, *, references: References, records: int, mesh: Mesh | None = None
) -> Reward:
    """outcome ← σ(r(x, y) − r(x, y_ref)), in (0, 1) and 1/2 where y is as good as the reference.

    Preference as reward (PAR), Fu et al. 2025, https://arxiv.org/abs/2502.18770. The gain above
    the reference saturates, and what lies below it keeps its slope. Our reading: the reference
    answers are given, and r(x, y_ref) is the mean of the scores of those of a prompt, held per
    record from `calibrate` on. Before it, all are 0.

    Args:
        references: asks the reward for the scores of the reference answers; called by `calibrate`.
        records: R, how many records there are; `Prompts.record` is below.
        mesh: as in `length_penalty`.

    Raises:
        ValueError: the reward learns online, so that earlier scores are another reward's.
    """
    if reward.update is not None:
        raise ValueError(
            f"{reward.name} learns while the policy does, so scores of reference answers from the "
            "start are not its own later on; leave relative out"
        )

    def init():
        return {"inner": reward.init(), "reference": _placed(np.zeros(records, np.float32), mesh)}

    def change(score, state, given):
        scores, inner = score(state["inner"], given)
        rollouts = given.rollouts if isinstance(given, HostBatch) else given
        reference = jnp.repeat(
            jnp.asarray(state["reference"])[rollouts.prompts.record], rollouts.group_size
        )
        outcome = jax.nn.sigmoid(scores.outcome - reference)
        return _replaced(scores, outcome), {**state, "inner": inner}

    def calibrate(state, rollouts):
        inner = state["inner"]
        if reward.calibrate is not None:
            inner = reward.calibrate(inner, rollouts)
        found = np.asarray(references(reward, inner), np.float32)
        return {"inner": inner, "reference": _placed(found, mesh)}

    return reward._replace(init=init, score=wrap(reward, change), calibrate=calibrate)


def _replaced(scores: Scores, outcome: Array) -> Scores:
    return Scores(outcome=outcome, process=scores.process, parts=scores.parts)


def _placed(leaves: Any, mesh: Mesh | None) -> Any:
    """Leaves of a first state where later ones will lie: else the step would compile twice."""
    return jax.tree.map(jnp.asarray, leaves) if mesh is None else replicate(leaves, mesh)


def _with_statistics(reward, change_outcome, batches, mesh):
    """``change_outcome(outcome, mask, mean, std)`` with statistics of the last batches."""
    if batches < 1:
        raise ValueError(f"batches={batches}; wanted 1 or more")

    def init():
        blank = {name: np.zeros(batches, np.float32) for name in ("count", "mean", "var")}
        ring = _placed({**blank, "seen": np.zeros((), np.int32)}, mesh)
        return {"inner": reward.init(), "ring": ring}

    def change(score, state, given):
        scores, inner = score(state["inner"], given)
        mask = given.rollouts.mask if isinstance(given, HostBatch) else given.mask
        outcome, ring = changed(state["ring"], scores.outcome, mask)
        return _replaced(scores, outcome), {"inner": inner, "ring": ring}

    @jax.jit  # one program for rewards on the host too
    def changed(ring, outcome, mask):
        ring = _pushed(ring, outcome)
        return change_outcome(outcome, mask, *_pooled(ring)), ring

    def update(state, rollouts, scores, key):
        inner, metrics = reward.update(state["inner"], rollouts, scores, key)
        return {**state, "inner": inner}, metrics

    def calibrate(state, rollouts):
        return {**state, "inner": reward.calibrate(state["inner"], rollouts)}

    return reward._replace(
        init=init,
        score=wrap(reward, change),
        update=update if reward.update is not None else None,
        calibrate=calibrate if reward.calibrate is not None else None,
    )


def _pushed(ring, outcome):
    """The ring with a batch's count, mean and variance in place of the oldest."""
    finite = jnp.isfinite(outcome)  # one NaN would stay for as many batches as the ring has
    found = {
        "count": masked_count(finite),
        "mean": masked_mean(outcome, finite),
        "var": masked_var(outcome, finite),
    }
    place = ring["seen"] % ring["mean"].shape[0]
    pushed = {name: ring[name].at[place].set(value) for name, value in found.items()}
    pushed["seen"] = ring["seen"] + 1
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim, ShardingRules()), pushed)


def _pooled(ring):
    """Mean and standard deviation over all completions that the ring knows of."""
    total = jnp.maximum(jnp.sum(ring["count"]), 1.0)
    mean = jnp.sum(ring["count"] * ring["mean"]) / total
    spread = ring["var"] + jnp.square(ring["mean"] - mean)
    return mean, jnp.sqrt(jnp.sum(ring["count"] * spread) / total)
