"""A generative reward model: a policy that learns to say whether answers are right (GenRM).

    python -m rlhf_jax.pipeline --config=configs/verdicts.py --workdir=runs/verdicts

Zhang et al. 2024 (https://arxiv.org/abs/2408.15240), without a chain of thought. The stages of
`configs/quickstart.py` up to its labels; then the fine-tuned model goes on with the same labels as
verdicts, "+" for right and "-" for wrong behind a question, beside the demonstrations (``texts`` is
their weight; 0 leaves them out), and the outcome model of the same labels trains as a rival. Last
both choose among 32 samples of each of 256 test problems.

The judge pays a policy as any reward does:

    rewards = dict(judge=dict(name="generative_model", weight=1.0, init_from="runs/verdicts/judge",
                              question="\\n=", yes="+", no="-"))

``small`` makes problems easy and every stage short. Then, on one seed and 64 problems, exact
answers were 0.47 (95 %: 0.36 to 0.59) of a sample, 0.77 (0.66 to 0.86) of the one of 8 that the
judge takes and 0.56 (0.44 to 0.68) of the outcome model's; of 32 samples 0.58 and 0.41, since both
can be fooled by what is rare. The whole config was not run.
"""

from ml_collections import ConfigDict

from configs import best_of_n, quickstart
from configs.common import parse_arg

# One token each; usual words are the defaults where they are tokens.
ASKED = dict(question="\n=", yes="+", no="-")


def judge(args: ConfigDict) -> dict:
    """The fine-tuned model on verdicts about its own samples, and on demonstrations."""
    config = quickstart.sft(args)
    room = dict(max_length=sum(quickstart.lengths(args)) + 2)  # question and verdict
    labelled = quickstart.labels(args, "verdicts", "correctness.jsonl", 32) | room | ASKED
    held_out = quickstart.labels(args, "verdicts", "held_out_correctness.jsonl", 64) | room | ASKED
    demonstrations = config["sources"]["demonstrations"] | dict(weight=args.texts, rows=32)
    return config | dict(
        model=dict(init_from="{workdir}/sft"),
        sources=dict(verdicts=labelled)
        | (dict(demonstrations=demonstrations) if args.texts else {}),
        optimizer=dict(learning_rate=5e-4, schedule="cosine", warmup=10),
        train=quickstart.steps(200 if args.small else 400),
        eval=dict(every=200, sources=dict(held_out=held_out)),
    )


def rival(args: ConfigDict) -> dict:
    """An outcome model of the same labels, in as many steps."""
    config = quickstart.reward(args)
    source = quickstart.labels(args, "correctness", "correctness.jsonl", 32)
    return config | dict(
        reward=dict(score_heads=("outcome",)),
        sources=dict(correctness=source),
        card=config["card"] | dict(sources=dict(correctness=config["card"]["sources"]["pairs"])),
        train=quickstart.steps(200 if args.small else 400),
        eval=dict(every=200, sources=dict()),
    )


def evaluation(args: ConfigDict) -> dict:
    """Which of k samples each of them takes, beside the truth and the votes."""
    config = best_of_n.get_config(f"problems={64 if args.small else 256},small={args.small}")
    folder = "{workdir}/judge"
    return config.to_dict() | dict(
        seed=args.get_ref("seed"),
        policies=dict(sft=dict(init_from="{workdir}/sft")),
        rewards=dict(
            judge=dict(name="generative_model", init_from=folder, **ASKED),
            outcome=dict(name="outcome_model", init_from="{workdir}/rival"),
        ),
        best_of=config.best_of.to_dict() | dict(weights=dict(judge="score", outcome="sigmoid")),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, seed=0, small=False, texts=1.0)
    stages = dict(
        sft=dict(program="train_sft", config=quickstart.sft(args)),
        labels=dict(program="label_samples", config=quickstart.label_samples(args)),
        judge=dict(program="train_sft", config=judge(args)),
        rival=dict(program="train_reward", config=rival(args)),
        evaluation=dict(program="evaluate", config=evaluation(args)),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
