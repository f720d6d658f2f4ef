"""A policy run that begins with the critic alone and whose controllers move: resumed, refused."""

import jax.numpy as jnp
import pytest

from configs.ppo_tiny import get_config
from rlhf_jax import sections
from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.models.config import named_size
from rlhf_jax.policy_plan import Pretraining, make_pretraining, optimizers

TINY = named_size("tiny")
OWN = {"policy": TINY, "value": TINY}


def small(**fields):
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def pretrained(steps, **fields):
    config = small(**fields)
    with config.unlocked():
        config.value.pretrain = dict(steps=steps)
    return config


def test_without_the_key_there_is_no_pretraining():
    assert make_pretraining(small(), ppo(), OWN) == Pretraining(0, None)


def test_the_critic_learns_whole_returns_and_the_policy_keeps_its_lambda():
    config = pretrained(3)
    sections.check("train_policy", config)
    made = make_pretraining(config, ppo(), OWN)
    assert made.steps == 3 and made.algorithm.needs == ppo().needs
    # An algorithm without `value_lam` has whole returns already.
    config.algorithm = dict(name="pe_reinforce")
    assert make_pretraining(config, ppo(), OWN).steps == 3


@pytest.mark.parametrize(
    ("steps", "algorithm", "described", "message"),
    [
        (3, grpo(), OWN, "value.pretrain trains a critic, and ppo has none; leave it out"),
        (3, ppo(), {"policy": TINY}, "take 'value' out of model.score_heads, or leave value.pret"),
        (12, ppo(), OWN, r"value.pretrain.steps=12 of train.steps=12 leave none for the policy"),
    ],
)
def test_a_pretraining_that_cannot_be_is_refused(steps, algorithm, described, message):
    with pytest.raises(ValueError, match=message):
        make_pretraining(pretrained(steps), algorithm, described)


def test_bad_keys_of_it_are_named():
    with pytest.raises(ValueError, match=r"value.pretrain.steps=0; wanted 1 or more"):
        sections.check("train_policy", pretrained(0))
    config = pretrained(2)
    with config.unlocked():
        config.value.pretrain.lam = 1.0
    with pytest.raises(ValueError, match=r"value.pretrain.lam: no such key"):
        sections.check("train_policy", config)


def test_a_schedule_has_the_steps_in_which_its_role_trains():
    """Linear to 0: the policy's ends as late as the critic's, that many steps after its start."""
    config = small()
    for role in ("policy", "value"):
        config.optimizer[role] = dict(learning_rate=1.0, schedule="linear", warmup=0, eps=1e-5)
    config.train.steps, config.updates.minibatches = 10, 1
    made = optimizers(config, ("policy", "value"), pretrain=4)
    one = {"w": jnp.ones(())}
    state = {role: made[role].init(one) for role in made}
    rates = {role: [] for role in made}
    for _ in range(6):
        for role, optimizer in made.items():
            update, state[role] = optimizer.update(one, state[role], one)
            rates[role].append(float(update["w"]))
    assert rates["policy"][3] == pytest.approx(rates["policy"][0] * 3 / 6, rel=1e-3)
    assert rates["value"][3] == pytest.approx(rates["value"][0] * 7 / 10, rel=1e-3)
