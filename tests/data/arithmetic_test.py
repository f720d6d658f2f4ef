"""The embedded task: its arithmetic against Python's, its labels by hand and by a loop."""

import collections

import numpy as np
import pytest

from rlhf_jax.data import arithmetic
from rlhf_jax.data.arithmetic import Options, Problem, label_solution
from rlhf_jax.text.steps import split_steps

QUESTION = "37 +8 *2"  # 45, 90


@pytest.mark.parametrize(
    ("value", "op", "k", "right", "careless"),
    [
        (37, "+", 8, 45, 35),
        (31, "+", 8, 39, 39),  # no carry
        (97, "+", 8, 5, 95),  # the carry leaves the modulus
        (32, "-", 8, 24, 34),
        (38, "-", 8, 30, 30),
        (3, "-", 8, 95, 5),  # the borrow comes from nowhere
        (45, "*", 2, 90, 80),
        (43, "*", 2, 86, 86),
        (45, "*", 3, 35, 25),
        (60, "*", 3, 80, 80),  # the last carry is cut by the modulus: nothing to forget
    ],
)
def test_values_by_hand(value, op, k, right, careless):
    assert arithmetic.true_value(value, op, k, 100) == right
    assert arithmetic.slipped_value(value, op, k, 100) == careless


def test_more_digits():
    assert arithmetic.slipped_value(295, "+", 7, 1000) == 292
    assert arithmetic.slipped_value(456, "*", 3, 1000) == 258  # 12, 15, 18 without carries
    assert arithmetic.true_value(456, "*", 3, 1000) == 368


@pytest.mark.parametrize(
    ("completion", "correct", "labels"),
    [
        ("37+8=45\n45*2=90\n#### 90", True, [1, 1, 1]),
        ("37+8=45\n45*2=90\n#### 90\n", True, [1, 1, 1]),
        ("37+8=45\n\n45*2=90\n#### 90", True, [1, 1, 1]),  # blank lines are no steps
        ("37+8=35\n35*2=70\n#### 70", False, [0, 0, 0]),
        ("37+8=45\n45*2=80\n#### 80", False, [1, 0, 0]),
        ("37+8=45\n45*2=90\n#### 80", False, [1, 1, 0]),
        ("37+8=35\n45*2=90\n#### 90", True, [0, 0, 0]),  # repaired: the answer is right
        ("45*2=90\n#### 90", True, [0, 0]),  # a step is missing
        ("37+8=45\n45*2=90", False, [1, 1]),  # no answer
        ("#### 90", True, [0]),
        ("37+8=45\n45*2=90\n#### 90\n90+1=91", True, [1, 1, 1, 0]),
        ("37+8=45\n45*2=90\n#### 90\n#### 1", False, [1, 1, 1, 0]),  # the last answer counts
        ("37 +8=45\n45*2=90\n#### 90", True, [0, 0, 0]),  # another form is another line
        ("37+8=45\n45*2=90\n####90", True, [1, 1, 0]),
        ("37+8=45\n45*2=90\n#### 9 0", False, [1, 1, 0]),
        ("37+8=45\n45*2=90\n#### ", False, [1, 1, 0]),
        ("", False, [0]),
        ("\n\n", False, [0]),
    ],
)
def test_labels_by_hand(completion, correct, labels):
    found = label_solution(QUESTION, completion)
    assert found == (correct, tuple(bool(label) for label in labels))
    assert len(labels) == len(split_steps(completion))


def test_modulus_of_the_judge():
    assert label_solution("370 +8", "370+8=378\n#### 378", 1000) == (True, (True, True))
    assert label_solution("97 +8", "97+8=105\n#### 105", 1000) == (True, (True, True))
    assert label_solution("97 +8", "97+8=105\n#### 105", 100) == (False, (False, False))


@pytest.mark.parametrize("question", ["", "37", "37 + 8", "37+8", "a +8", "37 /2", "37 +8 =?"])
def test_judge_refuses_other_questions(question):
    with pytest.raises(ValueError, match=r"not an arithmetic question|not enough values"):
        label_solution(question, "#### 1")


def slow_solution(problem, forget):
    """Column by column with pencil and paper; `forget` lists the lines that drop all carries."""
    value, lines, right = problem.start, [], True
    labels = []
    for at, (op, k) in enumerate(problem.operations):
        text, carry, result = f"{value:02d}", 0, ""
        for place, digit in enumerate(reversed(text)):
            other = k if op == "*" else (k if place == 0 else 0)
            column = {"+": int(digit) + other, "-": int(digit) - other, "*": int(digit) * other}[op]
            column += carry
            carry = 0 if at in forget else column // 10
            result = f"{column % 10}{result}"
        lines.append(f"{value}{op}{k}={int(result)}")
        truth = eval(f"({value}{op}{k})%100")
        right = right and int(result) == truth
        labels.append(right)
        value = int(result)
    return [*lines, f"#### {value}"], [*labels, right]


