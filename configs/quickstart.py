"""The main job, every stage: fine-tuning, labels, reward models, PPO, evaluation.

    python -m rlhf_jax.pipeline --config=configs/quickstart.py --workdir=runs/quickstart

A small model learns multi-step arithmetic from demonstrations that forget carries and borrows
half of the time, so it makes mistakes that a reward model can learn to see. Its own samples,
checked exactly, train an outcome and a process reward model; PPO against these two learned
rewards then lifts the share of exact answers on problems that were in no training data.

All stages share ``--config.seed``. With ``small`` (as in
``configs/quickstart.py:small``) problems are easy and every stage is short, for tests.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg

ALPHABET = "\n #*+-0123456789="
MESH = dict(data=-1, fsdp=1, tensor=1)  # -1: all devices that remain


def lengths(args: ConfigDict) -> tuple[int, int]:
    """The longest prompt and completion in tokens, which are characters here."""
    return (12, 24) if args.small else (16, 32)


def data(args: ConfigDict, split: str) -> dict:
    """Problems; demonstrations slip in half of the steps that have a carry or borrow."""
    # No minus: a forgotten carry and a forgotten borrow would cancel, and a wrong solution would
    # have the right answer.
    options = dict(
        min_ops=2, max_ops=3, modulus=100, operators="+*", slip=0.5, train=20_000, test=2_000
    )
    if args.small:
        options |= dict(min_ops=1, max_ops=2, operators="+", train=4_000, test=500)
    return dict(
        name="arithmetic",
        split=split,
        data_dir="",
        options=options,
        template="{question}\n",
        max_prompt=lengths(args)[0],
        max_length=sum(lengths(args)),
        overlong="error",
        tokenizer="chars:" + ALPHABET,
    )


def labels(args: ConfigDict, kind: str, file: str, rows: int, weight: float = 1.0) -> dict:
    """One source of reward-model data, written by the labelling stage."""
    return dict(
        kind=kind,
        name="jsonl:{workdir}/labels/" + file,
        split="train",
        template="{prompt}",
        max_length=sum(lengths(args)),
        overlong="error",
        weight=weight,
        rows=rows,
    )


def run(args: ConfigDict) -> dict:
    """What all stages that train have in common."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        checkpoint=dict(every=200, keep=1),
        log=dict(every=10, samples_every=50, samples=4, show=("update/loss",)),
    )


def card() -> dict:
    """What the reward model's card says of its data and limits."""
    source = dict(
        origin="samples of the fine-tuned policy for problems that this program generates; it "
        "learnt from demonstrations that the program spoilt on purpose",
        annotators="no people: the exact checker of the arithmetic task",
        aggregation="one verdict of the checker for each answer, step or pair",
        licence="Apache-2.0",
    )
    return dict(
        sources=dict(pairs=source, correctness=source, steps=source),
        licence="Apache-2.0",
        limits=(
            "It judges written additions and multiplications modulo 100 and nothing else.",
            "It saw the mistakes of one small policy: forgotten carries, mostly.",
        ),
    )


def steps(count: int) -> dict:
    """How long a stage trains."""
    return dict(steps=count, max_skipped=3)


def rollout(args: ConfigDict, samples: int) -> dict:
    """64 prompts, sampled as they are."""
    return dict(
        prompts=64,
        samples=samples,
        max_tokens=lengths(args)[1],
        max_draws=1,
        sampling=dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    )


def sft(args: ConfigDict) -> dict:
    """Fine-tuning from random weights on demonstrations."""
    demonstrations = dict(kind="texts", **data(args, "train"), weight=1.0, rows=64)
    return dict(
        **run(args),
        model=dict(name="small", init_from=""),
        data=data(args, "train"),
        sources=dict(demonstrations=demonstrations),
        optimizer=dict(learning_rate=2e-3, schedule="cosine", warmup=0 if args.small else 20),
        updates=dict(microbatches=1),
        train=steps(500 if args.small else 600),
        eval=dict(every=600, sources=dict()),
    )


