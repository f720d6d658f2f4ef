"""How far a policy may follow a reward model: distance in nats, and the gold that it brings.

Gao et al. 2022, https://arxiv.org/abs/2210.10760: against d = sqrt(KL(π ‖ π_start)) the gold of a
policy that was optimised for a proxy rises, turns and falls.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from rlhf_jax.types import Array

# form: (what beta multiplies, as a function of d; where the curve turns, given alpha and beta)
_FORMS: Mapping[str, tuple[Callable, Callable]] = {
    "best_of_n": (lambda d: d**2, lambda alpha, beta: alpha / (2 * beta)),
    "rl": (lambda d: d * np.log(d), lambda alpha, beta: np.exp(alpha / beta - 1)),
}


class Overoptimisation(NamedTuple):
    """A fitted curve of gold against distance.

    `peak` is the distance where it turns, inf where it does not (beta ≤ 0). `r_squared` is
    1 − Σ residual² / Σ (gold − mean gold)².
    """

    alpha: float
    beta: float
    r_squared: float
    peak: float


def best_of_n_kl(n: Shaped[Array, "*M"] | int) -> Float[np.ndarray, "*M"]:
    """KL(best of n ‖ one sample) = log n − (n − 1)/n, in nats, where no two samples are the same.

    Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, appendix G.3. An upper bound where
    samples repeat (Beirami et al. 2024, https://arxiv.org/abs/2401.01879).
    """
    count = np.asarray(n, np.float64)
    if (count < 1).any():
        raise ValueError(f"best of n={count.min():g} samples; wanted 1 or more")
    return np.asarray(np.log(count) - (count - 1) / count)


def overoptimisation(
    distance: Float[Array, " M"], gold: Float[Array, " M"], *, form: str
) -> Overoptimisation:
    """The least-squares fit of gold, measured from that of the start, to its form in d.

    best_of_n   gold = d (alpha − beta d)
    rl          gold = d (alpha − beta log d)

    Gao et al. 2022, equations 1 and 2. The curves go through 0 at d = 0.

    Args:
        distance: d = sqrt(KL), in nats^½; 0 is the start.
        gold: minus the gold of the start.

    Raises:
        ValueError: unknown form; fewer than three distances above 0; a negative distance.
    """
    if form not in _FORMS:
        raise ValueError(f"overoptimisation: form={form!r}; known: {', '.join(_FORMS)}")
    d, y = (np.asarray(x, np.float64) for x in (distance, gold))
    if (d < 0).any():
        raise ValueError(f"overoptimisation: a distance of {d.min():g}; wanted none below 0")
    if len(np.unique(d[d > 0])) < 3:
        raise ValueError(
            f"overoptimisation: {len(np.unique(d[d > 0]))} different distances above 0; wanted 3 "
            "or more, since two numbers are fitted"
        )
    turning, peak = _FORMS[form]
    # At d = 0 both columns are 0, the limit of d log d too.
    columns = np.stack([d, -turning(np.where(d > 0, d, 1.0)) * (d > 0)], axis=1)
    alpha, beta = np.linalg.lstsq(columns, y)[0]
    left = np.square(y - columns @ [alpha, beta]).sum()
    return Overoptimisation(
        alpha=float(alpha),
        beta=float(beta),
        r_squared=float(1 - left / np.square(y - y.mean()).sum()),
        peak=float(peak(alpha, beta)) if beta > 0 else float("inf"),
    )
