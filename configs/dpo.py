"""Offline DPO: a policy straight from pairs of its own samples, without a reward model.

    python -m rlhf_jax.pipeline --config=configs/dpo.py --workdir=runs/dpo

The stages of `configs/quickstart.py` up to its labels, then DPO on the pairs of a right and a wrong
answer to one problem, and the evaluation on problems that were in no training data. Pairs of a
fifth of the problems are held out: ``eval/held_out/...`` in the metrics of the stage.

``beta``, ``loss`` (sigmoid, sigmoid_norm, hinge, ipo) and ``steps`` are arguments, as in
``configs/dpo.py:loss=ipo,beta=0.5``. With ``small`` problems are easy and every stage is short.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.common import parse_arg


def dpo(args: ConfigDict) -> dict:
    """The fine-tuned model on its own pairs, held to what it was."""
    pairs = quickstart.labels(args, "pairs", "pairs.jsonl", 32)
    held_out = quickstart.labels(args, "pairs", "held_out_pairs.jsonl", 64)
    return dict(
        **quickstart.run(args) | dict(log=dict(every=10, show=("pairs/accuracy",))),
        model=dict(init_from="{workdir}/sft"),
        data=dict(tokenizer="chars:" + quickstart.ALPHABET),
        sources=dict(pairs=pairs),
        dpo=dict(loss=args.loss, beta=args.beta, nll_coef=args.nll),
        optimizer=dict(learning_rate=args.rate, schedule="cosine", warmup=10, eps=1e-5),
        updates=dict(microbatches=1),
        train=quickstart.steps(40 if args.small else args.steps),
        eval=dict(every=100, sources=dict(held_out=held_out)),
    )


def evaluation(args: ConfigDict) -> dict:
    """Both policies on problems of the test split."""
    return quickstart.evaluation(args) | dict(
        policies=dict(sft=dict(init_from="{workdir}/sft"), dpo=dict(init_from="{workdir}/dpo")),
        reward=dict(init_from="", sources=dict()),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(
        arg, seed=0, small=False, loss="sigmoid", beta=1.0, nll=1.0, rate=2e-4, steps=120
    )
    stages = dict(
        sft=dict(program="train_sft", config=quickstart.sft(args)),
        labels=dict(program="label_samples", config=quickstart.label_samples(args)),
        dpo=dict(program="train_dpo", config=dpo(args)),
        evaluation=dict(program="evaluate", config=evaluation(args)),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