def label_samples(args: ConfigDict) -> dict:
    """Samples of the fine-tuned model with the verdicts of the exact checker."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        model=dict(init_from="{workdir}/sft"),
        data=data(args, "train"),
        rollout=rollout(args, samples=4),
        # problems, the share held out for the evaluation, pairs per problem
        label=dict(problems=1_024 if args.small else 4_096, held_out=0.2, pairs=4),
    )


def reward(args: ConfigDict) -> dict:
    """One trunk with an outcome and a process head."""
    return dict(
        **run(args),
        model=dict(init_from="{workdir}/sft"),
        reward=dict(score_heads=("outcome", "process")),
        data=dict(tokenizer="chars:" + ALPHABET),
        sources=dict(
            pairs=labels(args, "pairs", "pairs.jsonl", 16, weight=0.5),
            correctness=labels(args, "correctness", "correctness.jsonl", 32, weight=0.5),
            # Step labels say where it went wrong; without them verdicts are learnt by heart.
            steps=labels(args, "steps", "steps.jsonl", 96, weight=4.0),
        ),
        optimizer=dict(learning_rate=1e-3, schedule="cosine", warmup=0 if args.small else 10),
        updates=dict(microbatches=1, centre_coef=0.01),
        train=steps(120 if args.small else 300),
        eval=dict(every=300, sources=dict()),
        card=card(),
    )


def policy(args: ConfigDict) -> dict:
    """PPO against the two learned rewards and nothing else."""
    learned = dict(init_from="{workdir}/reward")
    return dict(
        **run(args)
        | dict(log=dict(every=1, samples_every=10, samples=4, show=("objective/score",))),
        model=dict(init_from="{workdir}/sft"),
        value=dict(init_from="outcome"),
        data=data(args, "train"),
        extra=dict(),
        rollout=rollout(args, samples=4),
        rewards=dict(
            # As probabilities: a model that learnt nothing then says nothing, where standardised
            # scores would be as loud as those of one that learnt (see the control in docs/results).
            outcome=dict(name="outcome_model", weight=2.0, **learned, head="outcome", space="prob"),
            process=dict(name="process_model", weight=1.0, **learned, head="process"),
            exact=dict(name="exact_match", weight=0.0),  # gold: it is logged and trains nothing
        ),
        algorithm=dict(name="ppo", gamma=1.0, lam=0.95, kl_coef=0.2, clip=0.2),
        optimizer=dict(
            policy=dict(learning_rate=3e-4, schedule="constant", warmup=2, eps=1e-5),
            value=dict(learning_rate=1e-3, schedule="constant", warmup=2, eps=1e-5),
        ),
        updates=dict(epochs=1, minibatches=2, microbatches=1),
        train=steps(12 if args.small else 40),
    )


def evaluation(args: ConfigDict) -> dict:
    """Problems of the test split and labels that were held out."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        model=dict(init_from=""),
        policies=dict(
            sft=dict(init_from="{workdir}/sft"), policy=dict(init_from="{workdir}/policy")
        ),
        modes=("sample", "greedy"),
        reference="sft",
        problems=256 if args.small else 2_000,
        data=data(args, "test"),
        rollout=rollout(args, samples=1),
        reward=dict(
            init_from="{workdir}/reward",
            sources=dict(
                pairs=labels(args, "pairs", "held_out_pairs.jsonl", 16),
                correctness=labels(args, "correctness", "held_out_correctness.jsonl", 16),
                steps=labels(args, "steps", "held_out_steps.jsonl", 16),
            ),
        ),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, seed=0, small=False)
    stages = dict(
        sft=dict(program="train_sft", config=sft(args)),
        labels=dict(program="label_samples", config=label_samples(args)),
        reward=dict(program="train_reward", config=reward(args)),
        policy=dict(program="train_policy", config=policy(args)),
        evaluation=dict(program="evaluate", config=evaluation(args)),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
