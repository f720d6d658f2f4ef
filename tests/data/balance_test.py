"""Changes to preference data by hand."""

import numpy as np
import pytest

from rlhf_jax.data.balance import Augmented, balanced_indices, confident_indices, mean_confidence
from rlhf_jax.data.preferences import pairs
from rlhf_jax.text.tokenizer import CharTokenizer

TEXT = CharTokenizer("abcd")
COMMON = dict(template="{prompt}", max_length=40, seed=0, shuffle=False)


def test_bins_keep_as_many_of_either_sign():
    #                      +1  +10 -3  -10 +11 -20 -15 0  +25
    chosen = np.array([11, 20, 10, 10, 21, 10, 10, 10, 35])
    rejected = np.array([10, 10, 13, 20, 10, 30, 25, 10, 10])
    kept = balanced_indices(chosen, rejected, seed=0)
    # Bin 1-10 has two and two, bin 11-20 one longer and two shorter, bin 21-30 one longer alone.
    assert {0, 1, 2, 3, 4, 7} <= set(kept.tolist()) and 8 not in kept
    assert len({5, 6} & set(kept.tolist())) == 1
    assert list(kept) == sorted(kept)
    other = {tuple(balanced_indices(chosen, rejected, seed=seed)) for seed in range(20)}
    assert len(other) == 2


def test_the_longer_wins_half_of_what_is_kept():
    rng = np.random.default_rng(1)
    rejected = rng.integers(10, 200, 3000)
    chosen = rejected + rng.integers(-40, 80, 3000)
    kept = balanced_indices(chosen, rejected, seed=0)
    gap = (chosen - rejected)[kept]
    assert (gap > 0).sum() == (gap < 0).sum() > 500
    assert (gap == 0).sum() == (chosen == rejected).sum()
    for low in range(1, 40, 10):
        inside = gap[(np.abs(gap) >= low) & (np.abs(gap) < low + 10)]
        assert (inside > 0).sum() == (inside < 0).sum()


def test_the_least_confident_go():
    confidence = np.array([0.9, 0.2, 0.5, 0.2, 0.7])
    assert confident_indices(confidence, drop=0.4).tolist() == [0, 2, 4]
    assert confident_indices(confidence, drop=0.2).tolist() == [0, 2, 3, 4]
    assert confident_indices(confidence, drop=0.0).tolist() == [0, 1, 2, 3, 4]
    gaps = np.array([[0.0, np.log(3), 900.0], [np.log(3), np.log(3), -900.0]])
    np.testing.assert_allclose(mean_confidence(gaps), [0.625, 0.75, 0.5])


def records():
    return [
        dict(prompt="a", chosen="b", rejected="c", label=0.7, votes=[1], chosen_truncated=True),
        dict(prompt="a", chosen="c", rejected="b"),
        dict(prompt="d", chosen="d", rejected="a"),
        dict(prompt="bb", chosen="cc", rejected="a"),
    ]


def test_extra_pairs_set_an_answer_against_that_to_another_prompt():
    given = records()
    source = Augmented(given, lambda record: record["prompt"], share=1.0, seed=0)
    assert len(source) == 8 and [source[i] for i in range(4)] == given
    extra = [source[4 + i] for i in range(4)]
    assert sorted(x["prompt"] for x in extra) == ["a", "a", "bb", "d"]
    for made in extra:
        assert not {"label", "votes", "margin"} & set(made)
        own = [r for r in given if r["prompt"] == made["prompt"] and r["chosen"] == made["chosen"]]
        other = [r for r in given if r["prompt"] != made["prompt"]]
        assert len(own) == 1 and made["rejected"] in [r["chosen"] for r in other]
        answers = [r for r in other if r["chosen"] == made["rejected"]]
        assert made["rejected_truncated"] in [r.get("chosen_truncated", False) for r in answers]
    same = Augmented(given, lambda record: record["prompt"], share=1.0, seed=0)
    assert [same[i] for i in range(8)] == [source[i] for i in range(8)]
    with pytest.raises(ValueError, match="record 0: no other prompt in 100 draws from 2 records"):
        Augmented(given[:2], lambda record: record["prompt"], share=0.5, seed=0)


def test_of_whole_conversations_the_answer_is_taken():
    """UltraFeedback's binarised form: both sides repeat the prompt."""

    def said(prompt, reply):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]

    given = [
        dict(prompt=[said(p, "")[0]], chosen=said(p, "yes " + p), rejected=said(p, "no"))
        for p in ("one", "two")
    ]
    source = Augmented(given, lambda record: record["prompt"], share=0.5, seed=0)
    made = source[2]
    (asked,) = (message["content"] for message in made["prompt"])
    other = {"one": "two", "two": "one"}[asked]
    assert made["chosen"] == said(asked, "yes " + asked)
    assert made["rejected"] == [{"role": "assistant", "content": "yes " + other}]


def test_a_source_of_pairs_takes_them_from_its_config():
    given = [dict(prompt="a", chosen="bbb", rejected="c")] * 3 + [
        dict(prompt="b", chosen="c", rejected="aaa"),
        dict(prompt="b", chosen="d", rejected="a"),
    ]
    plain = pairs([given], TEXT, **COMMON)
    balanced = pairs([given], TEXT, balance_lengths=True, **COMMON)
    assert len(plain) == 5 and len(balanced) == 3  # one longer, one shorter, one as long
    batch = balanced.batch(0, slice(None), 3)
    gap = batch.chosen.mask.sum(1).astype(int) - batch.rejected.mask.sum(1)
    assert sorted(gap.tolist()) == [-2, 0, 2]
    assert set(batch.record[1:].tolist()) == {3, 4}  # still the records' own numbers

    more = pairs([given], TEXT, augment=0.4, **COMMON)
    assert len(more) == 7 and more.total == 7
    extra = more.batch(5, slice(None), 2)
    assert extra.label.tolist() == [1.0, 1.0]
    for row in range(2):
        ask, other = extra.chosen.tokens[row, 0], extra.rejected.tokens[row, 1:3].tolist()
        assert other in ([[4, 1], [5, 1]] if ask == 2 else [[3, 3]])

    sure = [record | dict(confidence=0.1 * i) for i, record in enumerate(given)]
    kept = pairs([sure], TEXT, drop_unsure=0.4, **COMMON)
    assert kept.batch(0, slice(None), 3).record.tolist() == [2, 3, 4]


def test_bad_changes_are_named():
    with pytest.raises(ValueError, match=r"augment=1\.5; wanted a share from 0 to below 1"):
        pairs([records()], TEXT, augment=1.5, **COMMON)
    with pytest.raises(ValueError, match="source 0, record 0: no field confidence"):
        pairs([records()[1:]], TEXT, drop_unsure=0.5, **COMMON)
    lopsided = [dict(prompt="a", chosen="bbb", rejected="c")] * 2
    with pytest.raises(ValueError, match="none was selected"):
        pairs([lopsided], TEXT, balance_lengths=True, **COMMON)
    with pytest.raises(ValueError, match=r"record \d: .*'prompt'"):
        pairs([[dict(chosen="a", rejected="b")] * 3], TEXT, augment=0.4, **COMMON)
