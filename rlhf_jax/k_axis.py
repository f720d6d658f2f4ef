"""The K axis: prompts and learning rate of a step where only samples per prompt are swept.

More samples of a prompt alone are more samples and, mostly, more tokens a step, so that a gain may
be one of batch size, of compute or of a learning rate that no longer fits. `rollout.prompts` and
the learning rates are those at `rollout.axis.samples` = K₀; a run with `rollout.samples` = K has

    hold      N of a step
    prompts   N₀                       as many problems
    samples   N₀ K₀ / K                as many rollouts, B = N K
    tokens    N₀ K₀ T₀ / (K T)         as many tokens, with T = rollout.max_tokens and T₀ that of K₀

    lr_scale  learning rates times
    none      1
    sqrt      √(B / B₀)                with B₀ = N₀ K₀
    linear    B / B₀                   Goyal et al. 2017, https://arxiv.org/abs/1706.02677
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from rlhf_jax.ops.metrics import single
from rlhf_jax.types import Metrics

HOLDS = ("prompts", "samples", "tokens")
LR_SCALES = {"none": lambda ratio: 1.0, "sqrt": math.sqrt, "linear": float}


class Held(NamedTuple):
    """N of a step, and what learning rates are multiplied by."""

    prompts: int
    lr_factor: float


def hold(rollout: ConfigDict, *, multiple: int) -> Held:
    """The sizes that ``rollout.axis`` makes; those of the config where there is no such section.

    Args:
        rollout: the config's section.
        multiple: what N must be a multiple of: minibatches x microbatches x batch shards.

    Raises:
        ValueError: for an unknown way, or an N that is not whole; names what would work.
    """
    if "axis" not in rollout:
        return Held(rollout.prompts, 1.0)
    axis, samples = rollout.axis, rollout.samples
    way, scale = axis.get("hold", "prompts"), axis.get("lr_scale", "none")
    if way not in HOLDS:
        raise ValueError(f"rollout.axis.hold={way!r} is unknown; known: {', '.join(HOLDS)}")
    if scale not in LR_SCALES:
        known = ", ".join(LR_SCALES)
        raise ValueError(f"rollout.axis.lr_scale={scale!r} is unknown; known: {known}")
    if way == "tokens" and "tokens" not in axis:
        raise ValueError(
            "rollout.axis.hold='tokens' needs rollout.axis.tokens, the max_tokens at which "
            f"rollout.prompts={rollout.prompts} was chosen"
        )
    if way != "tokens" and "tokens" in axis:
        raise ValueError(
            f"rollout.axis.tokens={axis.tokens}, but hold={way!r} does not read it; set "
            "hold='tokens' or leave it out"
        )
    before, now = axis.samples, samples
    if way == "tokens":
        before, now = before * axis.tokens, now * rollout.max_tokens
    prompts = rollout.prompts
    if way != "prompts":
        prompts, rest = divmod(rollout.prompts * before, now)
        if rest or prompts % multiple or not prompts:
            raise ValueError(_what_works(rollout, way, before, now, multiple))
    ratio = prompts * samples / (rollout.prompts * axis.samples)
    return Held(prompts, LR_SCALES[scale](ratio))


def _what_works(rollout: ConfigDict, way: str, before: int, now: int, multiple: int) -> str:
    """What to say of sizes that do not come out whole."""
    held, each = rollout.prompts * before, now // rollout.samples
    most, rest = divmod(held, each * multiple)
    working = [] if rest else [k for k in range(1, most + 1) if most % k == 0]
    step = now * multiple // math.gcd(now * multiple, before)
    return (
        f"rollout.samples={rollout.samples} with rollout.axis.hold={way!r} makes {held / now:g} "
        f"prompts a step of rollout.prompts={rollout.prompts} at rollout.axis.samples="
        f"{rollout.axis.samples}; wanted a multiple of {multiple} (updates.minibatches x "
        "updates.microbatches x batch shards). Samples that work: "
        f"{', '.join(map(str, working)) or 'none'}; or make rollout.prompts a multiple of {step}"
    )


def axis_metrics(rollout: ConfigDict, prompts: int, lr_factor: float) -> Metrics:
    """`rollout/prompts`, `rollout/samples` and `rollout/lr_factor` of a run with such a section."""
    if "axis" not in rollout:
        return {}
    return {
        "rollout/prompts": single(float(prompts)),
        "rollout/samples": single(float(rollout.samples)),
        "rollout/lr_factor": single(lr_factor),
    }
