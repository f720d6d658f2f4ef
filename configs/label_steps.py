"""Step labels without an exact checker: the quickstart's policy continues its own solutions.

    python -m rlhf_jax.pipeline --config=configs/quickstart.py --workdir=runs/quickstart
    python -m rlhf_jax.label_steps --config=configs/label_steps.py:policy=runs/quickstart/sft \
        --workdir=runs/step_labels

The policy draws four solutions of each of 1,024 problems, and eight continuations from the end of
each of their steps. With ``solutions=jsonl:runs/quickstart/labels/steps.jsonl`` those of a file are
labelled, such as what `label_samples` wrote; other arguments: ``samples`` (continuations of a
prefix) and ``problems``. A process reward model trains on ``steps.jsonl``: on hard labels as it
is, on soft ones where its source says ``labels="soft_labels"``.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.common import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, seed=0, policy="", solutions="policy", samples=8, problems=1_024)
    task = ConfigDict(dict(seed=args.get_ref("seed"), small=False))
    label = dict(solutions=args.solutions, problems=args.problems, held_out=0.2)
    if args.solutions == "policy":
        label |= dict(draws=4)
    prompt, solution = quickstart.lengths(task)
    return ConfigDict(
        dict(
            seed=args.get_ref("seed"),
            mesh=quickstart.MESH,
            model=dict(init_from=args.policy),
            # of prompt and steps together
            data=quickstart.data(task, "train") | dict(max_prompt=prompt + solution),
            rollout=quickstart.rollout(task, samples=args.samples),  # N
            label=label,
        )
    )
