"""A policy from preference pairs, without a reward model and without sampling (offline DPO).

    python -m rlhf_jax.train_dpo --config=configs/X.py --workdir=DIR

The policy starts as the model of ``model.init_from`` and is held to it: that start, frozen, is the
reference. With ``model.lora_rank`` adapters train and the base under them is the reference, so
there is one copy of the model. ``dpo`` says which loss: `rlhf_jax.ops.direct_preference` has a
table. Sources of kind "texts" may stand beside the pairs and train as in `train_sft`.

The run's folder holds a policy like any other: it is evaluated, sampled from, exported and trained
further by the same programs. It is a reward model, too: what it says of each token beside its
reference is a process reward (`rlhf_jax.rewards.implicit_model`). Sources of kind "correctness"
train one from answers that are right or wrong, with the loss "sigmoid": the binary cross-entropy
of the reward of a whole answer.
"""

from ml_collections import ConfigDict

from rlhf_jax import build, fit, program
from rlhf_jax.ops.direct_preference import DirectPreference, direct_preference
from rlhf_jax.types import RunState

KINDS = ("pairs", "correctness", "texts")


def check(config: ConfigDict) -> fit.Fit:
    """Checks ``config`` and builds what needs neither parameters nor data."""
    direct = build.call("dpo", direct_preference, config.dpo.to_dict())
    heads = config.model.get("score_heads", ())
    if heads:
        raise ValueError(
            f"model.score_heads={tuple(heads)}: DPO compares log-probs and trains no scalar head; "
            "leave it out, or train a reward model from these pairs with train_reward"
        )
    for part, sections in (("sources", config.sources), ("eval.sources", config.eval.sources)):
        for label, head in fit.own_heads(sections).items():
            raise ValueError(f"{part}.{label}.head={head!r}, but a policy has no scoring heads")
    planned = fit.check(config, "policy", KINDS, lm_head=True)
    if all(section.kind == "texts" for section in config.sources.values()):
        raise ValueError(
            f"sources {', '.join(config.sources)} hold texts alone; wanted one of kind 'pairs' or "
            "'correctness', or the program train_sft"
        )
    check_labels(config, direct)
    return planned._replace(direct=direct)


def check_labels(config: ConfigDict, direct: DirectPreference) -> None:
    """Raises a ValueError for a loss that sources of kind "correctness" do not have."""
    everywhere = {**config.sources, **config.eval.sources}
    labelled = [label for label, section in everywhere.items() if section.kind == "correctness"]
    if labelled and direct.loss != "sigmoid":
        raise ValueError(
            f"dpo.loss={direct.loss!r}, but source {labelled[0]} is of kind 'correctness', whose "
            "loss is the cross-entropy of the summed reward; set it to 'sigmoid'"
        )
    pairs = any(section.kind == "pairs" for section in config.sources.values())
    for name in ("length_coef", "nll_coef"):
        if getattr(direct, name) and not pairs:
            raise ValueError(
                f"dpo.{name}={getattr(direct, name)} is of pairs, and no source is of kind "
                "'pairs'; leave it out"
            )


def train_dpo(config: ConfigDict, workdir: str) -> RunState:
    """Trains the policy that ``config`` describes on its sources of kind "pairs".

    Resumes if ``workdir`` has a checkpoint.

    Raises:
        ValueError: for bad input, before any device is touched.
        FloatingPointError: after ``train.max_skipped`` non-finite updates in a row.
    """
    return fit.run(fit.open_sources(check(config)), workdir)


if __name__ == "__main__":
    program.run_program(train_dpo)
