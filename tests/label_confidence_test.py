"""Confidence of reward models in pairs: the numbers, and the source that reads them."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from rlhf_jax.data.preferences import pairs
from rlhf_jax.data.sources import JsonlSource
from rlhf_jax.label_confidence import label_confidence
from rlhf_jax.score import score
from rlhf_jax.text.tokenizer import load_tokenizer
from tests.averages_test import trained  # noqa: F401

PAIRS = [dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(8 - i)) for i in range(6)]
PAIRS[2] |= dict(label=0.0)
PAIRS[3] |= dict(label=0.5)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(folder, root, side):
    """What `score` says of one side of all pairs, by another way."""
    rows = [dict(prompt=row["prompt"], completion=row[side]) for row in PAIRS]
    out = root / f"{side}.jsonl"
    score(model=folder, input=write(root / "texts.jsonl", rows), output=str(out),
          end_of_text=True, overwrite=True)  # fmt: skip
    return np.array([line["score"] for line in read(out)])


def test_confidence_is_the_mean_probability_of_the_choice(runs, tmp_path):
    out, models = tmp_path / "out.jsonl", [runs["a"], runs["b"]]
    given = write(tmp_path / "pairs.jsonl", PAIRS)
    assert label_confidence(models=",".join(models), pairs=given, output=str(out), batch=4) == 6
    lines = read(out)
    assert [{k: v for k, v in line.items() if k != "confidence"} for line in lines] == PAIRS
    gaps = [scored(m, tmp_path, "chosen") - scored(m, tmp_path, "rejected") for m in models]
    wanted = np.mean([1 / (1 + np.exp(-gap)) for gap in gaps], axis=0)
    wanted[2], wanted[3] = 1 - wanted[2], 0.5
    found = np.array([line["confidence"] for line in lines])
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.std(found) > 1e-3

    # A source of pairs leaves out the third of which they are least sure.
    text = load_tokenizer("chars:0123456789+=*-# \n")
    form = dict(template="{prompt}", max_length=12, seed=0, shuffle=False)
    source = pairs([JsonlSource(out)], text, **form, drop_unsure=1 / 3 + 1e-9)
    kept = source.batch(0, slice(0, 4), 4).record.tolist()
    assert kept == sorted(np.argsort(found, kind="stable")[2:].tolist())


def test_bad_input_is_named_before_anything_is_written(runs, tmp_path):
    def refused(match, rows=PAIRS, **changes):
        flags = dict(models=runs["a"], output=str(tmp_path / "out.jsonl")) | changes
        with pytest.raises(ValueError, match=match):
            label_confidence(pairs=write(tmp_path / "bad.jsonl", rows), **flags)
        assert not (tmp_path / "out.jsonl").exists()

    refused(r"--models is empty", models=" , ")
    refused(r"--model='nowhere'", models=f"{runs['a']},nowhere")
    refused(r"reward\.head='process'", head="process")
    refused(r"bad\.jsonl, line 2: no field rejected", [PAIRS[0], dict(prompt="1", chosen="2")])
    refused(r"bad\.jsonl, line 1: .*label", [PAIRS[0] | dict(label=2)])
    refused(r"bad\.jsonl, line 1: characters", [PAIRS[0] | dict(chosen="a")])
    folder = pathlib.Path(shutil.copytree(runs["a"], tmp_path / "advantage"))
    models = json.loads((folder / "model.json").read_text())
    models["reward"]["score_heads"] = ["outcome", "expected"]
    (folder / "model.json").write_text(json.dumps(models))
    refused(r"bad\.jsonl, line 2: the prompt has no tokens", [PAIRS[0], PAIRS[1] | dict(prompt="")],
            models=str(folder))  # fmt: skip
