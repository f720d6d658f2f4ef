"""Keys are functions of their counters, and of nothing else."""

import itertools

import jax
import numpy as np

from rlhf_jax.training.keys import Purpose, step_key


def numbers(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_the_same_counters_give_the_same_key():
    assert numbers(step_key(3, Purpose.SAMPLE, 7)) == numbers(step_key(3, Purpose.SAMPLE, 7))


def test_a_traced_step_gives_the_same_key():
    traced = jax.jit(lambda step: step_key(3, Purpose.UPDATE, step))(7)
    assert numbers(traced) == numbers(step_key(3, Purpose.UPDATE, 7))


def test_all_counters_count():
    counters = list(itertools.product(range(3), Purpose, range(6)))
    assert len({numbers(step_key(*each)) for each in counters}) == len(counters)


def test_purposes_keep_their_numbers():
    """They are part of every run: a run that is resumed by later code must go on as it was."""
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "INIT_POLICY": 0,
        "INIT_VALUE": 1,
        "INIT_REWARD": 2,
        "SAMPLE": 3,
        "UPDATE": 4,
        "REWARD_UPDATE": 5,
        "CALIBRATE": 6,
        "EVALUATE": 7,
        "CONTINUE": 8,
    }
