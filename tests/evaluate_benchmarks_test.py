"""The alignment tax: what policies lost or gained on benchmarks against the one they began as."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax import sections
from rlhf_jax.evaluate import changes, evaluate
from rlhf_jax.evaluate_benchmarks import numbers_of, of_benchmark, page, plan
from tests.evaluate_gold_test import ALPHABET, GOLD, PROMPTS, changed, policy  # noqa: F401


def config_of(folder):
    """Two benchmarks of one task: a wide rule and a narrow one."""
    config = changed("evaluation", folder).to_dict()
    data = {name: config["data"][name] for name in ("tokenizer", "max_prompt", "overlong")}
    rule = dict(GOLD, words=("b",), limit=1)
    inline = dict(name="inline", split="all", options=dict(prompt=PROMPTS), problems=4)
    return ConfigDict(
        {name: config[name] for name in ("seed", "mesh", "model", "rollout")}
        | dict(
            data=data | dict(template="{prompt}"),
            policies=dict(sft=dict(init_from=folder), policy=dict(init_from=folder)),
            start="sft",
            benchmarks=dict(
                wide=inline | dict(gold=GOLD),
                narrow=inline | dict(gold=rule, max_tokens=4, problems=3),
            ),
        )
    )


def test_the_same_policy_answers_the_same_and_changed_nothing(policy, tmp_path):  # noqa: F811
    config = config_of(policy)
    sections.check("evaluate", config)
    numbers = evaluate(config, str(tmp_path))
    assert numbers["wide/policy"] == numbers["wide/sft"] > 0
    for label in ("wide", "narrow"):
        assert {numbers[f"{label}/policy/change{end}"] for end in ("", "_low", "_high")} == {0.0}
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 8 * (4 + 3)
    for label in ("wide", "narrow"):
        said = {
            stage: [(r["prompt"], r["completion"]) for r in rows if r["benchmark"] == label
                    and r["stage"] == stage]
            for stage in ("sft", "policy")
        }  # fmt: skip
        assert said["sft"] == said["policy"]
    assert max(len(r["completion"]) for r in rows if r["benchmark"] == "narrow") <= 4
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| +0.000 (+0.000 to +0.000) | no change seen | 3 |" in text
    assert json.loads((tmp_path / "summary.json").read_text())["narrow/policy/change"] == 0.0


def test_changes_are_paired_by_prompt():
    """Prompts differ by a lot, the policy is worse by 0.1 to 0.3 on each."""
    start = np.float32([[1, 1], [0, 0], [0.5, 0.7], [0.5, 0.5]])
    drop = np.float32([[0.1], [0.3], [0.2], [0.2]]) * np.ones((4, 2), np.float32)
    numbers = numbers_of("math", {"sft": start, "ppo": start - drop, "dpo": start + drop}, "sft")
    reach = 3.18244630 * np.sqrt(0.02 / 3) / 2  # Student's t with three degrees of freedom
    change = [numbers[f"math/ppo/change{end}"] for end in ("", "_low", "_high")]
    np.testing.assert_allclose(change, (-0.2, -0.2 - reach, -0.2 + reach), rtol=1e-5)
    assert numbers["math/sft_high"] - numbers["math/sft_low"] > 0.5  # unpaired it would be lost in
    policies = {name: dict(init_from=f"runs/{name}") for name in ("sft", "ppo", "dpo")}
    config = ConfigDict(
        dict(policies=policies, start="sft", rollout=dict(samples=2))
        | dict(benchmarks=dict(math=dict(problems=4)))
    )
    gained, lost = page(config, numbers).splitlines()[-2:]
    assert gained.startswith("| math | dpo | 0.525 (")
    assert gained.endswith("| +0.200 (+0.070 to +0.330) | gained | 4 |")
    assert lost.endswith("| -0.200 (-0.330 to -0.070) | lost | 4 |")


def test_exact_answers_change_problem_by_problem():
    def rows(stage, correct):
        return [
            dict(stage=stage, mode="sample", prompt=str(i // 2), correct=bool(c))
            for i, c in enumerate(correct)
        ]

    found = [*rows("sft", (0, 0, 1, 1)), *rows("policy", (1, 0, 1, 1))]
    numbers = changes(found, "sft")
    assert numbers["policy/accuracy_change"] == 0.25  # 0.5 on one problem, 0 on the other
    assert numbers["policy/accuracy_change_low"] == pytest.approx(0.25 - 12.706204736 * 0.25)
    assert "sft/accuracy_change" not in numbers
    assert changes(found, "") == {} == changes(found[:2] + found[4:6], "sft")


def test_a_benchmark_says_how_its_prompts_are_written(policy):  # noqa: F811
    config = config_of(policy)
    config.benchmarks.wide.chat = "messages"
    data = of_benchmark(config, "wide").data
    assert data.chat == "messages" and "template" not in data
    assert of_benchmark(config, "narrow").data.template == "{prompt}"
    assert of_benchmark(config, "narrow").rollout.max_tokens == 4
    plan(config_of(policy), lambda data: False)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("start", "stf", r"start='stf'; did you mean 'sft'\?; wanted one of policies"),
        ("policies", dict(sft=dict(init_from="x")), "policies has 'sft' alone"),
        ("benchmarks", {}, "benchmarks is empty"),
        ("benchmarks.wide.problems", 1, r"benchmarks\.wide\.problems=1; wanted 2 or more"),
        ("benchmarks.wide.problems", 5, r"benchmarks\.wide: problems=5 but data has 4"),
        ("benchmarks.wide.gold", dict(name="outcome_model"), r"benchmarks\.wide\.gold\.name="),
        ("benchmarks.wide.template", None, ""),  # that of data
        ("data.template", None, r"benchmarks\.narrow: template is missing"),
    ],
)
def test_bad_input_is_named(path, value, message, policy, tmp_path):  # noqa: F811
    config = config_of(policy)
    *outer, key = path.split(".")
    section = config
    for name in outer:
        section = section[name]
    with config.unlocked(), section.ignore_type():
        section[key] = value
    if not message:
        return plan(config, lambda data: False)
    with pytest.raises(ValueError, match=message):
        evaluate(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
