"""Optimizers from keyword values: AdamW with gradient clipping and a schedule."""

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
    adam = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_decay_mask)
    return optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam


def _decay_mask(params):
    """True for the leaves that weight decay pulls to zero."""

    def decays(path, _):
        return path[-1].key not in _NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)
