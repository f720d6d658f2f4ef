"""Random keys from counters: (seed, purpose, step). No key is ever stored, so restarts replay."""

import enum

import jax
from jaxtyping import Key

from rlhf_jax.types import Array


class Purpose(enum.IntEnum):
    """What randomness is used for; the numbers are part of every run and must not change."""

    INIT_POLICY = 0
    INIT_VALUE = 1
    INIT_REWARD = 2
    SAMPLE = 3
    UPDATE = 4
    REWARD_UPDATE = 5
    CALIBRATE = 6
    EVALUATE = 7
    CONTINUE = 8


def step_key(seed: int, purpose: Purpose, step: int | Array) -> Key[Array, ""]:
    """The key of one step's use of randomness.

    Example:
        >>> step_key(0, Purpose.SAMPLE, 7)
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)
