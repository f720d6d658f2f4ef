"""IFEval's 25 checks by hand, one way and the other; strict and loose; bad records."""

import time

import numpy as np
import pytest

from rlhf_jax.rewards.ifeval import followed, follows, ifeval, readings
from rlhf_jax.rewards.ifeval_checks import CHECKS, count_sentences
from tests.rewards.examples import TOKENIZER, spell

# instruction, arguments, responses that follow it, responses that do not
CASES = [
    ("keywords:existence", dict(keywords=["cat", "C++"]), ["Cats like c++."], ["Cats like C."]),
    (
        "keywords:frequency",
        dict(keyword="go", frequency=2, relation="at least"),
        ["Go, going"],  # parts of words count
        ["go"],
    ),
    (
        "keywords:frequency",
        dict(keyword="go", frequency=2, relation="less than"),
        ["go"],
        ["go go"],
    ),
    (
        "keywords:forbidden_words",
        dict(forbidden_words=["rock", "pop"]),
        ["rocks, popping"],  # whole words only
        ["I ROCK.", "pop!"],
    ),
    (
        "keywords:letter_frequency",
        dict(letter="o", let_frequency=3, let_relation="at least"),
        ["Oh, oO"],
        ["oo"],
    ),
    (
        "language:response_language",
        dict(language="de"),
        ["Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter."],
        ["This is an ordinary English sentence about the weather.", "5"],
    ),
    (
        "length_constraints:number_sentences",
        dict(num_sentences=3, relation="less than"),
        ["One. Two."],
        ["One. Two! Three?"],
    ),
    (
        "length_constraints:number_paragraphs",
        dict(num_paragraphs=2),
        ["a\n***\nb", "***\na\n***\nb"],
        ["a", "a\n***\n\n***\nb", "a\n\nb"],
    ),
    (
        "length_constraints:number_words",
        dict(num_words=3, relation="at least"),
        ["one, two; 3"],
        ["one two"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        dict(num_paragraphs=2, nth_paragraph=2, first_word="president"),
        ["a\n\nPresident, b", 'a\n\n"president" b'],
        ["a\n\nb president", "president a\n\nb", "a\n\npresident\n\nc", "president"],
    ),
    (
        "detectable_content:number_placeholders",
        dict(num_placeholders=2),
        ["[name] lives in [town]", "[][]"],
        ["[name", "[name]\n[to\nwn]"],
    ),
    ("detectable_content:postscript", dict(postscript_marker="P.S."), ["a\np. s. b"], ["a PS b"]),
    (
        "detectable_content:postscript",
        dict(postscript_marker="P.P.S"),
        ["a\nP.P.S. b", "a p. p. s"],
        ["a P.S. b"],
    ),
    (
        "detectable_format:number_bullet_lists",
        dict(num_bullets=2),
        ["* a\n  - b\nc"],
        ["* a", "* a\n* b\n* c", "**a**\n* b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well. My answer is maybe."],
        ["My answer is yes", "yes"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        dict(num_highlights=2),
        ["*a* and *b c*", "**a** and *b*"],
        ["*a*", "* a\n* b", "* * a"],
    ),
    (
        "detectable_format:multiple_sections",
        dict(section_spliter="Section", num_sections=2),
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na", "SECTION 1 a SECTION 2 b", "Section a Section b"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[]\n```"],
        ["{a: 1}", 'Here: {"a": 1}', "[" * 100_000],
    ),
    ("detectable_format:title", {}, ["<<a>>\nb"], ["<a>", "<< >>", "<<a\n>>", ">><<"]),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******\na\n******\nb"],
        ["a", "a\n******\na", "a ****** b ****** c", "a\n******"],
    ),
    (
        "combination:repeat_prompt",
        dict(prompt_to_repeat="Say it."),
        ["say it. Here it is."],
        ["Here: say it.", "say it"],
    ),
    (
        "startend:end_checker",
        dict(end_phrase="The end."),
        ["a. The END.", 'a. "the end."'],
        ["The end. a"],
    ),
    (
        "change_case:capital_word_frequency",
        dict(capital_frequency=2, capital_relation="at least"),
        ["I AM here", "NATO-USA or EU"],
        ["I am here", "Am Here"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS AN ORDINARY ENGLISH SENTENCE ABOUT THE WEATHER."],
        [
            "This is an ordinary English sentence about the weather.",
            "DAS IST EIN GANZ GEWÖHNLICHER DEUTSCHER SATZ ÜBER DAS WETTER.",
        ],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this is an ordinary english sentence about the weather."],
        [
            "This is an ordinary English sentence about the weather.",
            "das ist ein ganz gewöhnlicher deutscher satz über das wetter.",
        ],
    ),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    ("startend:quotation", {}, ['"a"', ' "a" and "b"\n'], ['"a', '"', "'a'"]),
]
RESPONSES = [
    (name, given, text, met)
    for name, given, good, bad in CASES
    for texts, met in ((good, True), (bad, False))
    for text in texts
]


@pytest.mark.parametrize(("name", "given", "text", "met"), RESPONSES)
def test_by_hand(name, given, text, met):
    assert follows(text, name, given) is met


def test_all_25_instructions_are_there_and_tested():
    assert len(CHECKS) == 25 and {name for name, *_ in CASES} == set(CHECKS)


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, given, *_ in CASES])
def test_a_blank_response_follows_nothing(name, given):
    assert not follows(" \n", name, given)


