"""Outcome and process reward models, from pairs, correctness and step labels in one mixture.

    python -m rlhf_jax.train_reward --config=configs/X.py --workdir=DIR

One trunk with the scalar heads of ``reward.score_heads``: "outcome" scores a text at its last
token, "process" every step at its end. A single head of any name does both.

With ``reward.members`` of 2 or more it is an ensemble of the family ``reward.ensemble``: whole
models ("independent"), heads on one trunk ("linear"), or adapters and heads on one frozen trunk
("lora", with ``model.lora_rank``). A LoRA ensemble can start from a linear one
(``model.init_from``), which trained trunk and heads on other data.
"""

from ml_collections import ConfigDict

from rlhf_jax import fit, program
from rlhf_jax.types import RunState

KINDS = ("pairs", "correctness", "steps")


def check(config: ConfigDict) -> fit.Fit:
    """Checks ``config`` and builds what needs neither parameters nor data."""
    heads = tuple(config.reward.score_heads)
    if not heads:
        raise ValueError("reward.score_heads is empty; name at least one head, such as 'outcome'")
    members = config.reward.get("members", 1)
    family = config.reward.get("ensemble", "none")
    changes = dict(lm_head=False, score_heads=heads, members=members, ensemble=family)
    return fit.check(config, "reward", KINDS, **changes)


def train_reward(config: ConfigDict, workdir: str) -> RunState:
    """Trains the reward model that ``config`` describes on its mixture of sources.

    Resumes if ``workdir`` has a checkpoint. A policy run uses the folder as the ``init_from``
    of its learned rewards.

    Raises:
        ValueError: for bad input, before any device is touched.
        FloatingPointError: after ``train.max_skipped`` non-finite updates in a row.
    """
    return fit.run(fit.open_sources(check(config)), workdir)


if __name__ == "__main__":
    program.run_program(train_reward)
