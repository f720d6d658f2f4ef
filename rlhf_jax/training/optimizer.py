"""Optimizers from keyword values: AdamW with gradient clipping and a schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

_SCHEDULES = ("constant", "cosine", "linear")
# Scales and biases are not decayed. By name, not by rank: stacked layers give scales a rank of 2.
_NOT_DECAYED = ("scale", "bias")


def make_schedule(
    learning_rate: float, schedule: str = "constant", *, warmup: int = 0, steps: int = 0
) -> optax.Schedule:
    """The learning rate as a function of the number n of updates made so far.

        n < warmup      learning_rate · (n + 1) / warmup
        "constant"      learning_rate
        "linear"        learning_rate · (1 − p)
        "cosine"        learning_rate · (1 + cos πp) / 2
        with p = (n − warmup) / (steps − warmup), at most 1

    Warm-up begins at learning_rate / warmup, not at 0, so that the first update moves.

    Args:
        steps: optimizer updates in the whole run, warm-up included; only "constant" may leave
            it out.

    Raises:
        ValueError: for an unknown schedule, or one that decays but has no steps to decay over.
    """
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; known: {', '.join(_SCHEDULES)}")
    if warmup < 0:
        raise ValueError(f"warmup={warmup}; wanted 0 or more updates")
    if schedule != "constant" and steps <= warmup:
        raise ValueError(
            f"schedule={schedule!r} decays between warmup={warmup} and steps={steps}; "
            "wanted more steps than warmup"
        )

    def rate(count):
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum((count + 1) / max(warmup, 1), 1.0)
        done = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        fall = {
            "constant": jnp.ones_like(done),
            "linear": 1 - done,
            "cosine": (1 + jnp.cos(jnp.pi * done)) / 2,
        }[schedule]
        return learning_rate * rise * fall

    return rate


def make_optimizer(
    *,
    learning_rate: float,
    schedule: str = "constant",
    warmup: int = 0,
    steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's global norm.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101. Weight decay leaves scales and
    biases alone. ``clip`` is the largest norm let through; 0 turns clipping off.

    Example:
        >>> optimizer = make_optimizer(learning_rate=1e-3, schedule="cosine", warmup=2, steps=10)
        >>> state = optimizer.init({"kernel": jnp.zeros((2, 2))})

    Raises:
        ValueError: for a negative clip, or what `make_schedule` rejects.
    """
    if clip < 0:
        raise ValueError(f"clip={clip}; wanted a norm, or 0 to turn clipping off")
    rate = make_schedule(learning_rate, schedule, warmup=warmup, steps=steps)
    adam = optax.chain(
        scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, _decay_mask),
        optax.scale_by_learning_rate(rate),
    )
    return optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam


class KeptMoments(optax.ScaleByAdamState):
    """Adam's count and moments, which stay as they are where an update is not accepted."""


def scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, that also knows whether a step is accepted.

        m ← b1 m + (1 − b1) g        v ← b2 v + (1 − b2) g²
        update = (m / (1 − b1ⁿ)) / (√(v / (1 − b2ⁿ)) + eps)        n: steps accepted so far

    Kingma and Ba 2014, https://arxiv.org/abs/1412.6980. ``update`` takes ``accept``, a scalar
    bool: where it is false the moments and their count stay, bit for bit, and the update that
    comes back means nothing. The moments that are returned are those that the update is made of:
    whoever chooses between old and new moments afterwards holds both.
    """
    plain = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def init(params: Any) -> KeptMoments:
        return KeptMoments(*plain.init(params))

    def update(updates, state, params=None, *, accept=True, **_):
        del params
        new = KeptMoments(
            count=optax.safe_increment(state.count),
            mu=optax.tree.update_moment(updates, state.mu, b1, 1),
            nu=optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2),
        )
        new = jax.tree.map(lambda n, o: jnp.where(accept, n, o), new, state)
        new = _written(new)
        mean = optax.tree.bias_correction(new.mu, b1, new.count)
        square = optax.tree.bias_correction(new.nu, b2, new.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), new

    return optax.GradientTransformationExtraArgs(init, update)


def _written(tree: Any) -> Any:
    """The same numbers. On CPUs they are written before they are read: XLA else has the parameters
    computed from the old moments, in no order with the new ones, and copies all old moments to
    write the new ones in their place. Accelerators write all in one pass."""
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(tree, cpu=barrier, default=lambda same: same)


def _decay_mask(params):
    """True for the leaves that weight decay pulls to zero."""

    def decays(path, _):
        return path[-1].key not in _NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)
