"""docs/results/real_input.md from the summaries of `benchmarks.real_input`: no number by hand."""

import pathlib
import textwrap
from collections.abc import Sequence

from benchmarks.pages import Numbers, interval, last_day, read, read_lines, table

EDGE = 5  # steps at the beginning and the end of a run over which a metric is averaged
JUDGED = {True: "right", False: "wrong"}
SHOWN = 4  # prompts whose first sample is printed


def paragraph(text: str) -> str:
    """The text on lines of up to 100 characters."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def verdict(numbers: Numbers) -> str:
    """What the gain's interval says, in words."""
    low, high = numbers["after/gold_gain_low"], numbers["after/gold_gain_high"]
    if low > 0:
        return "Gold rose, and the interval of the gain excludes 0."
    return "Gold fell." if high < 0 else "The interval of the gain includes 0: nothing is shown."


def edges(metrics: Sequence[Numbers], name: str) -> list[str]:
    """The metric's mean over the first and over the last steps."""
    values = [row[name] for row in metrics]
    ends = (values[:EDGE], values[-EDGE:])
    return [f"{sum(part) / len(part):.3g}" for part in ends]


def samples(lines: Sequence[Numbers]) -> str:
    """The first sample of the first prompts, before and after; nothing is picked."""
    found: dict[str, dict[str, Numbers]] = {}
    for line in lines:
        found.setdefault(line["prompt"], {}).setdefault(line["stage"], line)
    blocks = []
    for prompt, by_stage in list(found.items())[:SHOWN]:
        blocks.append(f"**{prompt}**\n")
        for stage in ("before", "after"):
            line = by_stage[stage]
            text = " ".join(line["completion"].split())
            blocks.append(f"- {stage} (gold {line['gold']:.2f}): {text}")
        blocks.append("")
    return "\n".join(blocks).rstrip()


def stories(folder: pathlib.Path) -> str:
    labels, reward = (read(folder / stage / "summary.json") for stage in ("labels", "reward"))
    numbers = read(folder / "evaluation/summary.json")
    metrics = read_lines(folder / "policy/metrics.jsonl")
    gold = read(folder / "config.json")["stages"]["policy"]["config"]["rewards"]["gold"]
    lines = read_lines(folder / "evaluation/evaluation.jsonl")
    rows = [
        ["gold before", interval(numbers, "before/gold")],
        ["gold after", interval(numbers, "after/gold")],
        ["gain", interval(numbers, "after/gold_gain")],
        ["KL from before, nats per completion", interval(numbers, "after/kl", 2)],
        ["tokens per completion, before", interval(numbers, "before/length", 1)],
        ["tokens per completion, after", interval(numbers, "after/length", 1)],
    ]
    watched = ("reward/outcome", "reward/gold", "objective/kl_ref", "policy/sampler_gap")
    run = [[f"`{name}`", *edges(metrics, name)] for name in watched]
    held_out = {line["prompt"] for line in lines}
    words = ", ".join(gold["words"])
    what = f"""
`configs/stories.py`: 260 thousand pretrained weights (llama2.c, TinyStories) write children's
stories. Gold is the reward `keywords`: how many different words of a list a story uses, at most
{gold["limit"]}, as a share of {gold["limit"]}. The list: {words}."""
    how = f"""
Gold labelled {labels["rows/pairs"]:,} pairs of the model's own samples (mean gold
{labels["score"]:.3f}); the outcome model starts from the same weights and orders
{reward["eval/held_out/accuracy"]:.3f} of {labels["rows/held_out_pairs"]:,} pairs of held-out
beginnings as gold does. PPO ({len(metrics)} steps) is paid by the outcome model only.
Evaluation: {len(held_out)} beginnings that no stage has seen, {len(lines) // 2 // len(held_out)}
samples of each; intervals are 95 % over beginnings, the gain is on the same beginnings."""
    went = f"""
{verdict(numbers)} Means over the first and the last {EDGE} steps of PPO (`reward/gold` has weight
0: it is watched and trains nothing; the gap of sampler and trainer is in nats per token):"""
    return f"""## A pretrained model and a learned reward: stories260K

{paragraph(what)}

{paragraph(how)}

{table(["what", "value (95 % interval)"], rows)}

{paragraph(went)}

{table(["metric", "first", "last"], run)}

The first sample of the first {SHOWN} beginnings, before and after, none picked:

{samples(lines)}"""


