"""PPO: token rewards with a KL penalty, a learned critic, generalised advantage estimation.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155.

    r_t = process_t + outcome at the last token − β KL_t
    A   = whiten(GAE(r, V_old)),   R = A_unwhitened + V_old
    L   = −mean min(ρ A, clip(ρ) A) + c_V ½ mean max((V − R)², (clip(V) − R)²) − c_H mean H

Means are over all valid tokens of the minibatch. It differs from GRPO in the critic (credit per
token instead of one baseline per group) and in where the KL stands (reward instead of loss).
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import policy_metrics, token_rewards
from rlhf_jax.ops import masking
from rlhf_jax.ops.divergence import check_estimator
from rlhf_jax.ops.returns import gae
from rlhf_jax.ops.surrogate import aggregate, clipped_surrogate, filled, value_error
from rlhf_jax.types import Algorithm, Needs, Targets, Term


def ppo(
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_coef: float = 0.02,
    kl_estimator: str = "k1",
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    value_coef: float = 1.0,
    entropy_coef: float = 0.0,
    dual_clip: float | None = 3.0,
    whiten: bool = True,
) -> Algorithm:
    """Proximal policy optimisation with its own critic.

    Args:
        gamma: discount per token.
        lam: λ of the advantage estimate; 1 is Monte Carlo.
        kl_coef: β, reward per nat of divergence from the reference; 0 needs no reference.
        kl_estimator: "k1", "k2" or "k3".
        clip: ε of the ratio, on both sides.
        value_clip: how far a value may move from the old one, in units of reward; None = free.
        value_coef: weight of the value term.
        entropy_coef: weight of the entropy bonus, per nat; 0 leaves the term out.
        dual_clip: largest ratio that counts where the advantage is negative; None = off.
        whiten: scales advantages to mean 0 and variance 1 over the batch.

    Example:
        >>> algorithm = ppo(kl_coef=0.05)
        >>> algorithm.needs.value
        True
    """
    check_estimator(kl_estimator)
    _check_share("gamma", gamma)
    _check_share("lam", lam)
    if dual_clip is not None and dual_clip <= 1.0 + clip:
        raise ValueError(f"ppo: dual_clip={dual_clip}; wanted more than 1 + clip = {1.0 + clip}")

    @jax.named_scope("ppo_targets")
    def targets(experience, group_size, state):
        del group_size  # every completion has its own baseline, the critic
        mask = experience.rollouts.mask
        rewards = token_rewards(experience, kl_coef=kl_coef, estimator=kl_estimator)
        advantages, returns = gae(rewards, experience.values, mask, gamma=gamma, lam=lam)
        if whiten:
            advantages = masking.whiten(advantages, mask)
        return Targets(advantages=advantages, returns=returns, mask=jnp.asarray(mask)), state

    @jax.named_scope("ppo_loss")
    def loss(output, experience, targets, group_size):
        del group_size
        experience, targets = jax.lax.stop_gradient((experience, targets))
        mask = targets.mask
        logprobs, values = filled(mask, output.logprobs, output.scores["value"])
        old, old_values = filled(mask, experience.logprobs, experience.values)
        advantages, returns = filled(mask, targets.advantages, targets.returns)
        policy, clipped, ratio = clipped_surrogate(
            logprobs, old, advantages, clip_low=clip, clip_high=clip, dual_clip=dual_clip
        )
        value = value_error(values, old_values, returns, clip=value_clip)
        terms = {
            "policy": Term(weight=1.0, mean=aggregate(policy, mask, "token_mean")),
            "value": Term(weight=value_coef, mean=aggregate(value, mask, "token_mean")),
        }
        if entropy_coef:
            entropy = masking.mean_of(output.entropy, mask)
            terms["entropy"] = Term(weight=-entropy_coef, mean=entropy)
        error = masking.mean_of(jnp.square(values - returns), mask)
        metrics = policy_metrics(output, clipped, ratio, mask) | {"value/squared_error": error}
        return terms, metrics

    needs = Needs(value=True, reference=kl_coef != 0)
    return Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs)


def _check_share(name, number):
    if not 0 <= number <= 1:
        raise ValueError(f"ppo: {name}={number}; wanted a number from 0 to 1")
