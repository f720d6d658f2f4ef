"""Exact answers: how numbers are read, and what a completion without one is worth."""

import decimal

import numpy as np
import pytest

from rlhf_jax.rewards.exact_match import exact_match, is_exact, parse_answer, parse_number
from tests.rewards.examples import TOKENIZER, spell

NUMBERS = {
    "90": "90",
    " 90 ": "90",
    "-7": "-7",
    "+7": "7",
    "1,234,567": "1234567",
    "$1,200.50": "1200.50",
    "-$5": "-5",
    "$-5": "-5",
    "90.": "90",
    "90.0": "90",
    ".5": "0.5",
    "90 apples": "90",
    "90, because": "90",
    "007": "7",
    "123456789012345678901234567890": "123456789012345678901234567890",
}
NO_NUMBERS = ["", "ninety", "apples 90", "90x", "1/2", "1.2.3", "--5", "5e3", "٩٠", "-", "$", "."]


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert parse_number(text) == decimal.Decimal(NUMBERS[text])


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_not_a_number(text):
    assert parse_number(text) is None


def test_big_numbers_and_decimals_are_compared_exactly():
    assert parse_number("12345678901234567890") != parse_number("12345678901234567891")
    assert parse_number("0.3") != parse_number("0.30000000000000001")


def test_the_last_marker_counts_and_only_its_line():
    assert parse_answer("#### 1\nno: #### 2", "####") == 2
    assert parse_answer("#### 1\n#### ", "####") is None
    assert parse_answer("####\n90", "####") is None
    assert parse_answer("90", "####") is None
    assert parse_answer("so A: 4", "A:") == 4


def scored(completions, answers, **kwargs):
    records = [{"answer": answer} for answer in answers]
    reward = exact_match(
        decode=TOKENIZER.decode, records=lambda source, record: records[record], **kwargs
    )
    rollouts = spell(["q"] * len(answers), completions, group=len(completions) // len(answers))
    return np.asarray(reward.score(reward.init(), rollouts)[0].outcome).tolist()


def test_scores_against_solutions_and_plain_numbers():
    solution = "37+8=45\n45*2=90\n#### 90"
    assert scored(["x\n#### 90", "#### 90.0", "90", "#### 9"], [solution]) == [1, 1, 0, 0]
    assert scored(["#### 1200", "#### 1,201"], ["$1,200."]) == [1, 0]
    assert scored(["A: 3"], ["3"], marker="A:") == [1]


@pytest.mark.parametrize(
    ("completion", "answer", "exact"),
    [
        ("37+8=45\n#### 45", "37+8=45\n#### 45", True),
        ("#### 45.0", "45", True),
        ("#### 1,234", "1234", True),
        ("#### 44\n#### 45", "#### 45", True),  # the last marker counts
        ("45", "#### 45", False),
        ("#### forty-five", "#### 45", False),
        ("", "#### 45", False),
    ],
)
def test_the_number_after_the_last_marker_decides(completion, answer, exact):
    assert is_exact(completion, answer) is exact


def test_a_record_without_a_number_is_an_error():
    with pytest.raises(RuntimeError, match=r"source 0, record 0.*holds no number"):
        scored(["#### 1"], ["#### none"])
    with pytest.raises(ValueError, match="the answer holds no number: 'none'"):
        is_exact("#### 1", "none")
    with pytest.raises(RuntimeError, match="KeyError"):
        scored(["#### 1"], ["1"], answer="final")
    with pytest.raises(ValueError, match="marker"):
        scored(["#### 1"], ["1"], marker="")
