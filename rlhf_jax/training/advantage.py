"""What pairs and sampled answers say to an advantage model; see `rlhf_jax.ops.advantage`."""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from rlhf_jax.models.completions import expected_scores
from rlhf_jax.models.heads import EXPECTED_HEAD
from rlhf_jax.ops.advantage import Advantage, bounding, expected_error
from rlhf_jax.ops.masking import mean_of
from rlhf_jax.types import Array, Labelled, Mean, Metrics, Mixture, Texts


def samples_given(mixture: Mixture) -> bool:
    """Whether a mixture has answers that were sampled: texts, or texts with correctness labels.
    They alone say then what is expected of a prompt, and not the answers of pairs."""
    return any(isinstance(rows, Texts | Labelled) for rows in mixture.values())


def pair_terms(
    values: Advantage,
    scores: dict[str, Float[Array, "M S"]],
    texts: Texts,
    by_text: Float[Array, " M"],
    label: Float[Array, " L"],
    present: Bool[Array, " L"],
    *,
    teaches: bool,
) -> tuple[dict[str, Mean], Metrics]:
    """The bound and e's regression on pairs, and the mean of e, beside their ranking.

    Args:
        texts: both answers, those of a pair next to each other (M = 2L).
        by_text: r of each text.
        present: the pairs that count.
        teaches: whether the answers of pairs say what is expected.
    """
    expected = _expected(scores, texts)
    bounded = by_text if values.bound == "score" else by_text - expected
    bounded = jnp.reshape(bounded, (-1, 2))
    bound = bounding(bounded[:, 0], bounded[:, 1], label=label, margin=values.margin)
    terms = {"bound": mean_of(bound, present)}
    both = jnp.repeat(present, 2)
    if teaches:
        terms["expected"] = mean_of(expected_error(expected, by_text), both)
    return terms, {"expected": mean_of(expected, both)}


def sample_terms(
    scores: dict[str, Float[Array, "M S"]],
    texts: Texts,
    by_text: Float[Array, " M"],
    present: Bool[Array, " M"],
) -> tuple[dict[str, Mean], Metrics]:
    """e's regression on the scores of sampled answers, and the means of both."""
    expected = _expected(scores, texts)
    return {"expected": mean_of(expected_error(expected, by_text), present)}, {
        "expected": mean_of(expected, present),
        "score": mean_of(by_text, present),
    }


def weights(values: Advantage) -> dict[str, float | int]:
    """The weights of the terms by name."""
    return {"bound": values.bound_coef, "expected": values.expected_coef}


def _expected(scores, texts):
    if EXPECTED_HEAD not in scores:
        raise ValueError(f"the model has no head {EXPECTED_HEAD!r}; its heads: {sorted(scores)}")
    return expected_scores(scores, texts)
