"""Config sections become objects; what cannot work is named before any device is touched."""

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs.ppo_tiny import get_config
from rlhf_jax import build
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.reward_checks import check_reward
from rlhf_jax.types import Needs


def changed(**fields):
    config = get_config()
    config.update_from_flattened_dict(fields)
    return config


def test_rows_are_no_longer_than_the_positions_that_a_model_learned():
    config = get_config()
    config.model.update(positions="learned", max_positions=55)
    said = "data.max_prompt=24 and rollout.max_tokens=32 for policy: rows of 56 tokens, but the"
    with pytest.raises(ValueError, match=said):
        make_plan(config)
    config.rollout.max_tokens = 31
    make_plan(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollout.prompts": 6}, "rollout.prompts=6"),
        ({"rewards.length.name": "exact_match"}, "rewards.length"),
        ({"rewards.outcome.clip": -1.0}, "rewards.outcome.clip"),
        ({"updates.minibatches": 3}, "does not divide"),
        ({"mesh.data": 3}, "3"),
        ({"algorithm.name": "ppq"}, "ppo"),
        ({"rewards.outcome.name": "outcome_modle"}, "outcome_model"),
        ({"model.name": "huge"}, "known sizes"),
        ({"model.init_from": "/does/not/exist"}, "model.init_from"),
        ({"value.init_from": "exact"}, "without a model"),
        ({"value.init_from": "/does/not/exist"}, "value.init_from='/does/not/exist' is not a"),
        ({"data.max_prompt": 3}, "max_prompt"),
        ({"data.options.modulus": 7}, "modulus=7"),
        ({"rollout.sampling.top_p": 0.0}, "top_p"),
        ({"optimizer.policy.schedule": "sine"}, "schedule='sine'"),
        ({"data.name": "arithmetics"}, "arithmetics"),
    ],
)
def test_bad_values_are_named_at_build(fields, message, tmp_path):
    config = changed(**{"data.data_dir": str(tmp_path)} | fields)
    with pytest.raises(ValueError, match=message):
        make_plan(config)


def test_unknown_keys_list_the_known_ones(tmp_path):
    config = changed(**{"data.data_dir": str(tmp_path)})
    config.algorithm = dict(name="ppo", kl_coeff=0.1)
    with pytest.raises(ValueError, match=r"kl_coeff.*kl_coef"):
        make_plan(config)


def test_rows_that_nothing_reads_are_refused(tmp_path):
    """The likeliest way there: algorithm.rehearsal was forgotten."""
    config = changed(**{"data.data_dir": str(tmp_path)})
    config.extra = dict(rehearsal=dict(kind="texts", name="inline", rows=4))
    with pytest.raises(ValueError, match=r"extra\.rehearsal is read by nothing.*rehearsal=dict"):
        make_plan(config)


def test_a_reward_without_weight_is_named(tmp_path):
    config = changed(**{"data.data_dir": str(tmp_path)})
    with config.unlocked():
        del config.rewards.length.weight
    with pytest.raises(ValueError, match=r"rewards\.length\.weight is missing"):
        make_plan(config)


def test_weights_of_zero_alone_are_refused(tmp_path):
    """A weight of 0 makes a metric of a reward; something must train."""
    config = changed(**{"data.data_dir": str(tmp_path)})
    for section in config.rewards.values():
        section.weight = 0.0
    with pytest.raises(ValueError, match=r"length.* are all 0.*metric"):
        make_plan(config)
    config.rewards.length.weight = 0.1
    make_plan(config)


def test_a_group_too_small_says_which_field_to_set():
    config = changed(**{"rollout.samples": 1})
    config.algorithm.name = "grpo"
    mesh, rules = make_mesh({"data": -1}), ShardingRules()
    with pytest.raises(ValueError, match=r"rollout\.samples=1 but grpo needs groups of 2"):
        build.rollout(config, Needs(min_group=2), mesh, rules)
    with pytest.raises(ValueError, match=r"add extra\.rehearsal"):
        build.rollout(config, Needs(extra=("rehearsal",)), mesh, rules)


def test_no_reward_is_an_error():
    with pytest.raises(ValueError, match="rewards is empty"):
        build.combined({})


def test_a_reward_is_wrapped_in_the_order_normalise_clip_shrink():
    section = ConfigDict(
        dict(name="length", weight=1.0, per_token=1.0, free=0, normalise=True, clip=1.0, shrink=0.5)
    )
    made = build.reward("length", section, {})
    state = made.init()
    assert made.calibrate is not None
    plain = build.reward("length", ConfigDict(dict(name="length", per_token=1.0, free=0)), {})
    assert plain.calibrate is None
    assert plain.name == made.name == "length"
    assert state != plain.init()


def test_only_logits_of_steps_are_aggregated():
    section = ConfigDict(dict(name="process_model", weight=1.0, aggregate="min", transform="logit"))
    check_reward("steps", section)
    with pytest.raises(ValueError, match=r"rewards.steps.aggregate: how='least'.*min, product"):
        check_reward("steps", ConfigDict(section.to_dict() | dict(aggregate="least")))
    with pytest.raises(ValueError, match=r"rewards.steps.aggregate='min' reads the logits"):
        check_reward("steps", ConfigDict(section.to_dict() | dict(transform="prob")))
    length = dict(name="length", weight=1.0, per_token=1.0, free=0, aggregate="min")
    with pytest.raises(ValueError, match=r"transform='logit', such as process_model"):
        check_reward("length", ConfigDict(length))


def test_a_factory_says_which_model_it_needs():
    assert build.reward_model(ConfigDict(dict(name="length"))) is None
    learned = build.reward_model(ConfigDict(dict(name="outcome_model", head="quality")))
    assert learned == {"lm_head": False, "score_heads": ("quality",)}


def test_sampling_values_are_traced_scalars():
    values = ConfigDict(dict(temperature=0.7, top_k=5, top_p=1.0, min_p=0.0))
    sampling = build.sampling(values)
    assert sampling.truncates
    assert sampling.temperature == jnp.float32(0.7)


def test_texts_train_no_scoring_head():
    section = dict(kind="texts", name="inline", rows=1, template="{a}", max_length=9, head="mine")
    with pytest.raises(ValueError, match=r"sources\.a\.head='mine', but texts train no scoring"):
        build.check_source("sources.a", ConfigDict(section))
