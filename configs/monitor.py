"""PPO against a reward model that is too weak, watched by its twin and by gold.

    python -m rlhf_jax.pipeline --config=configs/monitor.py --workdir=runs/monitor

The quickstart's fine-tuned model and labels; two outcome models, each trained on the pairs of one
half of the problems; PPO is paid by the first with little KL, while the second and the exact
checker (both of weight 0) only watch. ``policy/report.md`` says when they parted. ``kl`` is an
argument, as in ``configs/monitor.py:kl=0.2``; with ``freeze`` the learning rate goes to 0 at the
first alarm, with ``small`` every stage is short, for tests.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.common import parse_arg


def reward(args: ConfigDict, half: str) -> dict:
    """An outcome model that has seen the pairs of one half of the problems."""
    config = quickstart.reward(args)
    pairs = quickstart.labels(args, "pairs", "pairs.jsonl", 32)
    pairs["options"] = dict(half=half)
    config["sources"] = dict(pairs=pairs)
    config["reward"] = dict(score_heads=("outcome",))
    held_out = quickstart.labels(args, "pairs", "held_out_pairs.jsonl", 64)
    config["eval"] = dict(every=config["train"]["steps"], sources=dict(held_out=held_out))
    source = config["card"]["sources"]["pairs"]
    config["card"]["sources"] = dict(pairs=source, held_out=source)
    return config


def policy(args: ConfigDict) -> dict:
    """The first model pays; what the second and the checker say trains nothing."""
    judge = dict(name="outcome_model", head="outcome", normalise=True)
    rewards = dict(
        rm_a=dict(judge, init_from="{workdir}/reward_a", weight=1.0),
        rm_b=dict(judge, init_from="{workdir}/reward_b", weight=0.0),
        exact=dict(name="exact_match", weight=0.0),
    )
    changes = dict(
        rewards=rewards,
        value=dict(init_from="rm_a"),
        algorithm=dict(name="ppo", gamma=1.0, lam=0.95, kl_coef=args.kl, clip=0.2),
        monitor=dict(
            proxy="rm_a",
            held_out="rm_b",
            gold="exact",
            every=2,  # iterations of an evaluation
            freeze=args.freeze,
            refusals=(),  # sums refuse nothing
            alarms=dict(window=4 if args.small else 20),
        ),
    )
    return quickstart.policy(args) | changes


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, seed=0, small=False, kl=0.02, freeze=False)
    evaluation = quickstart.evaluation(args) | dict(reward=dict(init_from="", sources=dict()))
    stages = dict(
        sft=dict(program="train_sft", config=quickstart.sft(args)),
        labels=dict(program="label_samples", config=quickstart.label_samples(args)),
        reward_a=dict(program="train_reward", config=reward(args, "a")),
        reward_b=dict(program="train_reward", config=reward(args, "b")),
        policy=dict(program="train_policy", config=policy(args)),
        evaluation=dict(program="evaluate", config=evaluation),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
