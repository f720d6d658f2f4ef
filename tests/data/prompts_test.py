"""Prompts: restorable positions, padding, rows of processes, overlong policies."""

import collections
import logging

import numpy as np
import pytest

from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.text.tokenizer import ByteTokenizer

TEXT = ByteTokenizer()
RECORDS = [{"question": f"q{i}", "answer": i} for i in range(7)]


def prompts(sources=(RECORDS,), **changes):
    values = dict(template="{question}?", max_prompt=6, seed=3) | changes
    return PromptSource(list(sources), TEXT, **values)


def read(batch):
    """(text, source, record, draw) of each row."""
    return [
        (TEXT.decode(batch.tokens[i][batch.mask[i]]), *map(int, where))
        for i, where in enumerate(zip(batch.source, batch.record, batch.draw, strict=True))
    ]


def test_left_padding_by_hand():
    source = prompts([[{"question": "ab"}]], shuffle=False)
    batch = source.batch(0, slice(None), 1)
    assert batch.tokens.tolist() == [[257, 257, 257, 97, 98, 63]]
    assert batch.mask.tolist() == [[False] * 3 + [True] * 3]
    assert batch.tokens.dtype == batch.draw.dtype == np.int32


def test_without_shuffling_records_come_in_order():
    source = prompts([RECORDS[:2], RECORDS[2:5]], shuffle=False)
    wanted = [("q0?", 0, 0), ("q1?", 0, 1), ("q2?", 1, 0), ("q3?", 1, 1), ("q4?", 1, 2)]
    wanted = [(*row, epoch) for epoch in range(2) for row in wanted]
    assert read(source.batch(0, slice(None), 10)) == wanted
    assert source.record(1, 2) == RECORDS[4]


def test_each_epoch_draws_each_record_once_in_another_order():
    source = prompts()
    epochs = [read(source.batch(7 * e, slice(None), 7)) for e in range(4)]
    for epoch, rows in enumerate(epochs):
        assert {row[0] for row in rows} == {f"q{i}?" for i in range(7)}
        assert {row[3] for row in rows} == {epoch}
    assert len({tuple(row[0] for row in rows) for rows in epochs}) == 4


def test_position_is_all_there_is():
    """Any batch from a fresh source equals that of one which read everything before it."""
    source = prompts()
    whole = read(source.batch(0, slice(None), 40))
    assert [row for p in range(0, 40, 4) for row in read(source.batch(p, slice(None), 4))] == whole
    assert read(prompts().batch(20, slice(None), 5)) == whole[20:25]
    assert read(prompts(seed=4).batch(0, slice(None), 40)) != whole
    draws = collections.Counter((row[1], row[2]) for row in whole)
    assert all(whole[i][3] == sum(w[2] == whole[i][2] for w in whole[:i]) for i in range(40))
    assert set(draws.values()) == {5, 6}


def test_processes_read_their_own_rows():
    source = prompts()
    whole = read(source.batch(9, slice(None), 6))
    assert [
        row
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
        for row in read(source.batch(9, rows, 6))
    ] == whole
    with_jax_slice = source.batch(9, slice(2, 4, None), n=6)
    assert with_jax_slice.tokens.shape == (2, 6)


@pytest.mark.parametrize(
    ("overlong", "texts"), [("skip", ["ab?", "cd?"]), ("truncate", ["ab?", "defgh?", "cd?"])]
)
def test_overlong_prompts_are_counted(overlong, texts, caplog):
    records = [{"question": q} for q in ("ab", "abcdefgh", "cd")]
    with caplog.at_level(logging.WARNING):
        source = prompts([records], overlong=overlong, shuffle=False)
    assert source.num_overlong == 1 and len(source) == len(texts)
    assert "1 of 3 records over max_prompt=6" in caplog.text
    rows = read(source.batch(0, slice(None), len(texts)))
    assert [row[0] for row in rows] == texts
    assert rows[-1][2] == 2  # indices are those of the source, whatever was skipped
    assert {row[3] for row in read(source.batch(len(texts), slice(None), len(texts)))} == {1}


def test_overlong_is_an_error_that_names_the_record():
    records = [{"question": "ab"}, {"question": "abcdefgh"}]
    with pytest.raises(ValueError, match=r"source 1, record 1 has 9 tokens but max_prompt=6"):
        prompts([RECORDS, records])
    with pytest.raises(ValueError, match="overlong='drop' is not one of error, skip, truncate"):
        prompts(overlong="drop")


def test_bad_records_are_named():
    with pytest.raises(ValueError, match=r"source 0, record 0: template '\{q\}' names field 'q'"):
        prompts(template="{q}")
    with pytest.raises(ValueError, match="source 0, record 1: the prompt is empty"):
        prompts([[{"question": "a"}, {"question": ""}]], template="{question}")
    with pytest.raises(ValueError, match="no records are left: 1 in 1 sources, 1 of them over"):
        prompts([[{"question": "abcdefgh"}]], overlong="skip")
    with pytest.raises(ValueError, match="no records are left: 0 in 1 sources"):
        prompts([[]])
