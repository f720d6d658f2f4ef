"""Letters of multiple choice: which one a text settles on, and how a record says it."""

import time

import numpy as np
import pytest

from rlhf_jax.rewards.choice import choice, chosen_letter, reference_letter
from tests.rewards.examples import TOKENIZER, spell

SAID = {
    "The answer is (C).": "C",
    "The answer is C": "C",
    "the answer is: **C**": "C",
    "Answer: C) because": "C",
    "ANSWER: (C)": "C",
    r"so $\boxed{C}$": "C",
    r"so $\boxed{\text{(C)}}$": "C",
    r"so \boxed{c}": "C",
    "#### C": "C",
    "#### I would say C": None,
    "#### a matter of taste": None,
    "\\boxed{I think B}": None,
    "#### I": "I",
    "#### A) the first": "A",
    "#### a": "A",
    "#### B because it is": "B",
    "So the answer is (C) 4.5 bits, not (D)": "C",
    "the best answer from the given options is (C)": "C",
    "the correct choice would be C.": "C",
    "the answer appears to be likely C": "C",
    "my best guess is option C.": "C",
    "Solution: Choice_C": "C",
    r"Solution: Choice\_C": "C",
    "Option C is correct.": "C",
    "(C) is the right answer": "C",
    "Therefore, the answer is:\n\nCCCCC": "C",
    "The answer is (A). No, wait. The answer is (C).": "C",
    r"\boxed{16}, so the answer is C": "C",
    r"The answer is \(C\)": "C",
    "The answer is J": "J",
}
NOT_SAID = [
    "",
    "C",
    "(A), (B) or (C)",
    "The answer is a matter of taste.",
    "The answer is Apples",
    "The answer is K",
    "The answer is not (C)",
    "The answer is I think unclear",
    "The answer is C3",
    "The answer is c",
    r"\boxed{16}",
    "Answer choices: A, B",
    "None of the choices (A, B, C, or D) are correct.",
    "The answer is D'Artagnan",
]


@pytest.mark.parametrize("text", SAID)
def test_letters_that_are_said(text):
    assert chosen_letter(text) == SAID[text]


@pytest.mark.parametrize("text", NOT_SAID)
def test_what_says_no_letter(text):
    assert chosen_letter(text) is None


@pytest.mark.parametrize(
    ("text", "fallbacks", "letter"),
    [
        ("I see.\n**C**", ("alone",), "C"),
        ("I see.\nCCCCC.\n", ("alone",), "C"),
        ("A cat\nsat", ("alone",), None),
        ("not (A) but (C) it is", ("brackets",), "C"),
        ("(A)\nB\nbut (C)", ("alone", "brackets"), "B"),
        ("(A)\nB\nbut (C)", ("brackets", "alone"), "C"),
        ("B\nThe answer is (C)", ("alone",), "C"),  # what is said comes first
    ],
)
def test_fallbacks(text, fallbacks, letter):
    assert chosen_letter(text, fallbacks) == letter


@pytest.mark.parametrize(
    "text",
    [
        "the answer is" + " " * 200_000,
        "the answer is " * 50_000,
        "answer of " * 50_000,
        "(" * 500_000,
        "\\boxed{" * 100_000,
        "answer is " + "C" * 500_000,
        "\n" * 500_000,
    ],
)
def test_long_texts_take_no_long_time(text):
    start = time.process_time()
    assert chosen_letter(text, ("alone", "brackets")) is None
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("value", "choices", "first", "letter"),
    [
        ("C", None, 0, "C"),
        ("(c)", None, 0, "C"),
        (" C. ", None, 0, "C"),
        (2, None, 0, "C"),
        (3, None, 1, "C"),
        ("Paris", ["Rome", " Paris"], 0, "B"),
        ("B", ["Rome", "Paris"], 0, "B"),
        ("A", ["B", "A"], 0, "B"),  # a text that is there comes before a letter
        (1, ["Rome", "Paris"], 0, "B"),
    ],
)
def test_references(value, choices, first, letter):
    assert reference_letter(value, choices, first=first) == letter


@pytest.mark.parametrize(
    ("value", "choices"),
    [
        ("K", None),
        ("", None),
        (10, None),
        (-1, None),
        (True, None),
        (None, None),
        (1.0, None),
        ("Bonn", ["Rome", "Paris"]),
        ("C", ["Rome", "Paris"]),
        (2, ["Rome", "Paris"]),
        ("Rome", ["Rome", "Rome"]),
    ],
)
def test_a_reference_that_names_no_option_is_an_error(value, choices):
    with pytest.raises(ValueError, match=r"the answer is .*wanted a letter"):
        reference_letter(value, choices)


def scored(completions, record, **values):
    reward = choice(decode=TOKENIZER.decode, records=lambda source, at: record, **values)
    rollouts = spell(["q"], completions, group=len(completions))
    return np.asarray(reward.score(reward.init(), rollouts)[0].outcome).tolist()


def test_the_reward():
    completions = ["The answer is (B)", "The answer is (A)", "It is\nB", "Paris"]
    assert scored(completions, {"answer": "B"}) == [1, 0, 0, 0]
    assert scored(completions, {"answer": "B"}, fallbacks=("alone",)) == [1, 0, 1, 0]
    record = {"gold": "Paris", "options": ["Rome", "Paris"]}
    assert scored(completions, record, answer="gold", choices="options") == [1, 0, 0, 0]
    assert scored(completions, {"answer": 2}, first=1) == [1, 0, 0, 0]


def test_bad_records_and_values_are_errors():
    with pytest.raises(RuntimeError, match=r"record 0.*wanted a letter A to J"):
        scored(["A"], {"answer": "none"})
    with pytest.raises(ValueError, match=r"fallbacks=.*known"):
        scored(["A"], {"answer": "A"}, fallbacks=("first",))
