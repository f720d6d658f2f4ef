"""Pairs and correctness labels by hand, and on the published forms."""

import numpy as np
import pytest

from rlhf_jax.data.preferences import correctness, pairs
from rlhf_jax.data.sources import open_source
from rlhf_jax.text.tokenizer import ByteTokenizer, CharTokenizer

TEXT = CharTokenizer("abcd")  # pad 0, end 1, a..d = 2..5
COMMON = dict(template="{prompt}", max_length=5, seed=0, shuffle=False)


def test_pairs_by_hand():
    plain = [{"prompt": "a", "chosen": "bc", "rejected": "d"}]
    voted = [
        {
            "prompt": "b",
            "chosen": "c",
            "rejected": "a",
            "label": 0.75,
            "margin": 2,
            "votes": [1, None],
        },
        {"prompt": "b", "chosen": "d", "rejected": "a", "votes": [0, 0.5, 1]},
    ]
    batch = pairs([plain, voted], TEXT, annotators=3, **COMMON).batch(0, slice(None), 3)
    assert batch.chosen.tokens.tolist() == [[2, 3, 4, 1, 0], [3, 4, 1, 0, 0], [3, 5, 1, 0, 0]]
    assert batch.rejected.tokens.tolist() == [[2, 5, 1, 0, 0], [3, 2, 1, 0, 0], [3, 2, 1, 0, 0]]
    assert batch.label.tolist() == [1.0, 0.75, 0.5]  # that of votes where none is given
    assert batch.margin.tolist() == [0.0, 2.0, 0.0]
    np.testing.assert_array_equal(
        batch.votes, np.float32([[np.nan] * 3, [1, np.nan, np.nan], [0, 0.5, 1]])
    )
    assert batch.record.tolist() == [0, 1, 2]  # over all sources
    none = pairs([plain], TEXT, **COMMON).batch(0, slice(None), 4)
    assert none.votes.shape == (4, 0) and none.record.tolist() == [0] * 4


def test_votes_become_a_label():
    def label(votes, how):
        record = {"prompt": "a", "chosen": "b", "rejected": "c", "votes": votes}
        batch = pairs([[record]], TEXT, annotators=3, votes=how, **COMMON).batch(0, slice(None), 1)
        # What annotators said stays, whatever the label is.
        said = [np.nan if vote is None else vote for vote in votes]
        np.testing.assert_array_equal(batch.votes[0], np.float32((said + [np.nan] * 3)[:3]))
        return float(batch.label[0])

    assert label([1, 0, 1], "mean") == np.float32(2 / 3) and label([0.25, None], "mean") == 0.25
    assert label([None, None], "mean") == label([], "majority") == 1.0
    for votes, wanted in [([1, 0, 1], 1.0), ([0, None, 0], 0.0), ([1, 0], 0.5), ([0.5], 0.5)]:
        assert label(votes, "majority") == wanted
    # Two who lean one way outvote one who is certain.
    assert label([0.6, 0.6, 0.0], "majority") == 1.0
    with pytest.raises(ValueError, match="votes='most'; known: mean, majority"):
        label([1], "most")


