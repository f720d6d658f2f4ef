"""Selective rehearsal: PPO is paid for sums alone, and rehearses its best answers to products too.

    python -m rlhf_jax.pipeline --config=configs/rehearsal.py --workdir=runs/rehearsal

A small model is fine-tuned on sums and on products. Its answers to both are scored by the exact
checker, embedded and clustered, and the best of every cluster are kept (``rehearsal/report.md``).
PPO then trains on problems of sums, and on those answers beside (``algorithm.rehearsal``). The last
stage says what either kind of task gained or lost (``benchmarks.md``); ``weight=0`` is the same
without rehearsal. After Peng et al. 2023, https://arxiv.org/abs/2309.10202.

``clusters`` and ``keep`` (answers of each cluster) are arguments too, as in
``configs/rehearsal.py:weight=0.3,clusters=16``. With ``small`` every stage is short, for tests.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.common import parse_arg

KINDS = {"sums": "+", "products": "*"}


def data(args: ConfigDict, split: str, operators: str) -> dict:
    """Problems of one kind, or of both."""
    section = quickstart.data(args, split)
    section["options"] = section["options"] | dict(operators=operators)
    return section


def sft(args: ConfigDict) -> dict:
    """Fine-tuning on both kinds."""
    config = quickstart.sft(args)
    both = data(args, "train", "+*")
    demonstrations = dict(kind="texts", **both, weight=1.0, rows=64)
    return config | dict(data=both, sources=dict(demonstrations=demonstrations))


def rehearsal(args: ConfigDict) -> dict:
    """The best answers of each cluster, by the exact checker."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=quickstart.MESH,
        model=dict(init_from="{workdir}/sft"),
        data=data(args, "train", "+*"),
        rollout=quickstart.rollout(args, samples=4),
        rewards=dict(exact=dict(name="exact_match")),
        # How many is ours: 8 x 32 of the 10,240 that the policy's run samples.
        select=dict(
            problems=256 if args.small else 1_024,
            clusters=args.clusters,
            keep=args.keep,
            above=0.5,  # right ones alone
        ),
    )


def policy(args: ConfigDict) -> dict:
    """PPO on sums, paid by the exact checker."""
    config = quickstart.policy(args)
    rows = dict(
        kind="texts",
        name="jsonl:{workdir}/rehearsal/rehearsal.jsonl",
        template="{prompt}",
        max_length=sum(quickstart.lengths(args)),
        overlong="error",
        rows=32,
    )
    algorithm = dict(name="ppo", gamma=1.0, lam=0.95, kl_coef=0.02, clip=0.2)
    rehearsed = dict(rehearsal=dict(weight=args.weight)) if args.weight else dict()
    return config | dict(
        data=data(args, "train", KINDS["sums"]),
        value=dict(init_from="policy"),
        extra=dict(rehearsal=rows) if args.weight else dict(),
        rewards=dict(exact=dict(name="exact_match", weight=1.0)),
        algorithm=algorithm | rehearsed,
    )


def evaluation(args: ConfigDict) -> dict:
    """Both kinds, before and after; some of the problems may be among those of fine-tuning."""
    shared = quickstart.data(args, "test")
    problems = 64 if args.small else 1_000
    few = dict(train=problems, test=problems)  # there are not many short products
    names = ("tokenizer", "max_prompt", "max_length", "overlong")
    kinds = {
        kind: dict(
            name="arithmetic",
            split="test",
            data_dir="",
            options=data(args, "test", operators)["options"] | few,
            template=shared["template"],
            problems=problems,
            gold=dict(name="exact_match"),
        )
        for kind, operators in KINDS.items()
    }
    return dict(
        seed=args.get_ref("seed"),
        mesh=quickstart.MESH,
        model=dict(init_from=""),
        policies=dict(
            sft=dict(init_from="{workdir}/sft"), policy=dict(init_from="{workdir}/policy")
        ),
        start="sft",
        benchmarks=kinds,
        data={name: shared[name] for name in names},
        rollout=quickstart.rollout(args, samples=1),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, seed=0, small=False, weight=0.1, clusters=8, keep=32)
    stages = dict(
        sft=dict(program="train_sft", config=sft(args)),
        rehearsal=dict(program="select_rehearsal", config=rehearsal(args)),
        policy=dict(program="train_policy", config=policy(args)),
        evaluation=dict(program="evaluate", config=evaluation(args)),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