def test_demonstrations_against_pencil_and_paper():
    """Every slipped solution is one that forgets carries, and is judged as such."""
    options = Options(slip=0.5)
    counts = collections.Counter()
    for index in range(400):
        problem = arithmetic.problem_at(index, options)
        record = arithmetic.record(index, problem, options)
        assert eval(record["expression"]) == record["final"]
        truth, _ = slow_solution(problem, ())
        assert record["answer"] == "\n".join(truth)
        assert label_solution(problem.question, record["answer"]) == (True, (True,) * len(truth))
        assert record["steps"] == record["completion"].split("\n")
        n = len(problem.operations)
        forgets = [[i for i in range(n) if bits >> i & 1] for bits in range(2**n)]
        matches = [slow_solution(problem, forget) for forget in forgets]
        match = next(m for m in matches if m[0] == record["steps"])
        assert record["labels"] == match[1]
        # Two slips can cancel, so the answer may be right though a step is not.
        assert record["is_correct"] == (match[0][-1] == truth[-1])
        counts["cancelled"] += record["is_correct"] and not match[1][-1]
        value = problem.start
        for line, (op, k) in zip(record["steps"], problem.operations, strict=False):
            careless = arithmetic.slipped_value(value, op, k, 100)
            if careless != arithmetic.true_value(value, op, k, 100):
                counts["chances"] += 1
                counts["slips"] += int(line.partition("=")[2]) == careless
            value = int(line.partition("=")[2])
    assert counts["chances"] > 300 and 0 < counts["cancelled"] < 40
    # 0.5 within five standard errors.
    share = counts["slips"] / counts["chances"]
    assert abs(share - 0.5) < 5 * 0.5 / counts["chances"] ** 0.5


@pytest.mark.parametrize(("slip", "forget"), [(0.0, ()), (1.0, range(9))])
def test_slip_never_and_always(slip, forget):
    options = Options(slip=slip)
    for index in range(50):
        problem = arithmetic.problem_at(index, options)
        steps, labels = slow_solution(problem, forget)
        record = arithmetic.record(index, problem, options)
        assert (record["steps"], record["labels"]) == (steps, labels)


def test_questions_do_not_depend_on_slips():
    careful, careless = Options(), Options(slip=0.9)
    for index in range(20):
        assert arithmetic.problem_at(index, careful) == arithmetic.problem_at(index, careless)


def test_splits_are_disjoint_and_distinct():
    options = Options(min_ops=1, max_ops=2, train=3000, test=300)
    found = {
        split: [p for _, p in arithmetic.problems(split, options)] for split in ("train", "test")
    }
    assert [len(found["train"]), len(found["test"])] == [3000, 300]
    questions = {split: {p.question for p in ps} for split, ps in found.items()}
    assert [len(questions["train"]), len(questions["test"])] == [3000, 300]
    assert not questions["train"] & questions["test"]
    # Another seed may draw the same problem, but never into the other split.
    other = arithmetic.problems("test", Options(min_ops=1, max_ops=2, train=1, test=300, seed=5))
    assert not {p.question for _, p in other} & questions["train"]


def test_problems_cover_their_options():
    options = Options(min_ops=2, max_ops=3, operators="+*")
    drawn = [arithmetic.problem_at(i, options) for i in range(2000)]
    assert {len(p.operations) for p in drawn} == {2, 3}
    assert {p.start for p in drawn} == set(range(100))
    assert {o for p in drawn for o in p.operations} == {
        *(("+", k) for k in range(2, 10)),
        *(("*", k) for k in (2, 3)),
    }
    text = "".join(p.question + arithmetic.write_solution(p) for p in drawn)
    assert set(text) <= set(arithmetic.ALPHABET)


def test_parse_inverts_question():
    for index in range(100):
        problem = arithmetic.problem_at(index, Options(max_ops=5))
        assert arithmetic.parse_question(problem.question) == problem
    assert arithmetic.parse_question(QUESTION) == Problem(37, (("+", 8), ("*", 2)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_ops", 0),
        ("min_ops", 5),
        ("modulus", 50),
        ("modulus", 1),
        ("operators", "+/"),
        ("operators", ""),
        ("slip", 1.5),
        ("slip", float("nan")),
        ("train", 0),
        ("test", 0),
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=rf"arithmetic option {name}="):
        Options(**{name: value})


def test_more_problems_than_there_are():
    options = Options(min_ops=1, max_ops=1, operators="*", train=1000)
    with pytest.raises(ValueError, match="of 1000 different train problems"):
        list(arithmetic.problems("train", options))
    with pytest.raises(ValueError, match="no split 'dev'"):
        list(arithmetic.problems("dev", options))


def test_slips_are_seen_by_the_share_that_is_right():
    """The calibrated task: about 44 % of demonstrations are right at slip 0.5."""
    options = Options(slip=0.5)
    right = [
        arithmetic.record(i, arithmetic.problem_at(i, options), options)["is_correct"]
        for i in range(2000)
    ]
    assert 0.38 < np.mean(right) < 0.50
