"""Supervised fine-tuning of a policy on worked examples.

    python -m rlhf_jax.train_sft --config=configs/X.py --workdir=DIR

Sources of kind "verdicts" (answers that are right or wrong, a question behind them) make a judge of
it: the reward `rlhf_jax.rewards.generative_model`. Texts beside them keep it a policy, too.
"""

from ml_collections import ConfigDict

from rlhf_jax import fit, program
from rlhf_jax.types import RunState


def check(config: ConfigDict) -> fit.Fit:
    """Checks ``config`` and builds what needs neither parameters nor data."""
    return fit.check(config, "policy", ("texts", "verdicts"), lm_head=True)


def train_sft(config: ConfigDict, workdir: str) -> RunState:
    """Trains the policy that ``config`` describes on its sources of kind "texts" and
    "verdicts".

    Resumes if ``workdir`` has a checkpoint. The run's folder can start a policy or a reward
    model (``model.init_from``).

    Raises:
        ValueError: for bad input, before any device is touched.
        FloatingPointError: after ``train.max_skipped`` non-finite updates in a row.
    """
    return fit.run(fit.open_sources(check(config)), workdir)


if __name__ == "__main__":
    program.run_program(train_sft)
