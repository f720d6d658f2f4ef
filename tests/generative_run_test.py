"""A generative reward in a policy run: it pays what its model says."""

import jax
import numpy as np
from ml_collections import ConfigDict

from configs.ppo_tiny import get_config
from rlhf_jax import policy_run
from rlhf_jax.models.completions import answer_logits
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.train_policy import score_device
from rlhf_jax.training.keys import Purpose, step_key

ASKED = dict(question="\n=?", yes="+", no="-")


def small_config(**judge):
    config = get_config()
    config.model = dict(name="tiny", init_from="", layers=1, remat="none")
    config.data.options.update(train=24, test=8)
    config.algorithm = dict(name="rloo", kl_coef=0.02)
    section = dict(name="generative_model", weight=1.0, init_from="", space="logit")
    config.rewards = ConfigDict(dict(judge=section | ASKED | judge))
    return config


def test_it_pays_what_the_policys_own_start_says_of_each_completion():
    plan = make_plan(small_config())
    with jax.set_mesh(plan.mesh):
        run, state = policy_run.start(plan)
        rollouts = run.sample(state, 0, step_key(0, Purpose.SAMPLE, 0))
        scores, _ = score_device(run, state.rewards, state.reference, rollouts)
        ids = [np.array(plan.tokenizer.encode(text), np.int32) for text in ("\n=?", "+-")]
        policy = run.plan.models.policy
        logits = answer_logits(policy, state.train.params["policy"], {}, rollouts, *ids)
    assert len(set(np.asarray(scores.outcome).tolist())) > 16
    np.testing.assert_allclose(scores.outcome, logits[:, 0] - logits[:, 1], atol=1e-5)