def pairs_row(name: str, folder: pathlib.Path) -> list[str]:
    numbers = read(folder / "evaluation/summary.json")
    trained = read(folder / "reward/summary.json")
    return [
        name,
        str(trained["steps"]),
        interval(numbers, "outcome_model/pair_accuracy"),
        f"{numbers['outcome_model/longer_wins']:.3f}",
    ]


def against_length(numbers: Numbers, longer: float) -> str:
    """How the reward model stands to the trivial baseline, whose accuracy is given, in words."""
    low = numbers["outcome_model/pair_accuracy_low"]
    high = numbers["outcome_model/pair_accuracy_high"]
    if low > longer:
        return "The model beats that."
    if high < longer:
        return "The model does not reach that."
    return "The model is no better and no worse than that, as far as this test can tell."


def pairs(workdir: pathlib.Path) -> str:
    numbers = read(workdir / "pairs_ukp/evaluation/summary.json")
    baseline = read(workdir / "pairs_ukp/baseline.json")
    longer = max(baseline["longer_wins"], numbers["outcome_model/longer_wins"])
    rows = [
        pairs_row("UKPConvArg1", workdir / "pairs_ukp"),
        pairs_row("HH-RLHF dialogues", workdir / "pairs_hh"),
    ]
    said = against_length(numbers, longer)
    text = f"""
`configs/pairs.py`, a tiny model of random weights, GPT-2 tokenizer. UKPConvArg1Strict: which of two
arguments is more convincing, {baseline["pairs"]:,} test pairs on topics that are not in training.
The longer one wins in {baseline["longer_wins"]:.3f} of them by characters. {said}
HH-RLHF: whole dialogues of up to 192 tokens, split at the last reply by the option
`format="dialogue"`; two steps show that they get through, and nothing else."""
    return f"""## Human pairs

{paragraph(text)}

{table(["set", "steps", "accuracy (95 % interval)", "the one with more tokens wins"], rows)}"""


def grading(workdir: pathlib.Path) -> str:
    summary = read(workdir / "gsm8k_grading/summary.json")
    rows = [
        [row["form"], JUDGED[row["right"]], f"{row['solutions']:,}", f"{row['graded_so']:,}"]
        for row in summary["rows"]
    ]
    ppo = read(workdir / "gsm8k_ppo/summary.json")
    text = f"""
{summary["records"]:,} reference solutions of the training split, as they are and changed, encoded
and decoded by the GPT-2 tokenizer and graded by the reward `exact_match`:"""
    plumbing = f"""
PPO plumbing: {ppo["steps"]} steps of `configs/ppo_tiny.py` (random weights, no learned reward) on
GSM8K questions of up to 64 tokens of the GPT-2 tokenizer: loss {ppo["update/loss"]:.3g}, exact
answers {ppo["reward/exact"]:.3f} (nothing else is expected), sampler and trainer
{ppo["policy/sampler_gap"]:.1e} nats per token apart, {ppo["seconds"]:.0f} s with compilation."""
    return f"""## GSM8K

{paragraph(text)}

{table(["solution", "is", "solutions", "graded so"], rows)}

{paragraph(plumbing)}"""


def facts(workdir: pathlib.Path) -> str:
    """Seconds by part, and what ran it."""
    paths = {path.parent.name: path for path in workdir.glob("*/summary.json")}
    found = {name: read(path) for name, path in sorted(paths.items())}
    total = sum(one["seconds"] for one in found.values())
    each = ", ".join(f"{name} {one['seconds']:.0f}" for name, one in found.items())
    one = next(iter(found.values()))
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    day = last_day(paths.values())
    return (
        f"{day}, {one['devices']}, Python {one['python']}, {versions}. Seconds: {each}; "
        f"{total / 60:.0f} minutes in all."
    )


def page(workdir: pathlib.Path, command: str) -> str:
    """The page as Markdown."""
    return f"""# Real input

    {command}

{paragraph(facts(workdir) + " Written by that command; run again, it goes on where it stopped.")}

The folder `--data` holds `tiny_models/stories260K` (karpathy/tinyllamas), `ukp_convarg1` (UKPLab,
acl2016-convincing-arguments, CC BY 4.0), `hh_rlhf` (anthropics/hh-rlhf, MIT) and `gsm8k`
(openai/grade-school-math, MIT) as `train.jsonl.gz` and `test.jsonl.gz`, and
`tokenizers/gpt2/tokenizer.json.gz`.

{stories(workdir / "stories")}

{pairs(workdir)}

{grading(workdir)}
"""
