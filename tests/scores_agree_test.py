"""Scores of the same rollouts: a policy run's compiled scoring step says what `evaluate` says.

Both pad prompts on the left and completions on the right; the run scores in chunks of whole groups,
`evaluate` all rows at once, in programs of their own. `score` and `evaluate_reward` pad whole texts
on the right to other widths, so matrix products round otherwise; see the tests of these.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import ppo_tiny
from rlhf_jax import policy_run, roles, run_folder
from rlhf_jax.learned_judge import make_learned
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.text.steps import mark_host_step_ends
from rlhf_jax.training import checkpoint
from rlhf_jax.training.keys import Purpose
from rlhf_jax.training.supervised import create_supervised_state
from rlhf_jax.types import RunState
from tests.rewards.examples import random_rollouts

RULES = ShardingRules()
TOKENIZER = "chars:" + ppo_tiny.ALPHABET
WITHIN = 1e-6  # in float32
# Models of configs/ppo_tiny.py and configs/quickstart.py, with prompt and completion tokens there.
SIZES = {"tiny": (24, 32), "small": (16, 32)}


def model_run(folder, config):
    """The folder of a model with the weights that training starts from."""
    mesh = make_mesh({"data": -1})
    run_folder.prepare(str(folder), ConfigDict(dict(seed=0, data=dict(tokenizer=TOKENIZER))),
                       {"reward": config})  # fmt: skip
    with jax.set_mesh(mesh):
        params = roles.fill(decoder(config, RULES), {}, jax.random.key(1), mesh, RULES)
        train = create_supervised_state(params, optax.sgd(1.0), mesh, role="reward")
    state = RunState(
        train=train, reference={}, rewards={}, controllers={}, carry={}, data_position={}
    )
    manager = checkpoint.open_manager(folder, keep=1, every=1)
    checkpoint.save(manager, 1, state, "{}", force=True)
    checkpoint.close(manager)
    return str(folder)


def policy_config(size, folder, chunks):
    config = ppo_tiny.get_config()
    config.model = dict(init_from=folder, remat="none", compute_dtype="float32")
    config.value.init_from = "policy"
    config.data.update(max_prompt=SIZES[size][0], name="inline", template="{prompt}")
    config.data.options = dict(prompt=("1+1=",) * 8)
    config.rollout.max_tokens = SIZES[size][1]
    learned = dict(weight=1.0, init_from=folder)
    config.rewards = ConfigDict(
        dict(
            outcome=dict(name="outcome_model", head="outcome", **learned),
            process=dict(name="process_model", head="process", transform="logit", **learned),
        )
    )
    config.updates.update(minibatches=1, microbatches=chunks)
    return config


def rollouts_of(plan):
    """Random tokens in the sizes of the plan, some of which end lines."""
    sizes, data = plan.sizes, plan.config.data
    drawn = random_rollouts(
        0, prompts=sizes.prompts, group=sizes.samples, prompt_width=data.max_prompt,
        width=sizes.max_tokens, vocab=plan.tokenizer.vocab_size,
    )  # fmt: skip
    lines = np.random.default_rng(0).random(drawn.tokens.shape) < 0.1
    pad = plan.tokenizer.pad_id
    tokens = np.where(lines, plan.tokenizer.encode("\n")[0], drawn.tokens)
    tokens = np.where(drawn.mask, tokens, pad)
    asked = drawn.prompts
    prompts = dataclasses.replace(asked, tokens=np.where(asked.mask, asked.tokens, pad))
    ends = mark_host_step_ends(tokens, drawn.mask, plan.tables)
    return dataclasses.replace(drawn, prompts=prompts, tokens=tokens, step_ends=ends)


@pytest.mark.parametrize(("size", "chunks"), [("small", 2)])
def test_evaluate_says_what_the_scoring_step_says(size, chunks, tmp_path):
    heads = ("outcome", "process")  # beside the LM head: policy and rewards from one folder
    model = named_size(size, vocab_size=len(ppo_tiny.ALPHABET) + 2, score_heads=heads)
    folder = model_run(tmp_path, model)
    plan = make_plan(policy_config(size, folder, chunks))
    rollouts = rollouts_of(plan)
    with jax.set_mesh(plan.mesh):
        run, state = policy_run.start(plan)
        scores, _ = jax.device_get(run.steps.score(state.rewards["device"], rollouts))
    assert len({round(float(x), 3) for x in scores.parts["outcome"]}) > 16
    sampler = PolicySampler(plan.config, Purpose.EVALUATE)
    paid = np.where(rollouts.step_ends & rollouts.mask, scores.process, 0).sum(axis=1)
    for label, ours in (("outcome", scores.parts["outcome"]), ("process", paid)):
        judge = make_learned(label, plan.config)(sampler)
        np.testing.assert_allclose(ours, judge(rollouts), rtol=0, atol=WITHIN)
