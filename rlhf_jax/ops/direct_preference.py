"""Direct preference optimisation: losses of a policy on pairs of answers. Per pair, in nats.

The reward that a policy π stands for is how far it moved from its reference (Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290, equation 5): r(y) = β Δ(y), up to what is the same for all answers
to a prompt, with Δ(y) = log π(y) − log π_ref(y) over the tokens of the answer, or their mean. From

    d = scale (Δ_c − Δ_r) + α (|y_c| − |y_r|)

a loss f of a pair whose first answer is better with probability p, and should win by m, is

    p f(d − m) + (1 − p) f(−d − m),        p ← (1 − ε) p + ε (1 − p)

so swapping the answers and p with 1 − p changes nothing. ε is conservative DPO's share of wrong
labels (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).

    name           f(x)              scale  Δ     source
    sigmoid        −log σ(x)         β      sum   Rafailov et al. 2023, equation 7
    sigmoid_norm   −log σ(x)         β      mean  Lambert et al. 2024 (Tulu 3),
                                                  https://arxiv.org/abs/2411.15124
    hinge          max(0, 1 − x)     β      sum   Zhao et al. 2023 (SLiC-HF), with a reference as
                                                  in https://arxiv.org/abs/2309.06657
    ipo            (x − 1/(2β))²     1      mean  Azar et al. 2023,
                                                  https://arxiv.org/abs/2310.12036, equation 17

IPO's equation has whole answers; its authors recommend the mean over tokens since
(https://huggingface.co/blog/pref-tuning), so that 1/(2β) asks the same of short and long answers.

A single answer that is right with probability z trains the same reward by
−[z log σ(r) + (1 − z) log σ(−r)], r = β Δ(y) with Δ a sum (Yuan et al. 2024,
https://arxiv.org/abs/2412.01981): `implicit_correctness`.

α > 0 takes length out of the preference (R-DPO, Park et al. 2024,
https://arxiv.org/abs/2403.19159): a policy that pays α for each token stands for the reward
β Δ + α |y|. Where the better answer is the longer one, its length explains a part of that, and the
policy is asked for less.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.ops.masking import masked_count, masked_mean, masked_sum
from rlhf_jax.ops.preference import correctness
from rlhf_jax.types import Array

LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo")
MEANS = ("sigmoid_norm", "ipo")  # those whose Δ is a mean over tokens


class DirectPreference(NamedTuple):
    """The values of one loss, checked by `direct_preference`.

    loss: see the module's table.
    beta: β, how much a reward weighs against the KL to the reference.
    label_smoothing: ε, the share of labels that are taken to be wrong.
    length_coef: α per token.
    nll_coef: weight of the answers' own negative log-likelihood; see `answer_nll`.
    """

    loss: str
    beta: float | int
    label_smoothing: float | int
    length_coef: float | int
    nll_coef: float | int


class Answers(NamedTuple):
    """What pairs say of one of their answers: Δ, log π as a sum, and their length in tokens."""

    change: Float[Array, " M"]
    logprob: Float[Array, " M"]
    length: Float[Array, " M"]


def direct_preference(
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_coef: float = 0.0,
    nll_coef: float = 0.0,
) -> DirectPreference:
    """The values of a loss; those left out are ordinary DPO.

    Raises:
        ValueError: for an unknown loss, or a number that the loss cannot have.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}; known: {', '.join(LOSSES)}")
    if not beta > 0:
        raise ValueError(
            f"beta={beta}; wanted more than 0, such as 0.1: the smaller, the farther from the "
            "reference the policy may go"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing}; wanted a share of wrong labels from 0 to below "
            "0.5, at which labels say nothing"
        )
    for name, value in (("length_coef", length_coef), ("nll_coef", nll_coef)):
        if not value >= 0:
            raise ValueError(f"{name}={value}; wanted 0 (off) or more")
    return DirectPreference(loss, beta, label_smoothing, length_coef, nll_coef)


def answers(
    values: DirectPreference,
    logprobs: Float[Array, "M S"],
    reference: Float[Array, "M S"],
    counted: Bool[Array, "M S"],
) -> Answers:
    """Sums up the log-probs of answers, whose tokens `counted` marks; nothing else is read.

    Δ is summed from differences of tokens: sums of whole answers are large, their difference small.
    """
    change = masked_mean if values.loss in MEANS else masked_sum
    return Answers(
        change=change(logprobs - reference, counted, axis=-1),
        logprob=masked_sum(logprobs, counted, axis=-1),
        length=masked_count(counted, axis=-1),
    )


def direct_loss(
    values: DirectPreference,
    chosen: Answers,
    rejected: Answers,
    *,
    label: Float[Array, " M"],
    margin: Float[Array, " M"],
) -> Float[Array, " M"]:
    """p f(d − m) + (1 − p) f(−d − m); see the module. A policy that is its reference, on pairs
    without a margin and with α = 0, has log 2, 1 (hinge) or 1/(4β²) (ipo)."""
    scale = 1.0 if values.loss == "ipo" else values.beta
    difference = scale * (chosen.change - rejected.change)
    difference += values.length_coef * (chosen.length - rejected.length)
    p = (1 - values.label_smoothing) * label + values.label_smoothing * (1 - label)
    right, wrong = _penalty(values, difference - margin), _penalty(values, -difference - margin)
    return p * right + (1 - p) * wrong


def answer_nll(
    chosen: Answers, rejected: Answers, *, label: Float[Array, " M"]
) -> Float[Array, " M"]:
    """−[p log π(y_c) / |y_c| + (1 − p) log π(y_r) / |y_r|]: holds up the likelihood of the better
    answer, which a difference of two leaves free to fall.

    Pang et al. 2024, https://arxiv.org/abs/2404.19733, equation 1 (there p = 1).
    """
    each = [one.logprob / jnp.maximum(one.length, 1.0) for one in (chosen, rejected)]
    return -(label * each[0] + (1 - label) * each[1])


def implicit_reward(values: DirectPreference, one: Answers) -> Float[Array, " M"]:
    """β Δ(y), with the Δ of the loss: sum or mean."""
    return values.beta * one.change


def implicit_correctness(
    values: DirectPreference, one: Answers, *, label: Float[Array, " M"]
) -> Float[Array, " M"]:
    """−[z log σ(r) + (1 − z) log σ(−r)] with r = β Δ(y),  z ← (1 − ε) z + ε (1 − z). In nats.

    The outcome model whose score is a log-ratio: every prefix of it has a score too, so what each
    token adds, β (log π − log π_ref), is a process reward that no step label taught. A policy that
    is its reference has log 2. Yuan et al. 2024, https://arxiv.org/abs/2412.01981.
    """
    z = (1 - values.label_smoothing) * label + values.label_smoothing * (1 - label)
    return correctness(implicit_reward(values, one), z)


def _penalty(values: DirectPreference, x: Float[Array, " M"]) -> Float[Array, " M"]:
    """f of the module's table."""
    match values.loss:
        case "hinge":
            return jax.nn.relu(1 - x)
        case "ipo":
            return jnp.square(x - 1 / (2 * values.beta))
        case _:
            return -jax.nn.log_sigmoid(x)
