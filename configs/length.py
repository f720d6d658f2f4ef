"""Interventions against policies that only grow longer, one by name, on the quickstart's task.

    python -m rlhf_jax.pipeline --workdir=runs/penalty \
        --config=configs/length.py:intervention=penalty

Singhal et al. 2023, "A Long Way to Go" (https://arxiv.org/abs/2310.03716) try seven; here each is
the key of a config, and this config sets one of them. Fine-tuning and labels are the quickstart's;
an outcome model of their pairs pays PPO, the exact checker and the length only watch.

    none                                the outcome model as it is, KL 0.04
    balance, augment, truncate          of its data: I.1, I.2 and I.3
    omit, penalty, scale, kl            of the policy's run: I.4 to I.7
    target                              the paper's LPPO: length alone pays, here 20 tokens
    relative                            PAR of Fu et al. 2025 (https://arxiv.org/abs/2502.18770),
                                        beside the true solutions of the problems

``truncate`` leaves out the pairs that models are least sure of, so it wants a file of pairs with
their ``confidence``: run this config without intervention, then

    python -m rlhf_jax.label_confidence --models=runs/none/reward \
        --pairs=runs/none/labels/pairs.jsonl --output=pairs.jsonl

and name it as ``pairs=pairs.jsonl``. With ``small`` every stage is short, for tests.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.common import parse_arg

KL = 0.04  # of the paper; 0.12 is its stronger one
# What each intervention adds to the source of pairs, to the reward, and to the algorithm.
PAIRS = {
    "balance": dict(balance_lengths=True),
    "augment": dict(augment=0.25),
    "truncate": dict(drop_unsure=0.2),
}
REWARD = {
    "penalty": dict(length_penalty=dict(tokens=100, coef=2.0)),
    "scale": dict(scale=dict(limit=0.3, batches=10)),
    "relative": dict(relative=dict(answers="answer")),
}
ALGORITHM = {"omit": dict(omit_truncated=True), "kl": dict(kl_coef=0.12)}
INTERVENTIONS = ("none", *PAIRS, *REWARD, *ALGORITHM, "target")


def reward(args: ConfigDict) -> dict:
    """An outcome model of pairs."""
    config = quickstart.reward(args)
    pairs = quickstart.labels(args, "pairs", "pairs.jsonl", 32)
    if args.pairs:
        pairs["name"] = "jsonl:" + args.pairs
    config["sources"] = dict(pairs=pairs | PAIRS.get(args.intervention, {}))
    config["reward"] = dict(score_heads=("outcome",))
    config["card"]["sources"] = dict(pairs=config["card"]["sources"]["pairs"])
    return config


def policy(args: ConfigDict) -> dict:
    """PPO, paid by the outcome model, or by length alone."""
    target = args.intervention == "target"
    learned = dict(name="outcome_model", init_from="{workdir}/reward", normalise=True)
    algorithm = dict(name="ppo", gamma=1.0, lam=0.95, kl_coef=KL, clip=0.2)
    return quickstart.policy(args) | dict(
        rewards=dict(
            outcome=dict(
                **learned, weight=0.0 if target else 1.0, **REWARD.get(args.intervention, {})
            ),
            length=dict(name="length", weight=1.0 if target else 0.0, target=20),
            exact=dict(name="exact_match", weight=0.0),
        ),
        algorithm=algorithm | ALGORITHM.get(args.intervention, {}),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, seed=0, small=False, intervention="none", pairs="")
    if args.intervention not in INTERVENTIONS:
        raise ValueError(f"intervention={args.intervention!r}; known: {', '.join(INTERVENTIONS)}")
    if args.intervention == "truncate" and not args.pairs:
        raise ValueError("intervention=truncate wants pairs=FILE, pairs with a field confidence")
    evaluation = quickstart.evaluation(args)
    held_out = quickstart.labels(args, "pairs", "held_out_pairs.jsonl", 16)
    evaluation["reward"]["sources"] = dict(pairs=held_out)
    stages = dict(
        sft=dict(program="train_sft", config=quickstart.sft(args)),
        labels=dict(program="label_samples", config=quickstart.label_samples(args)),
        reward=dict(program="train_reward", config=reward(args)),
        policy=dict(program="train_policy", config=policy(args)),
        evaluation=dict(program="evaluate", config=evaluation),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
