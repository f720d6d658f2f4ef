"""A real pretrained model learns to write happier stories, from a reward model alone.

    python -m benchmarks.stories260k SOURCE runs/stories260K
    python -m rlhf_jax.pipeline --config=configs/stories.py:model=runs/stories260K \
        --workdir=runs/stories

The model is stories260K (llama2.c, 260 thousand weights, trained on TinyStories); the first
command makes a Hugging Face folder of its two files, and any such folder will do. What is wanted,
"gold", is an exact rule: how many of a few happy words a story uses, at most three, each once. The
rule labels pairs of the model's own samples; an outcome model learns from the pairs; PPO is paid by
the outcome model only and logs gold as a metric (a reward of weight 0). The last stage measures
gold on beginnings that no stage before has seen, and how far the policy went.

Minutes on two cores; `docs/results/real_input.md` has the numbers. With ``small`` (as in
``configs/stories.py:small,model=...``) every stage is short, for tests.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg

OPENINGS = (
    "Once upon a time, there was a {hero}.",
    "One day, a {hero} went to the park.",
    "There was a {hero} who lived in a small house.",
    "A {hero} was sad because it was raining.",
    "One morning, a {hero} woke up very early.",
    "A {hero} wanted to go outside.",
    "Once there was a {hero} who had a big red ball.",
    "One day, a {hero} saw a tree.",
)
HEROES = (
    "little girl named Lily", "little boy named Tim", "big dog named Max", "little cat named Kitty",
    "boy named Tom", "girl named Sue", "small bird", "brown bear", "little frog", "old man",
    "little rabbit", "girl named Anna", "boy named Ben", "big elephant", "green turtle",
    "small mouse", "girl named Mia", "little fish", "boy named Sam", "little duck",
    "funny monkey", "girl named Sara", "boy named Jack", "little bug", "white horse",
    "girl named Amy", "boy named Joe", "young lion", "little pig", "black cat",
    "girl named Lucy", "boy named Bob",
)  # fmt: skip
HELD_OUT = (
    "girl named Jane", "boy named Leo", "little fox", "small dog named Spot", "old woman",
    "girl named Ella", "little bee", "boy named Mark", "big cow", "yellow bird",
    "girl named Rose", "little squirrel", "boy named Fred", "brown dog", "girl named Zoe",
    "tiny ant",
)  # fmt: skip
WORDS = (
    "happy", "smile", "smiled", "laugh", "laughed", "love", "loved", "fun", "friend", "friends",
    "hug", "hugged", "proud", "kind",
)  # fmt: skip
GOLD = dict(name="keywords", words=WORDS, limit=3)
TEMPLATE = "<s>{prompt}"  # the model begins every story with this token
MAX_PROMPT = 40  # tokens
MAX_TOKENS = 64
MESH = dict(data=-1, fsdp=1, tensor=1)  # -1: all devices that remain


def prompts(args: ConfigDict, heroes: tuple[str, ...]) -> dict:
    """Every opening with every hero."""
    texts = tuple(opening.format(hero=hero) for hero in heroes for opening in OPENINGS)
    return dict(
        name="inline",
        split="all",
        data_dir="",
        options=dict(prompt=texts),
        template=TEMPLATE,
        max_prompt=MAX_PROMPT,
        overlong="error",
        tokenizer=args.model,
    )


def rollout(count: int, samples: int) -> dict:
    """Prompts in a batch, and samples of each."""
    return dict(
        prompts=count,
        samples=samples,
        max_tokens=MAX_TOKENS,
        max_draws=1,
        sampling=dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    )


def run(args: ConfigDict) -> dict:
    """What all stages that train have in common."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        checkpoint=dict(every=50, keep=1),
        log=dict(every=1, samples_every=20, samples=4, show=("update/loss",)),
    )


