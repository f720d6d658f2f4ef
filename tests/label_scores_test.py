"""Pairs from scores by hand."""

import random

from rlhf_jax.label_scores import Scored, pairs, rows_of
from rlhf_jax.policy_sampler import Completion


def scored(text, score, ended=True):
    return Scored(Completion("p", text, ended, {}), score)


GROUP = [scored("a", 0.0), scored("b", 0.5), scored("c", 0.5), scored("d", 1.0), scored("a", 0.0)]


def found(limit=10, margin=0.0):
    chosen = pairs(GROUP, limit=limit, margin=margin, rng=random.Random(0))
    return sorted((a.sample.completion, b.sample.completion) for a, b in chosen)


def test_ties_and_equal_texts_are_no_pairs():
    assert found() == [("b", "a"), ("c", "a"), ("d", "a"), ("d", "b"), ("d", "c")]


def test_a_margin_leaves_out_what_is_close():
    assert found(margin=0.75) == [("d", "a")]
    assert found(margin=0.5) == found()


def test_the_limit_takes_some_of_them():
    some = found(limit=2)
    assert len(some) == 2 and set(some) < set(found())


def test_rows_have_the_fields_that_training_reads():
    group = [scored("a", 0.0, ended=False), scored("d", 1.0)]
    rows = rows_of(group, limit=4, margin=0.0, rng=random.Random(0))
    assert rows["pairs"] == [
        {
            "prompt": "p",
            "chosen": "d",
            "rejected": "a",
            "chosen_truncated": False,
            "rejected_truncated": True,
            "chosen_score": 1.0,
            "rejected_score": 0.0,
        }
    ]
    assert rows["scores"][0] == {"prompt": "p", "completion": "a", "truncated": True, "score": 0.0}
