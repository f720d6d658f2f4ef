"""The advantage model's losses: scores that stay in bounds, beside what a prompt's answers score.

Peng et al. 2023, "Stabilizing RLHF through Advantage Model and Selective Rehearsal",
https://arxiv.org/abs/2309.10202. A pair says which answer is better and nothing about the level of
either, so a reward model's scores may be 3 higher for all answers of one task than for those of
another, and a policy then gains by writing like the better paid task. An advantage model says how
much better an answer is than what is expected of the prompt. In our reading, which was not checked
against the paper's own equations and constants:

    a(x, y)   = r(x, y) − e(x),      e(x) = E_{y' ~ π(x)} r(x, y')
    L_rank    = −log σ(a_c − a_r)
    L_bound   = −log σ(m − a_c) − log σ(m + a_r)

What is trained has three terms, each for what the others cannot see:

    L = L_rank(r) + bound_coef · L_bound(r) + expected_coef · ½ (e(x) − sg r(x, y'))²

* Ranking sees differences of one prompt's answers, in which e cancels. It cannot tell r from e, nor
  any level from any other.
* The bound decides the level of r. Its gradient in a common shift of both answers,
  σ(r_c − m) − σ(−m − r_r), is 0 where they lie evenly around 0, and grows with the distance, so
  levels of tasks vanish whether they are read in the prompt or in the answer. It is on r
  (`bound="score"`), not on r − e: there the sum r − e is all that it decides, e takes the part of a
  level that follows from the prompt, r keeps it wherever the answer shows it too, and a policy that
  answers in the style of another task is paid for that as before. `bound="advantage"` is that form,
  with gradients into both; `tests/worlds/advantage_test.py` has what it leaves.
* What a prompt's answers score after that is e's to learn, as a regression on scores of given
  answers. No gradient goes through its target: what is scored is not asked to be like what is
  expected. But both heads read one trunk, so the regression moves what r is read from, and with it
  r. Answers are sampled from the policy before it trains (importance weights π/π' are then 1)
  where the mixture has samples, else they are those of the pairs.

e does not see y, so a ranks the answers to a prompt as r does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rlhf_jax.types import Array

BOUNDS = ("score", "advantage")


class Advantage(NamedTuple):
    """The values of the losses, checked by `advantage`.

    margin: m, the size that scores of better answers stay below, and those of worse ones above −m.
    bound_coef: weight of the bound.
    expected_coef: weight of e's regression.
    bound: what is bounded, r ("score") or r − e ("advantage").
    """

    margin: float | int
    bound_coef: float | int
    expected_coef: float | int
    bound: str


def advantage(
    *,
    margin: float = 2.5,
    bound_coef: float = 1.0,
    expected_coef: float = 0.1,
    bound: str = "score",
) -> Advantage:
    """The values of the losses.

    Raises:
        ValueError: for an unknown bound, or a number that the loss cannot have.
    """
    if bound not in BOUNDS:
        raise ValueError(f"bound={bound!r}; known: {', '.join(BOUNDS)}")
    if not margin > 0:
        raise ValueError(f"margin={margin}; wanted more than 0, such as 2.5")
    if not bound_coef >= 0:
        raise ValueError(f"bound_coef={bound_coef}; wanted 0 (off) or more")
    if not expected_coef > 0:
        raise ValueError(
            f"expected_coef={expected_coef}; wanted more than 0, such as 0.1: nothing else says "
            "what is expected of a prompt"
        )
    return Advantage(margin, bound_coef, expected_coef, bound)


def bounding(
    chosen: Float[Array, " M"],
    rejected: Float[Array, " M"],
    *,
    label: Float[Array, " M"] | float = 1.0,
    margin: float = 2.5,
) -> Float[Array, " M"]:
    """p [−log σ(m − a_c) − log σ(m + a_r)] + (1 − p) [−log σ(m − a_r) − log σ(m + a_c)], in nats
    per pair; p = 1 is L_bound. Swapping the answers and p with 1 − p changes
    nothing."""
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)

    def penalty(better, worse):
        return -jax.nn.log_sigmoid(margin - better) - jax.nn.log_sigmoid(margin + worse)

    return label * penalty(chosen, rejected) + (1 - label) * penalty(rejected, chosen)


def expected_error(expected: Float[Array, " M"], scores: Float[Array, " M"]) -> Float[Array, " M"]:
    """½ (e(x) − r(x, y'))², without a gradient through the target r. Over answers y' of a prompt it
    is least at e(x) = mean r(x, y')."""
    target = jax.lax.stop_gradient(scores.astype(jnp.float32))
    return 0.5 * jnp.square(expected.astype(jnp.float32) - target)
