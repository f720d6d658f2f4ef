"""PPO with outcome and process rewards on a model of toy size: tests, fault drills, benchmarks.

    python -m rlhf_jax.train_policy --config=configs/ppo_tiny.py --workdir=/tmp/ppo_tiny

Twelve steps, under a minute on two cores after compilation. Models have random weights, so the
rewards mean nothing; what is tested is that everything runs, resumes and repeats itself.
"""

from ml_collections import ConfigDict

ALPHABET = "\n #*+-0123456789=?"


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: all devices that remain
            model=dict(name="tiny", init_from="", remat="products", compute_dtype="float32"),
            value=dict(init_from="outcome"),  # "policy", a reward's label, or a folder
            data=dict(
                name="arithmetic",
                split="train",
                data_dir="",  # "": a cache folder of the user's
                options=dict(min_ops=2, max_ops=3, modulus=100, slip=0.0, train=512, test=64),
                template="{question}\n",
                max_prompt=24,  # tokens
                overlong="error",
                tokenizer="chars:" + ALPHABET,
            ),
            extra=dict(),  # auxiliary supervised rows by name, for algorithms that need them
            rollout=dict(
                prompts=8,
                samples=4,
                max_tokens=32,
                max_draws=1,  # draws per step, for algorithms that select groups
                sampling=dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
            ),
            rewards=dict(
                outcome=dict(
                    name="outcome_model",
                    weight=1.0,
                    init_from="",
                    head="outcome",
                    normalise=True,  # by the statistics of the initial policy, frozen
                    clip=3.0,  # standard deviations
                    shrink=1.0,  # factor for negative scores; 1 = off
                ),
                process=dict(name="process_model", weight=1.0, init_from="", head="process"),
                exact=dict(name="exact_match", weight=1.0),
                length=dict(name="length", weight=0.01, per_token=-1.0, free=16),
            ),
            algorithm=dict(name="ppo", gamma=1.0, lam=0.95, kl_coef=0.02),
            # eps as is usual for PPO: Adam must not turn the rounding of tiny gradients into steps.
            optimizer=dict(
                policy=dict(learning_rate=1e-4, schedule="constant", warmup=2, eps=1e-5),
                value=dict(learning_rate=3e-4, schedule="constant", warmup=2, eps=1e-5),
            ),
            updates=dict(epochs=1, minibatches=2, microbatches=1),
            train=dict(steps=12, max_skipped=3),  # stop after so many non-finite updates in a row
            checkpoint=dict(every=4, keep=2),
            log=dict(every=1, samples_every=4, samples=4),
        )
    )
