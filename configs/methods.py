"""Every algorithm with the settings of its paper, on a model and rewards of yours.

    python -m rlhf_jax.train_policy \
        --config=configs/methods.py:method=dapo,init_from=DIR,reward=DIR --workdir=runs/dapo

``init_from`` is a model to start from, such as the folder runs/quickstart/sft (empty: random
weights of toy size, which answer nothing right, so nothing is learnt); a run's folder brings its
prompts and its tokenizer. ``reward`` is the folder of a reward model, for prime of a run of
train_dpo (empty: the exact checker of the embedded task alone). Papers train on hundreds of prompts
a step; ``prompts`` is what this run has, 16 unless given, and all sizes besides K are small too:
change `data`, `rollout` and `train` to yours. What a paper does not say is marked "ours";
``vc_ppo`` and ``vapo`` are settings of the algorithm ``ppo``. The table in README says which paper;
docs/results/algorithms.md what they do on one task.
"""

import json
import pathlib

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.ppo_tiny import get_config as tiny

# Learning rates are the papers' for models of billions of weights, tuned with Adam; small models
# want more.
METHODS = {
    # Huang et al. 2024, "The N+ implementation details" of PPO for summaries: 512 prompts. There a
    # completion without end-of-text scores -1 whatever it says; here that is added to its score.
    # The dual clip (3) is ours.
    "ppo": dict(
        rewards=dict(eos=dict(name="missing_eos", weight=1.0, penalty=-1.0)),
        algorithm=dict(kl_coef=0.05, lam=0.95, value_coef=0.1, clip=0.2),
        samples=1, temperature=0.7, epochs=4, minibatches=1, rate=3e-6, schedule="linear",
    ),
    # Yuan et al. 2025 (VC-PPO): the critic alone first, and λ of its own; the rest is ours.
    "vc_ppo": dict(
        algorithm=dict(name="ppo", kl_coef=0.0, lam=0.95, value_lam=1.0), samples=4, minibatches=4,
        rate=1e-6, pretrain=0.1,
    ),
    # Yue et al. 2025 (VAPO): 512 prompts x 16 in 16 minibatches, which 16 prompts are too few for,
    # the critic alone for 50 steps; no dual clip is ours.
    "vapo": dict(
        algorithm=dict(
            name="ppo", kl_coef=0.0, lam_alpha=0.05, value_lam=1.0, clip=0.2, clip_high=0.28,
            dual_clip=None, imitate=dict(reward="exact", above=0.5, weight=0.1),
        ),
        samples=16, minibatches=4, rate=1e-6, value_rate=2e-6, pretrain=0.1,
    ),
    # Shao et al. 2024, DeepSeekMath: 16 prompts x 64, one update per batch.
    "grpo": dict(
        algorithm=dict(kl_coef=0.04, clip_low=0.2, clip_high=0.2), samples=64, rate=1e-6
    ),
    # Liu et al. 2025, Oat-Zero: 128 prompts x 8.
    "dr_grpo": dict(algorithm=dict(), samples=8, rate=1e-6),
    # Yu et al. 2025: 512 prompts x 16 in 16 minibatches, which 16 prompts are too few for, up to 10
    # draws, a soft penalty over the last fifth of the budget of tokens, warm-up over 20 batches.
    # Signal is correctness: lengths, which the penalty tells apart, are none.
    "dapo": dict(
        rewards=dict(long=dict(name="overlong", weight=1.0)),
        algorithm=dict(select=dict(how="signal", reward="exact")),
        samples=16, minibatches=4, rate=1e-6, warmup=80, draws=10,
    ),
    # Zheng et al. 2025: four minibatches; K and the rate are ours.
    "gspo": dict(algorithm=dict(), samples=8, minibatches=4, rate=1e-6),
    # Khatri et al. 2025 (ScaleRL): 48 prompts x 16; the rate is ours.
    "cispo": dict(algorithm=dict(clip_high=5.0), samples=16, rate=1e-6),
    # Ahmadian et al. 2024: 512 rollouts, K of 2 or 4.
    "rloo": dict(algorithm=dict(kl_coef=0.03), samples=4, rate=1e-6),
    # Hu 2025; K = 1 is the point of it, the rate is ours.
    "reinforce_plus_plus": dict(algorithm=dict(kl_coef=0.01), samples=1, rate=1e-6),
    # Sidahmed et al. 2024, summaries: 128 episodes; adapters on every attention projection.
    "pe_reinforce": dict(
        algorithm=dict(kl_coef=0.05), samples=1, temperature=0.7, rate=1e-5,
        adapters=dict(lora_rank=8, lora_targets=("query", "key", "value", "output")),
    ),
    # Mukobi et al. 2023: best of 16, 64 tokens; adapters of rank 4 on q and v.
    "superhf": dict(
        algorithm=dict(kl_coef=0.35), samples=16, top_p=0.95, rate=2e-5, schedule="cosine",
        warmup=32, adapters=dict(lora_rank=4, lora_alpha=32.0, lora_targets=("query", "value")),
    ),
    # Dong et al. 2023 (RAFT): best of 32; the rate is ours.
    "best_of_n": dict(algorithm=dict(), samples=32, rate=2e-5),
    # Anthony et al. 2017; for language models Singh et al. 2023 (ReST-EM). The numbers are ours.
    "expert_iteration": dict(
        algorithm=dict(reward="exact", threshold=0.5, most=4), samples=16, epochs=2, rate=2e-5
    ),
    # Cui et al. 2025: an implicit reward (β 0.05, or the folder's) that learns from the checker's
    # labels, prompts of an accuracy from 0.2 to 0.8; 256 prompts x 4; draws are ours.
    "prime": dict(
        algorithm=dict(coef=5.0, select=dict(how="range", reward="exact", low=0.2, high=0.8)),
        samples=4, rate=5e-7, draws=4,
    ),
    # Guo et al. 2024: 128 prompts, two samples each.
    "online_dpo": dict(algorithm=dict(beta=0.1), samples=2, temperature=0.9, rate=5e-7),
}  # fmt: skip


