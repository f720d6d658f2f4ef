"""Verdicts behind answers, by hand; and what nothing can be learnt from."""

import pytest

from rlhf_jax.data.verdicts import verdicts
from rlhf_jax.text.tokenizer import CharTokenizer

TEXT = CharTokenizer("abcd?yn")  # pad 0, end 1, a..d = 2..5, ? = 6, y = 7, n = 8
ASKED = dict(question="?", yes="y", no="n")
COMMON = dict(template="{prompt}", max_length=6, seed=0, shuffle=False, **ASKED)


def record(label, completion="bc"):
    return {"prompt": "a", "completion": completion, "label": label}


def test_the_verdict_alone_trains_and_no_end_of_text_stands_before_it():
    source = verdicts([[record(1), record(0.25, "d"), record(True, "")]], TEXT, **COMMON)
    batch = source.batch(0, slice(None), 3)
    assert batch.tokens.tolist() == [[2, 3, 4, 6, 7, 0], [2, 5, 6, 8, 0, 0], [2, 6, 7, 0, 0, 0]]
    assert batch.loss_mask.sum(1).tolist() == [1, 1, 1]
    assert batch.tokens[batch.loss_mask].tolist() == [7, 8, 7]
    assert batch.mask.sum(1).tolist() == [5, 4, 3]


def test_what_says_nothing_is_left_out_and_counted(caplog):
    records = [record(1), record(0.5), record(0), record(1, "bcdbcd")]
    source = verdicts([records], TEXT, overlong="truncate", **COMMON)
    assert len(source) == 2
    assert source.num_flaws == {
        "labels of 0.5": 1, "no room for the verdict within max_length": 1
    }  # fmt: skip
    verdicts([[record(0), record(0.1)]], TEXT, **COMMON)
    assert "all of 2 completions are not right: one class only" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(label="good"), r"label"),
        (dict(completion=7), r"'completion' holds int where text is wanted"),
    ],
)
def test_bad_records_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        verdicts([[record(1), record(1) | change]], TEXT, **COMMON)


def test_answers_of_several_tokens_are_refused():
    with pytest.raises(ValueError, match=r"no='nn' is 2 tokens"):
        verdicts([[record(1)]], TEXT, **(COMMON | {"no": "nn"}))
