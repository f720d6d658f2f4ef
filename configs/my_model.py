"""GRPO with adapters on a model of your own: chat prompts, answers that a rule can check.

    python -m rlhf_jax.pipeline \
        --config=configs/my_model.py:model=DIR,prompts=train.jsonl,held_out=test.jsonl \
        --workdir=runs/mine
    python -m rlhf_jax.export --workdir=runs/mine/policy --output=my_model

The model is a Hugging Face folder, or a name on the hub such as Qwen/Qwen2.5-0.5B-Instruct. A line
of a file holds ``messages`` (a dialogue that ends with the user) and ``answer`` (a number); the
reward is 1 where the completion's number behind ``####`` is that answer. Adapters train on a frozen
base, which is the reference too. The last stage measures answers on held-out prompts before and
after: on ``problems`` of them, 256 unless you say (the file has as many lines or more). The run is
in bfloat16; with ``small`` every stage is short and in float32, for tests.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg

MESH = dict(data=-1, fsdp=1, tensor=1)  # -1: all devices that remain
RULE = dict(name="exact_match")


def types(args: ConfigDict) -> dict:
    """Of stored weights and of matrix products; adapters are float32 always."""
    dtype = "float32" if args.small else "bfloat16"
    return dict(param_dtype=dtype, compute_dtype=dtype)


def data(args: ConfigDict, file: str) -> dict:
    """Dialogues through the model's own chat template."""
    return dict(
        name=f"jsonl:{file}",
        split="train",
        data_dir="",
        chat="messages",
        max_prompt=128 if args.small else 512,  # tokens
        overlong="skip",
        tokenizer=args.model,
    )


def rollout(args: ConfigDict, prompts: int, samples: int) -> dict:
    """Completions of a batch of prompts."""
    return dict(
        prompts=2 if args.small else prompts,
        samples=samples,
        max_tokens=8 if args.small else 512,
        max_draws=1,
        sampling=dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    )


def policy(args: ConfigDict) -> dict:
    """GRPO of adapters on every projection."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        checkpoint=dict(every=50, keep=1),
        log=dict(every=1, samples_every=10, samples=4, show=("objective/score",)),
        model=dict(
            init_from=args.model,
            lora_rank=16,
            lora_alpha=32.0,
            remat="full",
            **types(args),
        ),
        data=data(args, args.prompts),
        extra=dict(),
        rollout=rollout(args, prompts=16, samples=8),
        rewards=dict(
            exact=dict(**RULE, weight=1.0),
            length=dict(name="length", weight=0.001, per_token=-1.0, free=256),
        ),
        algorithm=dict(name="grpo", kl_coef=0.02),
        optimizer=dict(policy=dict(learning_rate=1e-4, schedule="constant", warmup=5, eps=1e-5)),
        updates=dict(epochs=1, minibatches=1, microbatches=1 if args.small else 8),
        train=dict(steps=2 if args.small else 200, max_skipped=3),
    )


def evaluation(args: ConfigDict) -> dict:
    """Exact answers before and after, on held-out prompts."""
    return dict(
        seed=args.get_ref("seed"),
        mesh=MESH,
        model=dict(init_from="", **types(args)),
        policies=dict(before=dict(init_from=args.model), after=dict(init_from="{workdir}/policy")),
        reference="before",
        problems=4 if args.small else args.problems,
        data=data(args, args.held_out),
        rollout=rollout(args, prompts=16, samples=4),
        gold=RULE,
    )


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(
        arg,
        seed=0,
        small=False,
        model="",
        prompts="train.jsonl",
        held_out="test.jsonl",
        problems=256,
    )
    stages = dict(
        policy=dict(program="train_policy", config=policy(args)),
        evaluation=dict(program="evaluate_gold", config=evaluation(args)),
    )
    return ConfigDict(dict(seed=args.get_ref("seed"), order=tuple(stages), stages=stages))