def rewards(folder: str) -> dict:
    """The exact checker; or a reward model, and the checker as a metric that trains nothing."""
    exact = dict(name="exact_match", weight=0.0 if folder else 1.0)
    if not folder:
        return dict(exact=exact)
    learned = dict(init_from=folder, head="outcome", normalise=True, clip=3.0, shrink=1.0)
    return dict(outcome=dict(name="outcome_model", weight=1.0, **learned), exact=exact)


def implicit_rewards(folder: str) -> dict:
    """The exact checker, and a model that learns from it; it starts as a run of train_dpo, which
    the folder is, or (empty) as the policy."""
    learner = dict(learning_rate=1e-6, schedule="constant", warmup=2, eps=1e-8)
    implicit = dict(name="implicit_model", weight=1.0, init_from=folder)
    implicit |= dict(label="exact", threshold=0.5, optimizer=learner)
    return dict(exact=dict(name="exact_match", weight=1.0), implicit=implicit)


def data_of(folder: str, default: ConfigDict) -> ConfigDict:
    """The prompts and the tokenizer of the run in a folder; of another model its tokenizer."""
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():  # what is wrong with it the program says
        return default
    found = json.loads(path.read_text(encoding="utf-8"))
    if "model_type" in found:
        return ConfigDict(default.to_dict() | dict(tokenizer=folder))
    return ConfigDict(found["data"]) if "name" in found.get("data", {}) else default


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, method="ppo", init_from="", reward="", prompts=16, steps=100, seed=0)
    if args.method not in METHODS:
        raise ValueError(f"method={args.method!r}; known: {', '.join(METHODS)}")
    paper = METHODS[args.method]
    config = tiny()
    config.seed = args.seed
    # A model of a folder has its own sizes; "tiny" is that of random weights.
    model = dict(init_from=args.init_from, remat="products", compute_dtype="float32")
    config.model = model if args.init_from else dict(name="tiny", **model)
    config.data = data_of(args.init_from, config.data)
    config.model.update(paper.get("adapters", {}))
    # PE-RLHF's critic is adapters on the policy's base.
    from_reward = args.reward and args.method not in ("pe_reinforce", "prime")
    config.value.init_from = "outcome" if from_reward else "policy"
    of_steps = args.method == "prime"
    config.rewards = implicit_rewards(args.reward) if of_steps else rewards(args.reward)
    config.rewards.update(paper.get("rewards", {}))
    if "long" in config.rewards:  # the paper's 20,480 and 4,096 tokens are its budget
        limit = config.rollout.max_tokens
        config.rewards.long.update(limit=limit, buffer=limit // 5)
    config.algorithm = dict(name=args.method) | paper["algorithm"]
    if args.method == "dr_grpo":  # the paper's 3000 is its budget of tokens; this is the run's
        config.algorithm.constant = config.rollout.max_tokens
    config.rollout.update(
        prompts=args.prompts, samples=paper["samples"], max_draws=paper.get("draws", 1)
    )
    config.rollout.sampling.update(
        temperature=paper.get("temperature", 1.0), top_p=paper.get("top_p", 1.0)
    )
    config.updates.update(epochs=paper.get("epochs", 1), minibatches=paper.get("minibatches", 1))
    for role in ("policy", "value"):
        config.optimizer[role].learning_rate = paper.get(f"{role}_rate", paper["rate"])
        config.optimizer[role].eps = 1e-5 if config.algorithm.name == "ppo" else 1e-8
        config.optimizer[role].warmup = paper.get("warmup", 2)
        config.optimizer[role].schedule = paper.get("schedule", "constant")
    config.train.steps = args.steps
    if "pretrain" in paper:  # a share of the steps, which is ours: papers look at the critic
        config.value.pretrain = dict(steps=max(1, int(paper["pretrain"] * args.steps)))
    return config
