"""PPO: token rewards with a KL penalty, a learned critic, generalised advantage estimation.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155.

    r_t = process_t + outcome at the last token − β KL_t
    A   = whiten(GAE(r, V_old; λ)),   R = GAE(r, V_old; λ_V) + V_old
    L   = −mean min(ρ A, clip(ρ) A) + c_V ½ mean max((V − R)², (clip(V) − R)²) − c_H mean H

Means are over all valid tokens of the minibatch. It differs from GRPO in the critic (credit per
token instead of one baseline per group) and in where the KL stands (reward instead of loss).
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import drivable, driven, policy_terms, token_rewards
from rlhf_jax.ops import masking
from rlhf_jax.ops.returns import gae, length_adaptive_lambda
from rlhf_jax.ops.surrogate import Surrogate, aggregate, check_surrogate, filled, value_error
from rlhf_jax.types import Algorithm, Needs, Targets, Term


def ppo(
    *,
    gamma: float | int = 1.0,
    lam: float | int | None = None,
    lam_alpha: float | int | None = None,
    value_lam: float | int | None = None,
    kl_coef: float | int = 0.02,
    kl_estimator: str = "k1",
    kl_place: str = "reward",
    clip: float | int = 0.2,
    clip_high: float | int | None = None,
    value_clip: float | int | None = 0.2,
    value_coef: float | int = 1.0,
    entropy_coef: float | int = 0.0,
    dual_clip: float | int | None = 3.0,
    whiten: bool = True,
) -> Algorithm:
    """Proximal policy optimisation with its own critic.

    Args:
        gamma: discount per token.
        lam: λ of the advantage estimate; 1 is Monte Carlo. None = 0.95, or what `lam_alpha` says.
        lam_alpha: α of λ = 1 − 1/(α tokens) for each completion in place of `lam`, and 0 for those
            of 1/α tokens or fewer (Yue et al. 2025, VAPO, https://arxiv.org/abs/2504.05118: 0.05).
        value_lam: λ of what the critic learns; None = `lam`. 1 takes the critic's own bias out of
            its targets (Yuan et al. 2025, VC-PPO, https://arxiv.org/abs/2503.01491).
        kl_coef: β, per nat of divergence from the reference; 0 needs no reference.
        kl_estimator: "k1", "k2", "k3" or "k3+".
        kl_place: "reward", or "loss" for a term that is differentiated.
        clip: ε of the ratio, on both sides unless `clip_high` is given.
        clip_high: ε above 1.
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
    lam = _one_lambda(lam, lam_alpha)
    _check(gamma=gamma, lam=lam, value_lam=value_lam, clip=clip)
    _check_value(value_clip, value_coef)
    surrogate = Surrogate(
        clip_low=clip,
        clip_high=clip if clip_high is None else clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_place=kl_place,
        entropy_coef=entropy_coef,
    )
    check_surrogate(surrogate)

    @jax.named_scope("ppo_targets")
    def targets(experience, group_size, state):
        del group_size  # every completion has its own baseline, the critic
        mask = experience.rollouts.mask
        beta = driven(experience, surrogate.reward_kl)
        rewards = token_rewards(experience, kl_coef=beta, estimator=kl_estimator)
        actor_lam = lam if lam_alpha is None else length_adaptive_lambda(mask, lam_alpha)
        advantages, returns = gae(rewards, experience.values, mask, gamma=gamma, lam=actor_lam)
        if value_lam not in (None, lam):
            _, returns = gae(rewards, experience.values, mask, gamma=gamma, lam=value_lam)
        if whiten:
            advantages = masking.whiten(advantages, mask)
        return Targets(advantages=advantages, returns=returns, mask=jnp.asarray(mask)), state

    @jax.named_scope("ppo_loss")
    def loss(output, experience, targets, group_size):
        del group_size
        terms, metrics = policy_terms(output, experience, targets, surrogate)
        mask = targets.mask
        old_values, returns = jax.lax.stop_gradient((experience.values, targets.returns))
        values, old_values, returns = filled(mask, output.scores["value"], old_values, returns)
        value = value_error(values, old_values, returns, clip=value_clip)
        terms["value"] = Term(weight=value_coef, mean=aggregate(value, mask, "token_mean"))
        error = masking.mean_of(jnp.square(values - returns), mask)
        return terms, metrics | {"value/squared_error": error}

    needs = Needs(value=True, reference=kl_coef != 0)
    return Algorithm(lambda: (), targets, loss, needs, kl_coef=drivable(kl_coef))


def _one_lambda(lam, alpha):
    """λ of all completions: 0.95 unless said, None where α says it of each; ValueError for both."""
    if alpha is None:
        return 0.95 if lam is None else lam
    if lam is not None:
        raise ValueError(f"ppo: lam={lam} and lam_alpha={alpha} are both λ; leave one of them out")
    if not alpha > 0:
        raise ValueError(f"ppo: lam_alpha={alpha}; wanted more than 0, such as 0.05")
    return None


def _check_value(clip, coef):
    """Raises ValueError for a value term that could not be."""
    if clip is not None and not clip > 0:
        raise ValueError(f"ppo: value_clip={clip}; wanted more than 0, or None for free")
    if not coef >= 0:
        raise ValueError(f"ppo: value_coef={coef}; wanted 0 or more")


def _check(**numbers):
    """Raises ValueError for what must lie between 0 and 1; a ratio is never below 0."""
    for name, number in numbers.items():
        if number is not None and not 0 <= number <= 1:
            raise ValueError(f"ppo: {name}={number}; wanted a number from 0 to 1")
