"""Shuffled labels: the same texts and the same labels, but not together."""

import random

from rlhf_jax.label_shuffle import shuffled


def make_rows(count=200):
    pairs = [{"prompt": f"{i}", "chosen": "right", "rejected": "wrong"} for i in range(count)]
    labels = [{"prompt": f"{i}", "completion": f"{i}", "label": float(i % 2)} for i in range(count)]
    steps = [
        {"prompt": f"{i}", "steps": ["a"] * (1 + i % 3), "labels": [float(i % 2)] * (1 + i % 3)}
        for i in range(count)
    ]
    return {"pairs": pairs, "correctness": labels, "steps": steps, "held_out_pairs": pairs}


def test_texts_and_the_number_of_each_label_stay():
    rows = make_rows()
    found = shuffled(rows, random.Random(0))
    assert [x["prompt"] for x in found["correctness"]] == [x["prompt"] for x in rows["correctness"]]
    assert sum(x["label"] for x in found["correctness"]) == 100
    assert [len(x["labels"]) for x in found["steps"]] == [len(x["steps"]) for x in rows["steps"]]
    total = [sum(sum(x["labels"]) for x in many["steps"]) for many in (rows, found)]
    assert total[0] == total[1]


def test_labels_say_nothing_about_their_texts():
    rows = make_rows()
    found = shuffled(rows, random.Random(0))
    pairs = zip(rows["correctness"], found["correctness"], strict=True)
    assert 70 < sum(a["label"] == b["label"] for a, b in pairs) < 130
    assert 70 < sum(x["chosen"] == "right" for x in found["pairs"]) < 130
    assert all({x["chosen"], x["rejected"]} == {"right", "wrong"} for x in found["pairs"])


def test_held_out_labels_stay_true_and_the_input_is_not_changed():
    rows = make_rows()
    assert shuffled(rows, random.Random(0))["held_out_pairs"] == rows["held_out_pairs"]
    assert rows == make_rows()


def test_what_is_said_of_a_side_goes_with_it():
    lines = [
        {"chosen": "a", "chosen_truncated": True, "rejected": "b", "rejected_truncated": False}
        for _ in range(50)
    ]
    found = shuffled({"pairs": lines}, random.Random(0))["pairs"]
    assert {line["chosen"] for line in found} == {"a", "b"}
    for line in found:
        assert line["chosen_truncated"] == (line["chosen"] == "a")
        assert line["rejected_truncated"] == (line["rejected"] == "a")
