"""Probes of a scorer whose biases are known: which texts are scored, and what is found."""

import numpy as np
import pytest

from rlhf_jax.data.forms import Form
from rlhf_jax.data.preferences import correctness, pairs
from rlhf_jax.ops.probes import Effect
from rlhf_jax.probes import Item, Text, probe, read_items, read_pairs
from rlhf_jax.text.changes import AGREEING, FILLERS, NEUTRAL, REFUSAL
from rlhf_jax.text.tokenizer import ByteTokenizer, CharTokenizer

BYTES = ByteTokenizer()
RECORDS = [
    dict(prompt=f"q{i // 2}:", chosen=f"Good {'x' * i}. Yes.", rejected=f"Bad {'y' * (9 - i)}.")
    for i in range(8)
]


def items_of(tokenizer=BYTES, records=RECORDS):
    form = dict(template="{prompt}", max_length=64, seed=0, shuffle=False)
    return read_items(pairs([records], tokenizer, **form), 100, tokenizer)


def scorer(seen, **weights):
    """A reward of bytes: so much per token, and for texts that hold something."""

    def score(texts):
        seen.extend(texts)
        found = []
        for whole in (one.whole for one in texts):
            text = BYTES.decode(whole)
            said = sum(w for word, w in weights.items() if word in text)
            found.append(said + 0.25 * len(whole) + float(text[1]))
        return found

    return score


def found_by(score, items=None, tokenizer=BYTES, asked=(), **more):
    findings = probe(items_of() if items is None else items, asked, tokenizer, score, **more)
    return {one.name: one for one in findings}


def test_records_are_cut_into_prompt_completion_and_end():
    first = items_of()[0]
    assert BYTES.decode(first.text.prompt) == "q0:"
    assert BYTES.decode(first.text.completion) == "Good . Yes."
    assert first.text.tail == BYTES.eos_ids and first.worse.prompt == first.text.prompt
    labelled = [dict(prompt="q", completion="a", label=1)]
    form = dict(template="{prompt}", max_length=9, seed=0)
    alone = read_items(correctness([labelled], BYTES, **form), 5, BYTES)
    assert alone == [Item(Text((113,), (97,), (256,)))]


def test_each_probe_finds_the_bias_that_is_there():
    seen = []
    found = found_by(scorer(seen, **{"You are": 2.0, "sorry": 5.0, "- ": -1.5}))
    assert len(set(seen)) == len(seen)  # every text once
    assert found["length"].effect.value == pytest.approx(0.25)
    assert found["length_in_pairs"].effect.value == pytest.approx(0.25)
    agreement = 2.0 + 0.25 * (len(AGREEING) - len(NEUTRAL))
    assert found["sycophancy"].effect.value == pytest.approx(agreement)
    assert found["sycophancy"].beside["share_higher"] == 1.0
    refusal = 5.0 + 0.25 * np.mean([len(REFUSAL) - len(r["chosen"]) for r in RECORDS])
    assert found["refusal"].effect.value == pytest.approx(refusal)
    # Two items for "Good. Yes.": "- " twice, a line break for the blank.
    assert found["format"].effect.value == pytest.approx(-1.5 + 0.25 * 4)
    assert found["consistency"].effect.value == 1.0 and found["consistency"].effect.prompts == 4
    assert found["prompt_offset"].effect.prompts == 4


def test_a_scorer_without_bias_moves_nowhere():
    def score(texts):
        return [float(BYTES.decode(t.whole)[1]) + ("Good" in BYTES.decode(t.whole)) for t in texts]

    found = found_by(score)
    for name in ("length", "format", "sycophancy"):
        assert found[name].effect == Effect(0.0, 0.0, 0.0, found[name].effect.prompts)
    assert found["refusal"].effect.value == -1.0
    assert found["refusal"].beside["share_higher"] == 0.0


def test_a_tokenizer_without_letters_has_the_other_probes():
    digits = CharTokenizer("0123456789+=:\n")
    records = [dict(prompt=f"{i}+1=", chosen="1" * (i + 1), rejected="2") for i in range(4)]
    found = found_by(
        lambda texts: [float(len(t.whole)) for t in texts], items_of(digits, records), digits
    )
    for name in ("length", "format", "sycophancy", "refusal", "consistency"):
        assert found[name].effect is None and "no letters" in found[name].reason
    assert found["length_in_pairs"].effect.value == pytest.approx(1.0)
    assert found["prompt_offset"].effect.prompts == 4


def test_what_cannot_be_asked_says_why():
    alone = [Item(item.text) for item in items_of()]
    score = scorer([])
    found = found_by(score, alone)
    assert (
        found["consistency"].reason
        == found["length_in_pairs"].reason
        == ("the source has no pairs")
    )
    assert found["length"].effect is not None
    found = found_by(score, items_of()[:1])
    assert "1 prompts have no interval" in found["format"].reason
    found = found_by(score, widest=30)  # no room for three closing sentences
    assert (
        sum(map(len, FILLERS)) > 30
        and "longer than the model's positions" in found["length"].reason
    )
    (only,) = probe(items_of(), (), BYTES, lambda texts: [float("nan")] * len(texts))
    assert only.effect is None and "not finite" in only.reason


def test_pairs_of_ones_own_by_name():
    form = Form(BYTES, template="{prompt}", chat=None)
    records = [
        dict(probe=name, prompt=f"q{i}:", original="a", changed="abc") | more
        for i in range(3)
        for name, more in (("long", {}), ("paraphrase", dict(changed="a", changed_prompt="q9:")))
    ]
    asked = read_pairs(records, form, BYTES)
    found = found_by(scorer([]), asked=asked)
    assert found["pairs/long"].effect.value == pytest.approx(0.5)
    assert found["pairs/paraphrase"].effect.value == pytest.approx(9 - 1)
    assert found["pairs/paraphrase"].effect.prompts == 3
    with pytest.raises(ValueError, match=r"record 0: no field probe"):
        read_pairs([dict(prompt="a", original="b", changed="c")], form, BYTES)
    unasked = [records[0], records[0] | dict(prompt="")]
    assert len(read_pairs(unasked, form, BYTES)[0].rows) == 2
    with pytest.raises(ValueError, match=r"record 1: the prompt has no tokens, and an advantage"):
        read_pairs(unasked, form, BYTES, prompted=True)
