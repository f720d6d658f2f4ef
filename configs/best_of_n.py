"""Best-of-N of the quickstart: choosing among many samples by the two reward models, and by votes.

    python -m rlhf_jax.evaluate --workdir=runs/best \
        --config=configs/best_of_n.py:run=runs/quickstart

``run`` is the folder of a finished quickstart (`configs/quickstart.py`). 32 samples of each of 256
test problems from the fine-tuned model and from the policy; what the sample is worth that a reward
model would take among k of them, and the answer that most of them give. Minutes on two cores.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.common import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(arg, run="runs/quickstart", samples=32, problems=256, small=False)
    main = quickstart.evaluation(ConfigDict(dict(seed=0, small=args.small)))
    trained = f"{args.run}/reward"
    sizes = [2**i for i in range(args.samples.bit_length()) if 2**i <= args.samples]
    return ConfigDict(
        dict(
            seed=0,
            mesh=quickstart.MESH,
            model=dict(init_from=""),
            policies={name: dict(init_from=f"{args.run}/{name}") for name in ("sft", "policy")},
            problems=args.problems,
            data=main["data"],
            rollout=main["rollout"] | dict(prompts=16, samples=args.samples),
            gold=dict(name="exact_match"),
            rewards=dict(
                outcome=dict(name="outcome_model", init_from=trained),
                process=dict(
                    name="process_model", init_from=trained, transform="logit", aggregate="min"
                ),
                length=dict(name="length", per_token=-1.0, free=0),  # "the shorter wins"
            ),
            best_of=dict(
                sizes=tuple(sizes),
                marker="####",
                draws=200,
                weights=dict(outcome="sigmoid", process="score"),
            ),
        )
    )