def test_a_pair_is_as_long_as_its_longer_half():
    records = [
        {"prompt": "a", "chosen": "b", "rejected": "bcdab"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    with pytest.raises(ValueError, match="record 0 has 7 tokens but max_length=5"):
        pairs([records], TEXT, **COMMON)
    kept = pairs([records], TEXT, overlong="skip", **COMMON)
    assert (len(kept), kept.num_overlong) == (1, 1)
    cut = pairs([records], TEXT, overlong="truncate", **COMMON).batch(0, slice(0, 1), 2)
    assert cut.rejected.tokens.tolist() == [[2, 3, 4, 5, 2]]


def test_bad_pairs_are_named():
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match="source 0, record 1: 2 votes but annotators=1"):
        pairs([[good, good | {"votes": [1, 0]}]], TEXT, annotators=1, **COMMON)
    for vote in (1.5, "1", -1):
        with pytest.raises(ValueError, match="source 0, record 1: field 'votes' holds"):
            pairs([[good, good | {"votes": [vote]}]], TEXT, annotators=1, **COMMON)
    with pytest.raises(ValueError, match="source 0, record 0: no field rejected"):
        pairs([[{"prompt": "a", "chosen": "b"}]], TEXT, **COMMON)
    with pytest.raises(ValueError, match="field 'label' holds 'A>B'"):
        pairs([[good | {"label": "A>B"}]], TEXT, **COMMON)


def test_pairs_that_teach_nothing_are_left_out(caplog):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    equal, empty = good | {"rejected": "b"}, good | {"rejected": ""}
    nothing = empty | {"rejected_truncated": True}  # not even an end-of-text token
    full = {"prompt": "abcda", "chosen": "b", "rejected": "c"}
    values = COMMON | {"overlong": "truncate"}
    made = pairs([[equal, good, nothing, empty, full, equal]], TEXT, **values)
    assert made.num_flaws == {
        "pairs with two equal sides": 2,
        "no token of a completion within max_length": 2,
        "empty completions": 1,
    }
    assert len(made) == 2  # an empty answer is an answer
    assert made.batch(0, slice(None), 2).record.tolist() == [1, 3]
    assert "two equal sides: 2 of 6 records (left out): source 0, record 0" in caplog.text
    assert "empty completions: 1 of 6 records (kept): source 0, record 3" in caplog.text
    # Cut to the same tokens, two sides are equal.
    assert pairs([[good, {"prompt": "a", "chosen": "bbbbc", "rejected": "bbbbd"}]], TEXT, **values)
    with pytest.raises(ValueError, match=r"no records are left: 2 .*two equal sides: 2"):
        pairs([[equal, equal]], TEXT, **COMMON)


@pytest.mark.parametrize("margin", [-1, float("nan"), float("inf"), None, "1", True])
def test_margins_are_finite_and_not_negative(margin):
    record = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin}
    with pytest.raises(ValueError, match=r"record 0: field 'margin' holds .*, not a finite number"):
        pairs([[record]], TEXT, **COMMON)


def test_one_class_is_reported(caplog):
    record = {"prompt": "a", "completion": "b", "label": 1}
    correctness([[record, record | {"label": 0}]], TEXT, **COMMON)
    assert "one class" not in caplog.text
    correctness([[record, record]], TEXT, **COMMON)
    assert "all of 2 completions are right: one class only" in caplog.text


def test_correctness_by_hand():
    records = [
        {"prompt": "a", "solution": "b", "is_correct": False},
        {"prompt": "a", "completion": "c", "label": 0.25, "is_correct": True},
    ]
    batch = correctness([records], TEXT, **COMMON).batch(0, slice(None), 2)
    assert batch.texts.tokens.tolist() == [[2, 3, 1, 0, 0], [2, 4, 1, 0, 0]]
    assert batch.label.tolist() == [0.0, 0.25]
    with pytest.raises(ValueError, match="record 0: no field label or is_correct"):
        correctness([[{"prompt": "a", "solution": "b"}]], TEXT, **COMMON)


@pytest.mark.data
def test_published_dialogues_and_solutions(data_dir):
    options = {"format": "dialogue"}
    hh = open_source(f"jsonl:{data_dir}/hh_rlhf/{{split}}.jsonl.gz", "test", options=options)
    values = dict(template="{prompt}", max_length=256, seed=0, overlong="skip")
    source = pairs([hh], ByteTokenizer(), **values)
    assert len(source) + source.num_overlong == len(hh) == 463
    batch = source.batch(0, slice(None), 16)
    for row in range(16):
        record = hh[int(batch.record[row])]
        text = ByteTokenizer().decode(batch.rejected.tokens[row][batch.rejected.mask[row]])
        reply = ByteTokenizer().decode(batch.rejected.tokens[row][batch.rejected.loss_mask[row]])
        assert (text, reply) == (record["prompt"] + record["rejected"], record["rejected"])
    solutions = open_source(f"jsonl:{data_dir}/gsm8k/model_solutions.jsonl.gz")
    values = dict(template="{question}\n", max_length=1024, seed=0, overlong="truncate")
    judged = correctness([solutions], ByteTokenizer(), **values).batch(0, slice(None), 2640)
    assert judged.label.mean() == pytest.approx(np.mean([r["is_correct"] for r in solutions]))


def test_a_truncated_half_has_no_end_of_text():
    """As a rollout that ran into its limit: the score is read at the last token that was said."""
    record = {"prompt": "a", "chosen": "b", "rejected": "c", "rejected_truncated": True}
    batch = pairs([[record]], TEXT, **COMMON).batch(0, slice(None), 1)
    assert batch.chosen.tokens.tolist() == [[2, 3, 1, 0, 0]]
    assert batch.rejected.tokens.tolist() == [[2, 4, 0, 0, 0]]
    assert batch.rejected.mask.tolist() == [[True, True, False, False, False]]
    with pytest.raises(ValueError, match="'chosen_truncated' holds 'no', not true or false"):
        pairs([[record | {"chosen_truncated": "no"}]], TEXT, **COMMON)
