"""Every formula of the algorithms as a loop over Python floats, and a batch to try them on.

Nothing here calls the package's arithmetic. A completion is a `Row` of plain lists without
padding; losses are written as their papers have them, in float64, and differentiated by central
differences, so that neither `jax.grad` nor a hand-made derivative is trusted.
"""

import copy
import functools
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.find import find
from rlhf_jax.types import CompletionOutput, Experience, Prompts, Rollouts, Scores

GROUP = 4
# A ragged group with an empty row, one with three short ones, one whose rewards are all equal.
LENGTHS = (6, 3, 0, 1, 1, 1, 2, 5, 4, 6, 1, 2)
LENGTH = max(LENGTHS)
EQUAL = 0.3
_STEP = 1e-5  # of central differences


def batch(*, group=GROUP, lengths=LENGTHS, outcome=None, process=0.3, moved=0.8, seed=0):
    """A random experience and the output of a policy that has moved; NaN in all padding.

    Args:
        group: samples per prompt.
        lengths: valid tokens per row.
        outcome: one score for all rows, or one per row; random ones if None, and `EQUAL` without
            process scores in the last group.
        process: size of the scores at step ends.
        moved: size of the change of log-probs and values since sampling.
    """
    rng, rows = np.random.default_rng(seed), len(lengths)
    mask = np.arange(LENGTH)[None, :] < np.array(lengths)[:, None]

    def floats(scale=1.0, where=mask):
        x = np.where(where, scale * rng.normal(size=mask.shape), 0.0)
        return np.where(mask, x, np.nan).astype(np.float32)

    ends = mask & (rng.random(mask.shape) < 0.5)
    scored = ends.copy()
    drawn = rng.normal(size=rows)
    if outcome is None:
        drawn[-group:], scored[-group:] = EQUAL, False
    else:
        drawn[:] = outcome
    prompts = {name: jnp.zeros(rows // group, jnp.int32) for name in ("record", "source", "draw")}
    prompt = jnp.ones((rows // group, 1), jnp.int32)
    old, values = floats() - 2, floats()
    rollouts = Rollouts(
        prompts=Prompts(tokens=prompt, mask=prompt > 0, **prompts),
        tokens=jnp.zeros(mask.shape, jnp.int32),
        mask=jnp.asarray(mask),
        step_ends=jnp.asarray(ends),
        logprobs=jnp.asarray(old),
        behaviour_logprobs=jnp.asarray(old),
        truncated=jnp.zeros(rows, bool),
        sample=jnp.arange(rows) % group,
        version=jnp.zeros(rows, jnp.int32),
    )
    experience = Experience(
        rollouts=rollouts,
        scores=Scores(
            outcome=jnp.asarray(drawn, jnp.float32),
            process=jnp.asarray(floats(process, scored)),
            parts={},
        ),
        logprobs=jnp.asarray(old),
        ref_logprobs=jnp.asarray(old + floats(0.5)),
        values=jnp.asarray(values),
        extra={},
    )
    output = CompletionOutput(
        logprobs=jnp.asarray(old + floats(moved)),
        entropy=jnp.asarray(np.abs(floats())),
        scores={"value": jnp.asarray(values + floats(0.5 * moved))},
    )
    return experience, output


class Row(NamedTuple):
    """What is frozen about one completion, its valid tokens alone."""

    outcome: float
    process: list[float]
    ends: list[bool]
    old: list[float]
    ref: list[float]
    values: list[float]

    @property
    def reward(self) -> float:
        return self.outcome + sum(self.process)


def lists(x, mask):
    """The valid entries of each row."""
    return [np.asarray(r, np.float64)[m].tolist() for r, m in zip(x, mask, strict=True)]


def rows_of(experience):
    mask = np.asarray(experience.rollouts.mask)
    columns = (
        lists(experience.scores.process, mask),
        lists(experience.rollouts.step_ends, mask),
        lists(experience.logprobs, mask),
        lists(experience.ref_logprobs, mask),
        lists(experience.values, mask),
    )
    outcome = np.asarray(experience.scores.outcome, np.float64).tolist()
    return [Row(*entries) for entries in zip(outcome, *columns, strict=True)]


def point_of(output, mask):
    """Where the loss is taken: what the policy and the critic say now."""
    found = {"logprobs": output.logprobs, "entropy": output.entropy, **output.scores}
    return {name: lists(x, np.asarray(mask)) for name, x in found.items()}


# Rewards and advantages


def everywhere(numbers, rows):
    """A number of each row at every token of it."""
    return [[x] * len(row.old) for x, row in zip(numbers, rows, strict=True)]


def grouped(numbers, size):
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def compared(numbers, size, scale):
    """(x − mean_g) / (std_g + 1e-6), or without the division."""
    result = []
    for group in grouped(numbers, size):
        mean, std = statistics.fmean(group), statistics.pstdev(group)
        result += [(x - mean) / (std + 1e-6 if scale == "std" else 1.0) for x in group]
    return result


def kl_of(row, estimator):
    """Σ_t KL_t of the policy that sampled."""
    return sum(kl(o - r, o - r, estimator) for o, r in zip(row.old, row.ref, strict=True))


def token_rewards(row, beta=0.0, estimator="k1"):
    """−β KL_t + process_t + 1[t = T] outcome."""
    rewards = []
    for t, (old, ref) in enumerate(zip(row.old, row.ref, strict=True)):
        last = row.outcome if t == len(row.old) - 1 else 0.0
        rewards.append(row.process[t] + last - beta * kl(old - ref, old - ref, estimator))
    return rewards


def to_go(rewards, gamma=1.0):
    """G_t = Σ_{u ≥ t} γ^(u−t) r_u."""
    n = len(rewards)
    return [sum(gamma ** (u - t) * rewards[u] for u in range(t, n)) for t in range(n)]


def gae(rewards, values, gamma, lam):
    """A_t = Σ_{u ≥ t} (γ λ)^(u−t) δ_u,  δ_u = r_u + γ V_{u+1} − V_u."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    errors = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return to_go(errors, gamma * lam)


def adaptive_lambda(row, alpha):
    """1 − 1/(α |y|), and 0 where that is negative; a row without a token has no λ to speak of."""
    return max(0.0, 1.0 - 1.0 / (alpha * len(row.old))) if row.old else 0.0


def whitened(x):
    """(x − mean) / std over all tokens of all rows."""
    flat = [v for row in x for v in row]
    mean, std = statistics.fmean(flat), statistics.pstdev(flat)
    return [[(v - mean) / std for v in row] for row in x]


# The loss


class Loss(NamedTuple):
    """The switches of the policy's loss; KL and entropy are coefficients, 0 = absent."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    level: str = "token"
    form: str = "clip"
    how: str = "token_mean"
    constant: float | None = None
    kl: float = 0.0
    estimator: str = "k3"
    weighted: bool = False
    bonus: float = 0.0


def kl(delta, still, estimator):
    """`still` is delta where no gradient flows."""
    k3 = [math.exp(-d) - 1 + d for d in (delta, still)]
    straight = k3[1] + delta**2 / 2 - still**2 / 2
    return {"k1": delta, "k2": delta**2 / 2, "k3": k3[0], "k3+": straight}[estimator]


def clipped(ratio, advantage, low, high, dual):
    """min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A); with dual clip at least c A where A < 0."""
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return max(objective, dual * advantage) if dual and advantage < 0 else objective


def ratios(new, old, level):
    differences = [n - o for n, o in zip(new, old, strict=True)]
    if level == "sequence" and differences:
        differences = [statistics.fmean(differences)] * len(differences)
    return [math.exp(d) for d in differences]


def mean_over(x, how, constant=None):
    """The four aggregations; rows without a token do not count."""
    x = [row for row in x if row]
    if how == "token_mean":
        return sum(map(sum, x)) / sum(map(len, x))
    divisors = {
        "sequence_mean_token_mean": len,
        "sequence_mean_token_sum": lambda row: 1.0,
        "sequence_mean_token_sum_norm": lambda row: constant,
    }
    return sum(sum(row) / divisors[how](row) for row in x) / len(x)


def policy_terms(rows, advantages, loss, point, still, kept=None):
    """{name: (weight, mean)}; `still`: the point, where no gradient flows; `kept`: rows that train,
    all of them if None."""
    policy, divergence = [], []
    for i, row in enumerate(rows):
        if kept is not None and not kept[i]:
            policy.append([]), divergence.append([])
            continue
        new, fixed = point["logprobs"][i], still["logprobs"][i]
        ratio, weight = (ratios(x, row.old, loss.level) for x in (new, fixed))
        policy.append([]), divergence.append([])
        for t, advantage in enumerate(advantages[i]):
            objective = {
                "clip": clipped(ratio[t], advantage, loss.low, loss.high, loss.dual),
                "cispo": min(weight[t], 1 + loss.high) * advantage * new[t],
                "reinforce": advantage * new[t],
            }[loss.form]
            policy[i].append(-objective)
            estimate = kl(new[t] - row.ref[t], fixed[t] - row.ref[t], loss.estimator)
            divergence[i].append(estimate * (ratio[t] if loss.weighted else 1.0))
    terms = {"policy": (1.0, policy)}
    if loss.kl:
        terms["kl"] = (loss.kl, divergence)
    if loss.bonus:
        terms["entropy"] = (-loss.bonus, point["entropy"])
    return {n: (w, mean_over(x, loss.how, loss.constant)) for n, (w, x) in terms.items()}


# Ours beside the loop


class Wanted(NamedTuple):
    """What a loop says: targets per row, and `terms(point, still)`; `kept`: rows that train."""

    advantages: list[list[float]]
    returns: list[list[float]]
    terms: Callable
    kept: list[bool] | None = None


class Found(NamedTuple):
    targets: object
    terms: dict
    metrics: dict
    gradient: CompletionOutput


@functools.cache
def compiled(name, group, options):
    algorithm = find("algorithms", name)(**dict(options))

    @jax.jit
    def run(experience, output):
        targets, _ = algorithm.targets(experience, group, algorithm.init())

        def total(output):
            terms, metrics = algorithm.loss(output, experience, targets, group)
            means = [t.weight * t.mean.total / jnp.maximum(t.mean.count, 1) for t in terms.values()]
            return sum(means), (terms, metrics)

        gradient, (terms, metrics) = jax.grad(total, has_aux=True)(output)
        return Found(targets, terms, metrics, gradient)

    return run


def ours(name, data, *, group=GROUP, **options):
    """Targets, terms, metrics and gradient of a member of the shelf, compiled once."""
    return compiled(name, group, tuple(sorted(options.items())))(*data)


def means(found):
    """{name: (weight, mean)} of compiled terms."""
    return {
        name: (float(term.weight), float(term.mean.total) / max(float(term.mean.count), 1))
        for name, term in found.terms.items()
    }


def slopes(terms, point):
    """Central differences of Σ weight · mean with respect to every number of the point."""
    still, result = copy.deepcopy(point), copy.deepcopy(point)

    def total():
        return sum(weight * mean for weight, mean in terms(point, still).values())

    for name, rows in point.items():
        for i, row in enumerate(rows):
            for t, x in enumerate(row):
                row[t] = x + _STEP
                up = total()
                row[t] = x - _STEP
                result[name][i][t] = (up - total()) / (2 * _STEP)
                row[t] = x
    return result


def padded(x):
    """[B T], 0 in padding."""
    return np.array([[*row, *[0.0] * (LENGTH - len(row))] for row in x])


def assert_agrees(name, data, wanted, *, group=GROUP, **options):
    """Targets, every term and the gradient of ours equal the loop's; returns what ours found."""
    experience, output = data
    found = ours(name, data, group=group, **options)
    mask = np.asarray(experience.rollouts.mask)
    kept = mask if wanted.kept is None else mask & np.array(wanted.kept)[:, None]
    np.testing.assert_array_equal(found.targets.mask, kept)
    near = {"rtol": 2e-5, "atol": 2e-6}
    np.testing.assert_allclose(found.targets.advantages, padded(wanted.advantages), **near)
    np.testing.assert_allclose(found.targets.returns, padded(wanted.returns), **near)
    point = point_of(output, mask)
    terms, computed = wanted.terms(point, point), means(found)
    assert set(computed) == set(terms)
    for term, (weight, mean) in terms.items():
        np.testing.assert_allclose(computed[term], (weight, mean), **near, err_msg=term)
    gradient = found.gradient
    named = {"logprobs": gradient.logprobs, "entropy": gradient.entropy, **gradient.scores}
    for key, slope in slopes(wanted.terms, point).items():
        np.testing.assert_allclose(named[key], padded(slope), **near, err_msg=key)
    return found
