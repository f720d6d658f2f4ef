"""Evaluation: exact answers, intervals, and the stages of a pipeline."""

import pytest
from ml_collections import ConfigDict

from rlhf_jax.evaluate import accuracies
from rlhf_jax.pipeline import check, place


def test_accuracies_are_named_by_stage_and_mode():
    given = list(enumerate((True, True, False, False)))
    rows = [dict(stage="sft", mode="sample", correct=c, prompt=f"{i}") for i, c in given]
    rows += [dict(stage="sft", mode="greedy", correct=True, prompt="0")]
    numbers = accuracies(rows)
    assert numbers["sft/accuracy"] == 0.5
    assert numbers["sft/accuracy_low"] < 0.5 < numbers["sft/accuracy_high"]
    assert numbers["sft/greedy_accuracy"] == numbers["sft/greedy_accuracy_high"] == 1.0
    # Samples of one prompt that are all alike say no more than one of them.
    again = accuracies([row for row in rows for _ in range(8)])
    assert again["sft/accuracy_low"] == pytest.approx(numbers["sft/accuracy_low"])


def test_the_workdir_is_put_in_place_everywhere():
    values = {"a": "{workdir}/sft", "b": [{"c": "jsonl:{workdir}/x"}], "d": 1}
    assert place(values, "run") == {"a": "run/sft", "b": [{"c": "jsonl:run/x"}], "d": 1}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((), "order="),
        (("one", "one"), "once"),
        (("two",), "stages has one"),
    ],
)
def test_bad_orders_are_named(order, message):
    stages = dict(one=dict(program="train_sft", config=dict()))
    with pytest.raises(ValueError, match=message):
        check(ConfigDict(dict(order=order, stages=stages)))


def test_an_unknown_program_lists_the_known_ones():
    stages = dict(one=dict(program="train_stf", config=dict()))
    with pytest.raises(ValueError, match="train_sft"):
        check(ConfigDict(dict(order=("one",), stages=stages)))
