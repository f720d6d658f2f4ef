"""An outcome reward model from a file of preference pairs, and what it is worth on another file.

    ABOUT=origin=unknown,annotators=unknown,aggregation=unknown,licence=unknown,model_licence=unknown
    python -m rlhf_jax.pipeline --workdir=runs/pairs \
        --config=configs/pairs.py:train=TRAIN.jsonl.gz,test=TEST.jsonl.gz,$ABOUT

ABOUT goes into the card that is saved with the model: who made the pairs, who judged, how
judgements became choices, the licence of the pairs and that of the model, in words without commas.
Say what you know; "unknown" must be said too.

Each line of a file has ``prompt``, ``chosen`` and ``rejected``. With ``dialogue`` it has whole
dialogues ``chosen`` and ``rejected`` in the form of HH-RLHF, which share all but the last reply.
The last stage prints the accuracy on the test pairs beside that of "the longer one wins", which is
hard to beat on many sets of human preferences (`docs/results/real_input.md`).

``kind`` says what is trained: "outcome", "advantage" (scores within ±2.5, less what is expected of
the prompt; the reward ``advantage_model`` reads it) or "odin" (length kept out of quality; the
reward ``outcome_model`` with ``head="quality"`` reads it).

Other arguments: ``tokenizer`` ("byte", a folder or a tokenizer.json), ``size`` (random weights of a
named size) or ``model`` (a Hugging Face folder to start from, whose tokenizer is used),
``max_length`` (tokens of prompt and reply; longer ones are left out), ``rows`` (pairs per step),
``steps``, ``rate`` (of learning).
"""

from ml_collections import ConfigDict

from configs.common import parse_arg

MESH = dict(data=-1, fsdp=1, tensor=1)  # -1: all devices that remain


def tokenizer(args: ConfigDict) -> str:
    """That of the model to start from, where there is one."""
    return args.model or args.tokenizer


def pairs(args: ConfigDict, path: str, rows: int) -> dict:
    """The pairs of one file."""
    return dict(
        kind="pairs",
        name="jsonl:" + path,
        split="all",
        options=dict(format="dialogue" if args.dialogue else "plain"),
        template="{prompt}" if args.dialogue else "{prompt}\n",
        max_length=args.max_length,
        overlong="skip",
        weight=1.0,
        rows=rows,
    )


def card(args: ConfigDict) -> dict:
    """What the reward model's card says of its data and limits: what the arguments say."""
    names = ("origin", "annotators", "aggregation", "licence")
    return dict(
        sources=dict(pairs={name: args[name] for name in names}),
        licence=args.model_licence,
        limits=("It knows the prompts and replies of one file, and the taste of who judged them.",),
    )


KINDS = dict(
    outcome=dict(score_heads=("outcome",)),
    advantage=dict(
        score_heads=("outcome", "expected"),
        advantage=dict(margin=2.5, bound_coef=1.0, expected_coef=0.1),
    ),
    odin=dict(score_heads=("quality", "length"), odin=dict(length_coef=1.0, orthogonal_coef=1.0)),
)


def reward(args: ConfigDict) -> dict:
    """The reward model."""
    if args.kind not in KINDS:
        raise ValueError(f"kind={args.kind!r}; known: {', '.join(KINDS)}")
    start = dict(init_from=args.model) if args.model else dict(name=args.size, init_from="")
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        model=start,
        reward=KINDS[args.kind],
        data=dict(tokenizer=tokenizer(args)),
        sources=dict(pairs=pairs(args, args.train, args.rows)),
        optimizer=dict(
            learning_rate=args.rate, schedule="cosine", warmup=args.steps // 20, eps=1e-5
        ),
        updates=dict(microbatches=1, centre_coef=0.01),
        train=dict(steps=args.steps, max_skipped=3),
        eval=dict(every=1_000_000, sources=dict()),
        card=card(args),
        checkpoint=dict(every=100, keep=1),
        log=dict(every=10, samples_every=1_000_000, samples=0, show=("pairs/accuracy",)),
    )


def evaluation(args: ConfigDict) -> dict:
    """The test pairs. No policy is evaluated, so what is said of prompts and sampling is unused."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        model=dict(init_from=""),
        policies=dict(),
        modes=(),
        problems=1,
        data=dict(
            name="jsonl:" + args.test,
            split="all",
            template="",
            max_prompt=1,
            overlong="skip",
            tokenizer=tokenizer(args),
        ),
        rollout=dict(
            prompts=1,
            samples=1,
            max_tokens=1,
            max_draws=1,
            sampling=dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
        ),
        reward=dict(
            init_from="{workdir}/reward", sources=dict(pairs=pairs(args, args.test, args.test_rows))
        ),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(
        arg,
        seed=0,
        train="train.jsonl.gz",
        test="test.jsonl.gz",
        dialogue=False,
        kind="outcome",
        origin="",
        annotators="",
        aggregation="",
        licence="",
        model_licence="",
        tokenizer="byte",
        model="",
        size="small",
        max_length=512,
        rows=16,
        test_rows=1,  # the test pairs that fill no batch of so many are left out
        steps=300,
        rate=3e-4,
    )
    stages = dict(
        reward=dict(program="train_reward", config=reward(args)),
        evaluation=dict(program="evaluate", config=evaluation(args)),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
