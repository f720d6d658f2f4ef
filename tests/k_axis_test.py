"""Sizes and learning rates along the K axis, in whole numbers and against a search by hand."""

import itertools
import math
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.ppo_tiny import get_config
from rlhf_jax import build
from rlhf_jax.k_axis import axis_metrics, hold
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.ops.metrics import values
from rlhf_jax.policy_plan import optimizers
from rlhf_jax.schema import check_section
from rlhf_jax.sections import TrainPolicy
from rlhf_jax.types import Needs


def section(samples, max_tokens=32, prompts=16, **axis):
    axis = dict(samples=4) | axis
    return ConfigDict(dict(prompts=prompts, samples=samples, max_tokens=max_tokens, axis=axis))


@pytest.mark.parametrize(
    ("rollout", "prompts", "lr_factor"),
    [
        (section(8), 16, 1.0),
        (section(8, lr_scale="linear"), 16, 2.0),
        (section(8, lr_scale="sqrt"), 16, math.sqrt(2.0)),
        (section(1, lr_scale="linear"), 16, 0.25),
        (section(8, hold="samples", lr_scale="linear"), 8, 1.0),
        (section(1, hold="samples"), 64, 1.0),
        (section(4, 64, hold="tokens", tokens=32, lr_scale="linear"), 8, 0.5),
        (section(8, 32, hold="tokens", tokens=64, lr_scale="sqrt"), 16, math.sqrt(2.0)),
        (section(4, 32, hold="tokens", tokens=32), 16, 1.0),
    ],
)
def test_what_is_held_stays(rollout, prompts, lr_factor):
    held = hold(rollout, multiple=4)
    assert held == (prompts, pytest.approx(lr_factor, rel=1e-12))
    found = {name: float(number) for name, number in values(axis_metrics(rollout, *held)).items()}
    assert found == pytest.approx(
        {
            "rollout/prompts": prompts,
            "rollout/samples": rollout.samples,
            "rollout/lr_factor": lr_factor,
        }
    )


def test_without_the_section_nothing_changes():
    rollout = get_config().rollout
    assert hold(rollout, multiple=8) == (rollout.prompts, 1.0)
    assert axis_metrics(rollout, rollout.prompts, 1.0) == {}


@pytest.mark.parametrize(
    ("prompts", "tokens", "multiple"), [(16, None, 4), (12, None, 2), (6, 48, 3), (5, 16, 4)]
)
def test_the_values_that_are_named_work_and_no_others(prompts, tokens, multiple):
    way = dict(hold="samples") if tokens is None else dict(hold="tokens", tokens=tokens)
    works, refused = [], {}
    for samples in range(1, 200):
        try:
            held = hold(section(samples, 32, prompts, **way), multiple=multiple)
        except ValueError as error:
            refused[samples] = str(error)
            continue
        kept = prompts * 4 * (tokens or 32)
        assert held.prompts * samples * 32 == kept and held.prompts % multiple == 0
        works.append(samples)
    named = ", ".join(map(str, works)) or "none"
    for samples, said in refused.items():
        assert f"rollout.samples={samples} with rollout.axis.hold=" in said
        assert f"Samples that work: {named}; or make" in said
        step = int(re.search(r"make rollout.prompts a multiple of (\d+)", said)[1])
        assert hold(section(samples, 32, step, **way), multiple=multiple).prompts % multiple == 0
        for fewer in itertools.islice(range(1, step), 50):
            with pytest.raises(ValueError, match="Samples that work"):
                hold(section(samples, 32, fewer, **way), multiple=multiple)
        if samples > 12:
            break


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (dict(hold="rollouts"), r"rollout.axis.hold='rollouts' is unknown; known: prompts, sam"),
        (dict(lr_scale="root"), r"rollout.axis.lr_scale='root' is unknown; known: none, sqrt, "),
        (dict(hold="tokens"), "needs rollout.axis.tokens, the max_tokens at which"),
    ],
)
def test_unknown_ways_are_named(axis, message):
    with pytest.raises(ValueError, match=message):
        hold(section(8, **axis), multiple=1)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (dict(samples=0), "rollout.axis.samples=0; wanted 1 or more"),
        (dict(samples=4, tokens=-8), "rollout.axis.tokens=-8; wanted 1 or more"),
        (dict(hold="samples"), "rollout.axis.samples is missing"),
        (dict(samples=4, held="samples"), "rollout.axis.held: no such key; did you mean 'hold'"),
    ],
)
def test_the_section_is_checked_like_every_other(axis, message):
    config = get_config()
    config.rollout.axis = axis
    with pytest.raises(ValueError, match=message):
        check_section("", config.to_dict(), TrainPolicy)


def test_plans_have_the_held_sizes_and_the_scaled_rates():
    config = get_config()  # 8 prompts of 4 samples, 2 minibatches
    config.rollout.samples = 8
    config.rollout.axis = dict(samples=4, hold="prompts", lr_scale="linear")
    mesh, rules = make_mesh({"data": 2}, jax.devices()[:2]), ShardingRules()
    sizes = build.rollout(config, Needs(min_group=2), mesh, rules)
    assert (sizes.prompts, sizes.rows, sizes.lr_factor) == (8, 32, 2.0)
    config.rollout.axis.hold = "samples"
    sizes = build.rollout(config, Needs(min_group=2), mesh, rules)
    assert (sizes.prompts, sizes.rows, sizes.lr_factor) == (4, 16, 1.0)
    config.rollout.samples = 1
    with pytest.raises(ValueError, match=r"rollout\.samples=1 but ppo needs groups of 2"):
        build.rollout(config, Needs(min_group=2), mesh, rules)
    config.rollout.samples = 16
    with pytest.raises(ValueError, match=r"a multiple of 4 .* Samples that work: 1, 2, 4, 8; or"):
        build.rollout(config, Needs(min_group=2), mesh, rules)


def test_both_rates_are_multiplied():
    """Adam's first step is the learning rate, whatever the gradient."""
    config = get_config()
    for factor in (1.0, 2.5):
        for role, made in optimizers(config, ("policy", "value"), lr_factor=factor).items():
            wanted = factor * config.optimizer[role].learning_rate / config.optimizer[role].warmup
            params = {"kernel": np.zeros((2, 2), np.float32)}
            gradients = {"kernel": np.full((2, 2), 0.1, np.float32)}
            step, _ = made.update(gradients, made.init(params), params)
            np.testing.assert_allclose(step["kernel"], -wanted, rtol=1e-3)
