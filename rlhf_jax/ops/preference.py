"""Losses on scores: preference pairs, correctness labels, step labels. Per item, in nats.

All labels are probabilities in [0, 1], so soft labels and label smoothing need nothing more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.masking import fill_padding, masked_mean
from rlhf_jax.types import Array


def bradley_terry(
    chosen: Float[Array, " M"],
    rejected: Float[Array, " M"],
    *,
    label: Float[Array, " M"] | float = 1.0,
    margin: Float[Array, " M"] | float = 0.0,
) -> Float[Array, " M"]:
    """−[p log σ(d − m) + (1 − p) log σ(−d − m)],  d = r_chosen − r_rejected.

    p = 1, m = 0 is the ordinary loss; m > 0 asks the better one to win by m (Touvron et al.
    2023, https://arxiv.org/abs/2307.09288, equation 2). Either side is asked for the margin, so
    swapping the two and p with 1 − p changes nothing.
    """
    difference = chosen.astype(jnp.float32) - rejected.astype(jnp.float32)
    return _cross_entropy(difference - margin, -difference - margin, label)


def correctness(scores: Float[Array, " M"], label: Float[Array, " M"]) -> Float[Array, " M"]:
    """−[z log σ(r) + (1 − z) log σ(−r)]: binary cross-entropy with the score as logit."""
    scores = scores.astype(jnp.float32)
    return _cross_entropy(scores, -scores, label)


def step_cross_entropy(
    scores: Float[Array, "M S"], labels: Float[Array, "M S"], step_ends: Bool[Array, "M S"]
) -> Float[Array, " M"]:
    """Mean over each solution's steps of the cross-entropy at the step's last token.

    L_i = 1/S_i Σ_s −[l_s log σ(r_s) + (1 − l_s) log σ(−r_s)]; a solution without steps gives 0.
    A solution of many steps weighs as much as one of few. Scores and labels elsewhere are not
    read. Lightman et al. 2023, https://arxiv.org/abs/2305.20050, with soft labels.
    """
    scores = fill_padding(scores, step_ends).astype(jnp.float32)
    labels = fill_padding(labels, step_ends)
    return masked_mean(_cross_entropy(scores, -scores, labels), step_ends, axis=-1)


def centre(chosen: Float[Array, " M"], rejected: Float[Array, " M"]) -> Float[Array, " M"]:
    """(r_chosen + r_rejected)²: holds the scores of a pair around 0, which the Bradley-Terry
    loss leaves free. Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244, section 3."""
    return jnp.square(chosen.astype(jnp.float32) + rejected.astype(jnp.float32))


def dpo_margin(
    chosen: Float[Array, " M"],
    rejected: Float[Array, " M"],
    ref_chosen: Float[Array, " M"],
    ref_rejected: Float[Array, " M"],
    *,
    beta: float,
) -> Float[Array, " M"]:
    """β [(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)], from the log-probs of
    whole sequences. The loss is the Bradley-Terry loss of this difference:
    ``bradley_terry(margin, zeros_like(margin))``.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7.
    """
    return beta * ((chosen - ref_chosen) - (rejected - ref_rejected))


def _cross_entropy(logit_true, logit_false, label):
    """−[p log σ(a) + (1 − p) log σ(b)]; log_sigmoid has no overflow at either end."""
    return -(label * jax.nn.log_sigmoid(logit_true) + (1 - label) * jax.nn.log_sigmoid(logit_false))
