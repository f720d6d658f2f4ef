"""A function from an algorithm to an algorithm with one more term, on rows of texts.

Not a wrapper of `algorithms.wrappers`, which change targets alone: this one adds to the loss and
leaves everything else as it was, so it goes around any algorithm. No member of the shelf.
"""

import jax

from rlhf_jax.ops.masking import mean_of
from rlhf_jax.types import Algorithm, Term

REHEARSAL = "rehearsal"  # the auxiliary rows that are read, `Experience.extra`


def rehearsed(algorithm: Algorithm, *, weight: float | int) -> Algorithm:
    """L ← L + weight · NLL(D_R): the policy keeps saying what it said well before.

        NLL(D_R) = −mean over the trained tokens of the rows of log π

    Selective rehearsal, Peng et al. 2023, https://arxiv.org/abs/2309.10202, where the rows are the
    best of each cluster of the policy's earlier answers (`rlhf_jax.select_rehearsal`). This is our
    reading of it, which was not checked against the paper's equations. Any rows of texts serve.
    Log-probs are at temperature 1, whatever the policy is sampled at.

    Args:
        weight: per nat and token, above 0. What is right depends on the scale of the other terms.

    Example:
        >>> careful = rehearsed(ppo(), weight=0.1)
        >>> careful.needs.extra
        ('rehearsal',)
    """
    if not weight > 0:
        raise ValueError(f"weight={weight}; wanted a number above 0, or rehearsal left out")

    @jax.named_scope("rehearsal_loss")
    def loss(output, experience, targets, group_size):
        terms, metrics = algorithm.loss(output, experience, targets, group_size)
        nll = mean_of(-output.extra[REHEARSAL], experience.extra[REHEARSAL].loss_mask)
        return {**terms, REHEARSAL: Term(weight=weight, mean=nll)}, metrics

    needs = algorithm.needs
    if REHEARSAL not in needs.extra:
        needs = needs._replace(extra=(*needs.extra, REHEARSAL))
    return algorithm._replace(loss=loss, needs=needs)
