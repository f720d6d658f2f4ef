"""Offline DPO: a policy straight from pairs of its own samples, without a reward model.

    python -m rlhf_jax.pipeline --config=configs/dpo.py --workdir=runs/dpo

The stages of `configs/quickstart.py` up to its labels, then DPO on the pairs of a right and a wrong
answer to one problem, and the evaluation on problems that were in no training data. Pairs of a
fifth of the problems are held out: ``eval/held_out/...`` in the metrics of the stage.

Measured on the 2,000 test problems with 95 % intervals (seed 0; fine-tuned model and labels are
those of an earlier quickstart with the same settings):

    exact answers        fine-tuned               after DPO
    sampling             0.391 (0.370 to 0.413)   0.865 (0.849 to 0.879), +0.473 (0.450 to 0.497)
    greedy               0.404 (0.383 to 0.426)   0.940 (0.929 to 0.950), +0.536 (0.514 to 0.558)

at 1.26 nats from the fine-tuned model, with held-out pairs in the right order in 0.963; DPO and
evaluation took 75 CPU seconds. The two answers of a pair differ in few tokens here, so a policy
that may go far lowers the likelihood of both: with beta=0.1, nll=0 and 200 steps pairs are in order
as often (0.945) while exact answers fall to 0.102 (0.089 to 0.116), 23 nats away. Which of the two
mends it was not tried. Watch ``logprob_chosen``, not accuracy alone.

``kind=correctness`` trains on single answers that are right or wrong, which makes an implicit
process reward model (`rlhf_jax.rewards.implicit_model`): take ``beta=0.05`` (``nll`` is of pairs)
and name ``runs/dpo/dpo`` as its ``init_from`` in a policy run. As a policy it is not meant: with
``small`` and this β its own exact answers fell from 0.434 to 0.289 (256 problems, one seed).

``loss`` (sigmoid, sigmoid_norm, hinge, ipo), ``beta``, ``nll``, ``rate`` and ``steps`` are
arguments, as in ``configs/dpo.py:beta=0.5``. With ``small`` problems are easy and every stage is
short.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.common import parse_arg


def dpo(args: ConfigDict) -> dict:
    """The fine-tuned model on its own pairs, held to what it was."""
    file = f"{args.kind}.jsonl"  # pairs.jsonl or correctness.jsonl
    train = quickstart.labels(args, args.kind, file, 32)
    held_out = quickstart.labels(args, args.kind, f"held_out_{file}", 64)
    nll = args.nll if args.kind == "pairs" else 0.0
    return dict(
        **quickstart.run(args) | dict(log=dict(every=10, show=(f"{args.kind}/accuracy",))),
        model=dict(init_from="{workdir}/sft"),
        data=dict(tokenizer="chars:" + quickstart.ALPHABET),
        sources={args.kind: train},
        dpo=dict(loss=args.loss, beta=args.beta, nll_coef=nll),
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
        arg, seed=0, small=False, kind="pairs", loss="sigmoid", beta=1.0, nll=1.0, rate=2e-4,
        steps=120,
    )  # fmt: skip
    if args.kind not in ("pairs", "correctness"):
        raise ValueError(f"kind={args.kind!r}; known: pairs, correctness")
    stages = dict(
        sft=dict(program="train_sft", config=quickstart.sft(args)),
        labels=dict(program="label_samples", config=quickstart.label_samples(args)),
        dpo=dict(program="train_dpo", config=dpo(args)),
        evaluation=dict(program="evaluate", config=evaluation(args)),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
