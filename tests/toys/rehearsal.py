"""Selective rehearsal (Peng et al. 2023, arXiv 2309.10202) as a toy: PPO plus NLL on good rows."""

from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.ops import masking
from rlhf_jax.types import Algorithm, Term


def rehearsal(*, weight: float = 0.5, kl_coef: float = 0.01) -> Algorithm:
    base = ppo(kl_coef=kl_coef)

    def loss(output, experience, targets, group_size):
        terms, metrics = base.loss(output, experience, targets, group_size)
        nll = masking.mean_of(-output.extra["rehearsal"], experience.extra["rehearsal"].loss_mask)
        return {**terms, "rehearsal": Term(weight=weight, mean=nll)}, metrics

    return base._replace(loss=loss, needs=base.needs._replace(extra=("rehearsal",)))
