"""Supervised rows by hand: where the loss is, what is cut, what is refused."""

import numpy as np
import pytest

from rlhf_jax.data.examples import Row, encode_row, pad_rows, pick, share
from rlhf_jax.data.texts import texts
from rlhf_jax.text.tokenizer import ByteTokenizer, CharTokenizer

TEXT = CharTokenizer("abcd")  # pad 0, end 1, a..d = 2..5
RECORDS = [{"prompt": "ab", "completion": "cd"}, {"prompt": "a", "completion": "b"}]


def source(records=RECORDS, **changes):
    values = dict(template="{prompt}", max_length=6, seed=0, shuffle=False) | changes
    return texts([records], TEXT, **values)


def test_rows_by_hand():
    batch = source().batch(0, slice(None), 2)
    assert batch.tokens.tolist() == [[2, 3, 4, 5, 1, 0], [2, 3, 1, 0, 0, 0]]
    assert batch.mask.astype(int).tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]
    assert batch.segment.tolist() == batch.mask.astype(int).tolist()


def test_plain_text_trains_from_its_second_token():
    batch = source([{"text": "abc"}], template="", completion=("text",)).batch(0, slice(None), 1)
    assert batch.tokens.tolist() == [[2, 3, 4, 1, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 0, 0]]


def test_cut_rows_have_no_end_of_text():
    records = [{"prompt": "abcd", "completion": "dcba"}, *RECORDS]
    cut = source(records, overlong="truncate")
    assert cut.num_overlong == 1 and len(cut) == 3
    batch = cut.batch(0, slice(0, 1), 3)
    assert batch.tokens.tolist() == [[2, 3, 4, 5, 5, 4]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 0, 0, 0, 1, 1]]
    skipped = source(records, overlong="skip")
    assert skipped.num_overlong == 1 and len(skipped) == 2
    assert skipped.batch(0, slice(None), 2).tokens.tolist() == (
        source().batch(0, slice(None), 2).tokens.tolist()
    )
    with pytest.raises(ValueError, match="source 0, record 0 has 9 tokens but max_length=6"):
        source(records)


def test_prompt_that_fills_the_row_trains_nothing():
    batch = source([{"prompt": "abcdab", "completion": "c"}], overlong="truncate")
    assert not batch.batch(0, slice(None), 1).loss_mask.any()


def test_prompt_and_completion_are_encoded_apart():
    """As the sampler does it: joined text may be cut into other tokens at the seam."""
    row = encode_row(ByteTokenizer(), "a\n", "b")
    assert row == Row([97, 10, 98, 256], 2)


def test_batches_are_functions_of_the_position():
    records = [{"prompt": "a" * (1 + i % 2), "completion": "bcd"[i % 3]} for i in range(5)]
    first, second = (source(records, shuffle=True, seed=7) for _ in range(2))
    whole = first.batch(0, slice(None), 15)
    part = second.batch(10, slice(1, 4), 5)
    np.testing.assert_array_equal(part.tokens, whole.tokens[11:14])
    np.testing.assert_array_equal(part.loss_mask, whole.loss_mask[11:14])


def test_an_empty_slice_has_no_rows():
    assert pad_rows([], 4, 0).tokens.shape == (0, 4)
    assert source().batch(0, slice(2, 2), 2).mask.shape == (0, 6)


def test_pick_and_share():
    record = {"solution": "s", "answer": "a", "n": 3, "is_correct": True, "label": 0.25}
    assert pick(record, ("completion", "solution", "answer")) == "s"
    assert share(record, ("label", "is_correct")) == 0.25
    assert share(record, ("is_correct",)) == 1.0
    with pytest.raises(ValueError, match="no field text or body; the record has solution"):
        pick(record, ("text", "body"))
    with pytest.raises(ValueError, match="field 'n' holds int where text is wanted"):
        pick(record, ("n",))
    for bad in (2, -0.5, "yes", None, float("nan")):
        with pytest.raises(ValueError, match="not a label from 0 to 1"):
            share({"label": bad}, ("label",))
