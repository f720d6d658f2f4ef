"""Rewards outside of a policy run: one number per completion, for labels and for evaluation.

Any reward that needs no model serves, from the shelf or by a dotted name. What the policy is paid
by in training need not be what judges here: this is where a known truth ("gold") is asked.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from rlhf_jax import build
from rlhf_jax.mesh import fetch_host
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.schema import check_call
from rlhf_jax.types import Rollouts, Scores

Judge = Callable[[Rollouts], Float[np.ndarray, " B"]]
_RESOURCES = ("decode", "encode", "records", "rows")  # what a factory gets if it names it


class Found(NamedTuple):
    """What one policy did: lines of evaluation.jsonl, and numbers by prompt and sample."""

    rows: list[dict[str, Any]]
    gold: Float[np.ndarray, "M K"]
    length: Float[np.ndarray, "M K"]  # tokens
    kl: Float[np.ndarray, "M K"] | None = None  # log policy - log reference of each, in nats


def check_judge(path: str, section: ConfigDict) -> Callable:
    """The factory of the reward that judges; builds nothing.

    Args:
        path: where the section stands in the config, for messages.
        section: the reward's name and the values of its factory.

    Raises:
        ValueError: no name, an unknown one, one of a learned reward, or a wrong key.
    """
    factory = build.member(path, "rewards", section)
    if "model" in inspect.signature(factory).parameters:
        raise ValueError(
            f"{path}.name={section.name!r} is a learned reward; what judges here needs no model, "
            "such as 'exact_match' or 'keywords'"
        )
    check_call(path, factory, _values(section), given=_RESOURCES)
    return factory


def make_judge(path: str, section: ConfigDict, sampler: PolicySampler) -> Judge:
    """A function from rollouts of ``sampler`` to the score of each completion.

    The score is outcome plus the sum of process scores, as `objective/score` of a policy run,
    without wrappers or weight.

    Raises:
        ValueError: see `check_judge`; also for what the factory itself refuses.
    """
    factory = check_judge(path, section)
    resources = dict(
        decode=sampler.text.decode, encode=sampler.text.encode, records=sampler.record, rows=None
    )
    ours = {k: resources[k] for k in _RESOURCES if k in inspect.signature(factory).parameters}
    values = _values(section)
    reward = build.call(path, factory, values, **ours)
    score = reward.score if reward.where == "host" else jax.jit(reward.score)
    state = reward.init()

    def judge(rollouts: Rollouts) -> Float[np.ndarray, " B"]:
        return total(score(state, rollouts)[0], rollouts)

    return judge


def total(scores: Scores, rollouts: Rollouts) -> Float[np.ndarray, " B"]:
    """One number for each completion, on the host: outcome plus the sum of process scores."""
    return fetch_host(scores.outcome + masked_sum(scores.process, rollouts.mask, axis=-1))


def judged(
    stage: str, sampler: PolicySampler, reference: PolicySampler | None, judge: Judge, problems: int
) -> Found:
    """Samples, scores and reads the completions of one policy; without reference there is no KL."""
    rows, batches = [], []
    for first, rollouts in sampler.batches(problems):
        kept = problems - first
        found = [judge(rollouts), fetch_host(rollouts.mask.sum(-1)).astype(np.float32)]
        if reference is not None:
            found.append(sampler.log_ratio(reference, rollouts))
        k = rollouts.group_size
        batches.append([x.reshape(-1, k)[:kept] for x in found])
        for group, scores in zip(sampler.decode(rollouts), batches[-1][0], strict=False):
            rows += list(_lines(stage, group, scores))
    return Found(rows, *(np.concatenate(parts) for parts in zip(*batches, strict=True)))


def _lines(stage: str, group, scores) -> Iterator[dict[str, Any]]:
    for sample, score in zip(group, scores.tolist(), strict=True):
        yield {
            "stage": stage,
            "prompt": sample.prompt,
            "completion": sample.completion,
            "truncated": not sample.ended,
            "gold": score,
        }


def _values(section: ConfigDict) -> dict[str, Any]:
    return {name: value for name, value in section.to_dict().items() if name != "name"}
