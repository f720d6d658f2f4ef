"""Online DPO: the best and the worst sample of each group are a preference pair.

Guo et al. 2024, https://arxiv.org/abs/2402.04792, equation 1, with a reward in the place of the
annotator; the loss is that of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.

    L = −mean over pairs of log σ(β [log π(y+) − log π_ref(y+) − log π(y−) + log π_ref(y−)])

Log-probs are sums over the tokens of a completion. It differs from RLOO in that only the order of
the two counts, not by how much one is better; a group whose rewards are all equal has no pair.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.base import or_nan, policy_metrics, sequence_rewards, spread
from rlhf_jax.ops import groups
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.ops.surrogate import filled, policy_ratio
from rlhf_jax.types import Algorithm, Mean, Needs, Targets, Term


def online_dpo(*, beta: float | int = 0.1) -> Algorithm:
    """Direct preference optimisation on the policy's own samples.

    Args:
        beta: β per nat: how firmly the policy is held to the reference.

    Example:
        >>> online_dpo(beta=0.05).needs.reference
        True
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}; wanted a number above 0")

    @jax.named_scope("online_dpo_targets")
    def targets(experience, group_size, state):
        mask = experience.rollouts.mask
        rewards = sequence_rewards(experience.scores, mask)
        best = groups.best_of_group(rewards, group_size)
        worst = groups.worst_of_group(rewards, group_size)
        # Of equal rewards the same row is both: the sign is 0 and the group has no pair.
        sign = or_nan(best.astype(jnp.float32) - worst.astype(jnp.float32), rewards, group_size)
        chosen = jnp.asarray(mask) & (sign != 0)[:, None]
        returns = spread(rewards, mask)
        return Targets(advantages=spread(sign, mask), returns=returns, mask=chosen), state

    @jax.named_scope("online_dpo_loss")
    def loss(output, experience, targets, group_size):
        experience, targets = jax.lax.stop_gradient((experience, targets))
        mask = targets.mask
        logprobs, reference, old, sign = filled(
            mask,
            output.logprobs,
            experience.ref_logprobs,
            experience.logprobs,
            targets.advantages,
        )
        signed = masked_sum(sign * (logprobs - reference), mask, axis=-1)
        margin = beta * jnp.sum(jnp.reshape(signed, (-1, group_size)), axis=1)
        # A side without a token has log-prob 0, which is what it is; a pair needs one token.
        pairs = jnp.any(jnp.reshape(mask, (margin.shape[0], -1)), axis=1)

        def mean(x):
            kept = jnp.where(pairs, x, 0.0)
            return Mean(total=jnp.sum(kept), count=jnp.sum(pairs, dtype=jnp.float32))

        ratio = policy_ratio(logprobs, old, mask, "token")
        metrics = policy_metrics(output, jnp.zeros(mask.shape, bool), ratio, mask)
        metrics |= {"dpo/accuracy": mean(margin > 0), "dpo/margin": mean(margin)}
        return {"dpo": Term(weight=1.0, mean=mean(-jax.nn.log_sigmoid(margin)))}, metrics

    needs = Needs(reference=True, min_group=2)
    wraps = ("select",)
    return Algorithm(init=lambda: (), targets=targets, loss=loss, needs=needs, wraps=wraps)