LONG = ["[" * 200_000, "<<" * 100_000, "." * 200_000, "\n" * 200_000, " p." * 70_000, "*" * 200_000]


@pytest.mark.parametrize("text", LONG, ids=repr)
def test_long_responses_take_no_long_time(text):
    start = time.process_time()
    for name, given, *_ in CASES:
        assert isinstance(follows(f"{text}x", name, given), bool)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two", 2),
        ("One... two. Three", 2),  # a small letter goes on
        ("Dr. J. Doe came at 3.15 p.m. today! Really?! Yes", 3),
        ('"Go." She went.', 2),
        ("e.g. this one.", 1),
        ("I saw Prof. Smith vs. Mr. X.", 1),
        ("Title\n\nOne. Two.", 2),
    ],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


def test_loose_reads_eight_forms():
    assert readings("Sure:\n*a*\nBye") == (
        "Sure:\n*a*\nBye", "*a*\nBye", "Sure:\n*a*", "*a*",
        "Sure:\na\nBye", "a\nBye", "Sure:\na", "a",
    )  # fmt: skip
    quoted = 'Sure:\n**"a"**'
    assert followed(quoted, ["startend:quotation"], [{}], reading="strict") == [False]
    assert followed(quoted, ["startend:quotation"], [{}], reading="loose") == [True]


RECORD = {
    "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
    "kwargs": [{}, {"num_words": None}],  # some copies of the set name every argument
}


def scored(completions, record, **values):
    reward = ifeval(decode=TOKENIZER.decode, records=lambda source, at: record, **values)
    rollouts = spell(["q"], completions, group=len(completions))
    return np.asarray(reward.score(reward.init(), rollouts)[0].outcome).tolist()


def test_the_reward():
    completions = ['"a"', "a", '"a, b"', "a, b", 'Sure,\n"a"']
    assert scored(completions, RECORD) == [1, 0, 0, 0, 0]
    assert scored(completions, RECORD, score="share") == [1, 0.5, 0.5, 0, 0]
    assert scored(completions, RECORD, reading="loose") == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(instruction_id_list=["a:b", "startend:quotation"]), "'a:b' is unknown; known: "),
        (dict(kwargs=[{}]), "has 2 entries and kwargs 1"),
        (dict(kwargs=[{"a": 1}, {}]), r"has arguments \['a'\]; wanted \[\]"),
        (dict(instruction_id_list=[], kwargs=[]), "one at least"),
        (
            dict(
                instruction_id_list=["length_constraints:number_words"],
                kwargs=[{"num_words": 3, "relation": "around"}],
            ),
            "relation='around'; known",
        ),
    ],
)
def test_a_bad_record_is_an_error(change, message):
    with pytest.raises(RuntimeError, match=message):
        scored(["a"], {**RECORD, **change})


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="score='most'; known"):
        scored(["a"], RECORD, score="most")
    with pytest.raises(ValueError, match="reading='lax'; known"):
        scored(["a"], RECORD, reading="lax")
