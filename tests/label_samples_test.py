"""Labels of samples: what becomes a pair, a correctness row, a step row."""

import random

from rlhf_jax.label_samples import check, pairs, rows_of, with_messages

QUESTION = "37 +8"
RIGHT = "37+8=45\n#### 45"
SLIPPED = "37+8=35\n#### 35"


def sample(completion, ended=True):
    return check(f"{QUESTION}\n", QUESTION, completion, ended, 100)


def test_steps_and_answers_are_judged_exactly():
    right, wrong = sample(RIGHT), sample(SLIPPED)
    assert (right.correct, right.labels) == (True, (True, True))
    assert (wrong.correct, wrong.labels) == (False, (False, False))
    assert wrong.steps == ["37+8=35", "#### 35"]


def test_a_truncated_completion_is_no_success_and_no_training_row():
    cut = sample(RIGHT, ended=False)
    assert not cut.correct
    assert rows_of([cut], 4, random.Random(0)) == {"correctness": [], "steps": [], "pairs": []}


def test_pairs_are_right_against_wrong_of_one_problem():
    group = [sample(RIGHT), sample(SLIPPED), sample(SLIPPED), sample(RIGHT, ended=False)]
    found = list(pairs(group, 10, random.Random(0)))
    assert [(a.completion, b.completion) for a, b in found] == [(RIGHT, SLIPPED)]
    other = sample("37+8=46\n#### 46")
    assert len(list(pairs([*group, other], 10, random.Random(0)))) == 2
    assert len(list(pairs([*group, other], 1, random.Random(0)))) == 1
    assert not list(pairs([sample(RIGHT)] * 2, 4, random.Random(0)))


def test_a_pair_has_two_well_formed_sides():
    group = [sample(RIGHT), sample("37+8=35"), sample("37+8=3\n5\n#### 35"), sample("#### 4 5")]
    assert not list(pairs(group, 10, random.Random(0)))
    assert len(rows_of(group, 10, random.Random(0))["correctness"]) == 4


def test_rows_have_the_fields_that_training_reads():
    rows = rows_of([sample(RIGHT), sample(SLIPPED)], 4, random.Random(0))
    assert rows["pairs"] == [
        {"prompt": f"{QUESTION}\n", "chosen": RIGHT, "rejected": SLIPPED},
    ]
    assert [row["label"] for row in rows["correctness"]] == [1.0, 0.0]
    assert [row["labels"] for row in rows["steps"]] == [[1.0, 1.0], [0.0, 0.0]]


def test_lines_hold_the_dialogue_that_a_template_wrote():
    question = {"role": "user", "content": "1+1?"}
    record = {"messages": [question, {"role": "assistant", "content": "2"}]}
    rows = {"pairs": [{"prompt": "1+1?", "chosen": "2", "rejected": "3"}], "scores": []}
    assert with_messages(rows, record, None) is rows
    found = with_messages(rows, record, "messages")
    assert found == {"pairs": [{**rows["pairs"][0], "messages": [question]}], "scores": []}
