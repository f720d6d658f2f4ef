"""A reward model on published sets: accuracy beside baselines, calibration, length, first errors.

    python -m rlhf_jax.evaluate --workdir=runs/report \
        --config=configs/eval_reward.py:model=DIR,rm_bench=FILE,processbench=FILE

DIR is the folder of a reward model: a run's, or of Hugging Face's form. Sets are JSONL files in
their published forms: ``rm_bench``, ``judgebench``, ``reward_bench``, ``reward_bench_2``,
``ppe_human``, ``ppe_correctness``, ``processbench`` and ``prmbench``; those that are not named are
left out, and a config file of your own may name as many of a form as it likes. The run's folder
has report.md, report.json and scores.jsonl.

Other arguments: ``tokenizer`` (in place of the model's own), ``template`` (the prompt's text around
{prompt}, as in training) or ``chat`` (the tokenizer's chat template), ``max_length`` (tokens of
prompt and completion; longer ones are left out and counted), ``rows`` (texts at a time), ``limit``
(records of each set, spread over the file; 0: all).
"""

from ml_collections import ConfigDict

from configs.common import parse_arg

# Arguments: each is the name of a form too, and that of the set in the report.
FORMS = (
    "rm_bench",
    "judgebench",
    "reward_bench",
    "reward_bench_2",
    "ppe_human",
    "ppe_correctness",
    "processbench",
    "prmbench",
)
# PPE leaves out prompts that nearly always or nearly never come out right.
KEPT = {"ppe_correctness": dict(pass_rates=(0.1, 0.9))}


def source(path: str) -> str:
    """The kind of a file by its name."""
    ending = path.removesuffix(".gz").rpartition(".")[2]
    return f"{ending if ending in ('json', 'parquet') else 'jsonl'}:{path}"


def get_config(arg: str | None = None) -> ConfigDict:
    args = parse_arg(
        arg,
        model="runs/reward",
        tokenizer="",
        template="{prompt}\n",
        chat=False,
        max_length=2048,
        rows=16,
        limit=0,
        **dict.fromkeys(FORMS, ""),
    )
    written = dict(chat="prompt") if args.chat else dict(template=args.template)
    return ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1, fsdp=1, tensor=1),  # -1: all devices that remain
            reward=dict(
                init_from=args.model,
                aggregate="min",  # of steps, where a model has no outcome head
                threshold=0.5,  # P above which a step is right
                threshold_from="",  # or the set whose F1 decides it
            ),
            data=dict(
                tokenizer=args.tokenizer,
                max_length=args.max_length,
                overlong="skip",
                end_of_text=True,  # completions end as they did in training
                rows=args.rows,
                **written,
            ),
            resamples=300,  # of the bootstrap
            reward_sets={
                form: dict(
                    form=form, name=source(args[form]), limit=args.limit, **KEPT.get(form, {})
                )
                for form in FORMS
                if args[form]
            },
        )
    )