def label_samples(args: ConfigDict) -> dict:
    """Samples of the pretrained model; of two for one beginning, gold says which is better."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        model=dict(init_from=args.model),
        data=prompts(args, HEROES),
        rollout=rollout(16, 4 if args.small else 16),
        label=dict(
            problems=32 if args.small else len(OPENINGS) * len(HEROES),
            held_out=0.1,
            pairs=4 if args.small else 16,
            reward=GOLD,
            margin=0.0,
        ),
    )


def pairs(file: str, rows: int) -> dict:
    """A source of pairs that the labelling stage wrote."""
    return dict(
        kind="pairs",
        name="jsonl:{workdir}/labels/" + file,
        split="train",
        template=TEMPLATE,
        # Encoded anew, a text may have more tokens than were sampled: a few are cut.
        max_length=MAX_PROMPT + MAX_TOKENS,
        overlong="truncate",
        weight=1.0,
        rows=rows,
    )


def card() -> dict:
    """What the reward model's card says of its data and limits."""
    source = dict(
        origin="stories that the pretrained model continued from beginnings written in this config",
        annotators="no people: a rule that counts happy words",
        aggregation="of two stories, the one with more of the words is chosen; ties are left out",
        licence="that of the pretrained model",
    )
    return dict(
        sources=dict(pairs=source, held_out=source),
        licence="that of the pretrained model",
        limits=(
            "It was taught a list of words and not what makes a story good or happy.",
            "It knows stories of one small model, of some 60 tokens.",
        ),
    )


def reward(args: ConfigDict) -> dict:
    """An outcome model that starts from the pretrained weights."""
    return dict(
        **run(args),
        model=dict(init_from=args.model),
        reward=dict(score_heads=("outcome",)),
        data=dict(tokenizer=args.model),
        sources=dict(pairs=pairs("pairs.jsonl", 16 if args.small else 32)),
        optimizer=dict(learning_rate=1e-3, schedule="cosine", warmup=0 if args.small else 10),
        updates=dict(microbatches=1, centre_coef=0.01),
        train=dict(steps=2 if args.small else 100, max_skipped=3),
        eval=dict(every=1000, sources=dict(held_out=pairs("held_out_pairs.jsonl", 4))),
        card=card(),
    )


def policy(args: ConfigDict) -> dict:
    """PPO, paid by the outcome model and nothing else; gold is watched."""
    return dict(
        **run(args)
        | dict(log=dict(every=1, samples_every=10, samples=4, show=("objective/score",))),
        model=dict(init_from=args.model),
        value=dict(init_from="outcome"),
        data=prompts(args, HEROES),
        extra=dict(),
        rollout=rollout(8 if args.small else 32, 4),
        rewards=dict(
            outcome=dict(
                name="outcome_model",
                weight=1.0,
                init_from="{workdir}/reward",
                head="outcome",
                normalise=True,
                clip=3.0,
            ),
            gold=dict(**GOLD, weight=0.0),  # a metric: it trains nothing
        ),
        algorithm=dict(name="ppo", gamma=1.0, lam=0.95, kl_coef=0.04, clip=0.2),
        optimizer=dict(
            policy=dict(learning_rate=2e-4, schedule="constant", warmup=2, eps=1e-5),
            value=dict(learning_rate=1e-3, schedule="constant", warmup=2, eps=1e-5),
        ),
        updates=dict(epochs=1, minibatches=2, microbatches=1),
        train=dict(steps=2 if args.small else 30, max_skipped=3),
    )


def evaluation(args: ConfigDict) -> dict:
    """Gold before and after, on held-out beginnings."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        model=dict(init_from=""),
        policies=dict(before=dict(init_from=args.model), after=dict(init_from="{workdir}/policy")),
        reference="before",
        problems=16 if args.small else len(OPENINGS) * len(HELD_OUT),
        data=prompts(args, HELD_OUT),
        rollout=rollout(16, 4 if args.small else 8),
        gold=GOLD,
    )


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, seed=0, small=False, model="runs/stories260K")
    stages = dict(
        labels=dict(program="label_samples", config=label_samples(args)),
        reward=dict(program="train_reward", config=reward(args)),
        policy=dict(program="train_policy", config=policy(args)),
        evaluation=dict(program="evaluate_gold", config=evaluation(args)),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
