"""What the report of a reward model counts: given labels, every record once, prompts as units."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.data.preferences import correctness
from rlhf_jax.models.config import named_size
from rlhf_jax.ops.reward_metrics import clustered_interval
from rlhf_jax.reward_report import KINDS, check_prompts
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.types import Labelled, Pairs, Steps, Texts

HEADS = {"outcome_head": "outcome", "process_head": "process"}


def texts(rows):
    """Texts of one prompt token, given, and one token that the scores below are read from."""
    tokens = np.array(rows, np.int32)
    mask = tokens > 0
    return Texts(
        tokens=tokens,
        mask=mask,
        loss_mask=mask & (np.arange(tokens.shape[1]) > 0),
        segment=mask.astype(np.int32),
    )


def score(given):
    """Each token is its own score."""
    said = np.float32(given.tokens)
    return {head: said for head in HEADS.values()}


def pairs(chosen, rejected, label):
    count = len(chosen)
    return Pairs(
        chosen=texts(chosen),
        rejected=texts(rejected),
        label=np.float32(label),
        margin=np.zeros(count, np.float32),
        votes=np.zeros((count, 0), np.float32),
        record=np.arange(count, dtype=np.int32),
    )


def test_pairs_are_judged_by_their_labels():
    chosen, rejected = [[1, 9], [1, 3], [2, 5], [2, 9]], [[1, 2], [1, 8], [2, 5], [2, 1]]
    for label, wanted in [
        ([1, 1, 1, 1], [1, 0, 0.5, 1]),
        ([0, 0, 0, 0], [0, 1, 0.5, 0]),
        ([1, 0, 0.5, 0.2], [1, 1, 0]),  # an undecided pair is no pair
    ]:
        found = KINDS["pairs"](iter([(pairs(chosen, rejected, label), 4)]), score, HEADS)
        assert found["outcome_model/pair_accuracy"] == pytest.approx(np.mean(wanted))
        prompts = [1, 1, 2, 2] if len(wanted) == 4 else [1, 1, 2]
        low, high = clustered_interval(np.float64(wanted), np.array(prompts))
        assert found["outcome_model/pair_accuracy_low"] == pytest.approx(low)
        assert found["outcome_model/pair_accuracy_high"] == pytest.approx(high)


def test_the_longer_wins_follows_the_labels_too():
    batch = pairs([[1, 9, 4], [1, 3, 0]], [[1, 2, 0], [1, 8, 3]], [1, 0])
    found = KINDS["pairs"](iter([(batch, 2)]), score, HEADS)
    assert found["outcome_model/longer_wins"] == 1.0
    assert found["outcome_model/length_baseline"] == 1.0


def test_rows_behind_the_last_record_do_not_count():
    first = pairs([[1, 9], [1, 9]], [[1, 2], [1, 2]], [1, 1])
    last = pairs([[1, 9], [1, 2]], [[1, 2], [1, 9]], [1, 1])
    both = KINDS["pairs"](iter([(first, 2), (last, 2)]), score, HEADS)
    kept = KINDS["pairs"](iter([(first, 2), (last, 1)]), score, HEADS)
    assert both["outcome_model/pair_accuracy"] == 0.75
    assert kept["outcome_model/pair_accuracy"] == 1.0


def test_texts_of_one_prompt_are_drawn_together():
    """Each text many times: as one prompt's the interval stays, as many prompts' it narrows."""
    found = {}
    for copies, count in (("one", 1), ("same prompt", 9), ("other prompts", 9)):
        rows = [[1, 9], [2, 4], [3, 7], [4, 3], [5, 5], [6, 6]] * count
        if copies == "other prompts":
            rows = [[prompt + 10 * i, token] for i, (prompt, token) in enumerate(rows)]
        batch = Labelled(texts=texts(rows), label=np.float32([1, 0, 1, 0, 1, 0] * count))
        numbers = KINDS["correctness"](iter([(batch, len(rows))]), score, HEADS)
        assert numbers["outcome_model/correctness_auc"] == pytest.approx(8 / 9)
        found[copies] = numbers["outcome_model/correctness_auc_low"]
    assert found["one"] == found["same prompt"] < found["other prompts"]


def test_one_class_is_said(caplog):
    rows = Labelled(texts=texts([[1, 9], [2, 8]]), label=np.float32([1, 1]))
    found = KINDS["correctness"](iter([(rows, 2)]), score, HEADS)
    assert np.isnan(found["outcome_model/correctness_auc"])
    assert "all labels are of one class" in caplog.text


def test_steps_by_hand():
    ends = np.array([[False, True, True], [False, True, False]])
    labels = np.float32([[0, 1, 0], [0, 1, 0]])
    rows = Steps(texts=texts([[1, 9, 3], [2, 8, 0]]), step_ends=ends, labels=labels)
    found = KINDS["steps"](iter([(rows, 2)]), score, HEADS)
    assert found["process_model/step_auc"] == 1.0
    assert found["process_model/majority_rate"] == pytest.approx(2 / 3)
    assert found["process_model/balanced_accuracy"] == 0.5  # all scores are above 0


def test_an_advantage_model_is_judged_by_what_is_above_what_it_expects():
    """Between prompts r − e orders texts as r does not; what is expected is the prompt's token."""
    rows = Labelled(texts=texts([[5, 4], [1, 3]]), label=np.float32([0, 1]))

    def advantage(given):
        said = score(given)
        return said | {"expected": said["outcome"]}

    for said, wanted in ((score, 0.0), (advantage, 1.0)):
        found = KINDS["correctness"](iter([(rows, 2)]), said, HEADS)
        assert found["outcome_model/correctness_auc"] == wanted


def test_an_advantage_model_reads_no_text_without_a_prompt():
    records = [dict(prompt=prompt, completion="x", label=1) for prompt in ("a", "")]
    source = correctness(
        [records], load_tokenizer("byte"), template="{prompt}", max_length=9, seed=0
    )
    judge = named_size("tiny", lm_head=False, score_heads=("outcome", "expected"))
    with pytest.raises(ValueError, match=r"held: source 0, record 1: the prompt has no tokens"):
        check_prompts("held", "correctness", source, judge, HEADS)
    # Steps are read by the process head alone, and heads of one's own expect nothing.
    check_prompts("held", "steps", source, judge, HEADS)
    check_prompts("held", "correctness", source, judge, dict.fromkeys(HEADS, "tone"))
    plain = dataclasses.replace(judge, score_heads=("outcome",))
    check_prompts("held", "correctness", source, plain, HEADS)
