"""Step labels lie on the tokens where steps end, whatever form the record has."""

import gzip

import numpy as np
import pytest

from rlhf_jax.data.sources import open_source
from rlhf_jax.data.steps import step_labels
from rlhf_jax.text.steps import mark_step_ends, split_steps, token_tables
from rlhf_jax.text.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer

TEXT = CharTokenizer("ab\n")  # pad 0, end 1, a b break = 2 3 4
COMMON = dict(template="{prompt}", max_length=12, seed=0, shuffle=False)


def read(source, rows=1):
    """(column, label) of every step end, by row."""
    batch = source.batch(0, slice(None), rows)
    assert not batch.labels[~batch.step_ends].any()
    return [
        [(int(c), float(batch.labels[i, c])) for c in np.flatnonzero(batch.step_ends[i])]
        for i in range(rows)
    ]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"steps": ["a", "bb"], "labels": [True, False]}, [(2, 1.0), (5, 0.0)]),
        ({"completion": "a\nbb", "labels": [1, 0]}, [(2, 1.0), (5, 0.0)]),
        ({"completion": "a\n\nbb\n", "labels": [0.25, 1]}, [(2, 0.25), (7, 1.0)]),
        ({"steps": ["a", "b", "a"], "labels": [1, None, 0]}, [(2, 1.0), (6, 0.0)]),
        ({"steps": ["a\nb", "a"], "labels": [1, 0]}, [(4, 1.0), (6, 0.0)]),  # at its last line
        ({"steps": ["a", "\n", "b"], "labels": [1, 1, 0]}, [(2, 1.0), (4, 0.0)]),  # no blank step
        ({"steps": ["ab"], "labels": [1]}, [(3, 1.0)]),
        ({"steps": ["a"], "labels": [1], "solution": "b\nb"}, [(2, 1.0)]),  # a reference, perhaps
        ({"steps": ["a", "b"], "labels": [1, 0], "completion": "a\n\nb "}, [(2, 1.0), (4, 0.0)]),
    ],
)
def test_labels_by_hand(record, wanted):
    assert read(step_labels([[{"prompt": "a"} | record]], TEXT, **COMMON)) == [wanted]


def test_prompt_lines_are_not_steps():
    records = [{"prompt": "a\nb\n", "steps": ["a", "b"], "labels": [0, 1]}]
    assert read(step_labels([records], TEXT, **COMMON)) == [[(5, 0.0), (7, 1.0)]]


def test_cut_rows_keep_the_labels_of_whole_lines():
    records = [{"prompt": "a", "steps": ["aa", "bbbb", "a"], "labels": [1, 0, 0]}]
    cut = {}
    for length in (3, 4, 8, 9, 10, 11):
        values = COMMON | dict(max_length=length, overlong="truncate")
        cut[length] = read(step_labels([records], TEXT, **values))[0]
    first, second, third = (3, 1.0), (8, 0.0), (10, 0.0)
    assert cut == {
        3: [],  # a a a: the first line is cut
        4: [],  # its break is the last column, which ends the row, whole line or not
        8: [first],
        9: [first],
        10: [first, second],
        11: [first, second, third],
    }


def test_bad_records_are_named():
    for record, message in [
        ({"steps": ["a", "b"], "labels": [1]}, "1 labels for 2 steps"),
        ({"completion": "a\n\nb", "labels": [1, 1, 1]}, "3 labels for 2 steps"),
        ({"steps": ["a"]}, "no field labels"),
        ({"steps": ["a"], "labels": [2]}, "labels hold 2, not a number from 0 to 1"),
        ({"steps": ["a"], "labels": ["+"]}, "labels hold '\\+', not a number"),
        ({"labels": [1]}, "no field completion or solution"),
        ({"steps": "ab", "labels": [1, 1]}, "field 'steps' holds 'ab', not a list of texts"),
        ({"steps": [1, 2], "labels": [1, 1]}, r"field 'steps' holds \[1, 2\], not a list of texts"),
        ({"steps": ["a"], "labels": None}, "labels hold None, not a list"),
        ({"steps": ["a"], "labels": [[1]]}, r"labels hold \[1\], not a number from 0 to 1"),
        (
            {"steps": ["a", "b"], "labels": [1, 1], "completion": "a\nbb"},
            "steps do not join to completion: line 2 is 'b' in one and 'bb' in the other",
        ),
        (
            {"steps": ["a"], "labels": [1], "completion": "a\nb"},
            "steps do not join to completion: line 2 is None in one and 'b' in the other",
        ),
    ]:
        with pytest.raises(ValueError, match=f"source 0, record 0: {message}"):
            step_labels([[{"prompt": "a"} | record]], TEXT, **COMMON)
    breakless = CharTokenizer("ab")
    with pytest.raises(ValueError, match="vocabulary has no line break"):
        records = [{"prompt": "a", "steps": ["a", "b"], "labels": [1, 1]}]
        step_labels([records], breakless, **COMMON)
    assert step_labels([[{"prompt": "a", "steps": ["ab"], "labels": [1]}]], breakless, **COMMON)


def test_solutions_without_a_labelled_step_are_left_out(caplog):
    good = {"prompt": "a", "steps": ["a", "b"], "labels": [1, None]}
    none = [good | {"labels": [None, None]}, good | {"steps": [" ", "\n"]}]
    made = step_labels([[none[0], good, none[1]]], TEXT, **COMMON)
    assert len(made) == 1 and made.num_flaws == {"solutions without a labelled step": 2}
    assert read(made) == [[(2, 1.0)]]
    assert "2 of 3 records (left out): source 0, record 0, the first" in caplog.text
    with pytest.raises(ValueError, match=r"no records are left: 2 .*without a labelled step: 2"):
        step_labels([none], TEXT, **COMMON)


def test_arithmetic_records_fit_as_they_are(tmp_path):
    options = dict(slip=0.5, train=40, test=10)
    source = open_source("arithmetic", data_dir=str(tmp_path), options=options)
    values = dict(template="{question}\n", max_length=64, seed=0, shuffle=False)
    batch = step_labels([source], ByteTokenizer(), **values).batch(0, slice(None), 40)
    for row in range(40):
        assert batch.labels[row][batch.step_ends[row]].tolist() == source[row]["labels"]
        ids = batch.texts.tokens[row][batch.texts.loss_mask[row]]
        pieces = np.split(ids, np.flatnonzero(batch.step_ends[row][batch.texts.loss_mask[row]]) + 1)
        found = [ByteTokenizer().decode(piece).strip() for piece in pieces if len(piece)]
        assert found == source[row]["steps"]


@pytest.mark.data
def test_published_trajectories_on_a_published_vocabulary(data_dir, tmp_path):
    """PRM800K on GPT-2: labels in order, at a choice of the ends that devices mark."""
    path = tmp_path / "tokenizer.json"
    with gzip.open(data_dir / "tokenizers/gpt2/tokenizer.json.gz") as packed:
        path.write_bytes(packed.read())
    tokenizer = load_tokenizer(str(path))
    source = open_source(f"jsonl:{data_dir}/prm800k_sample/trajectories.jsonl.gz")
    values = dict(template="{question}\n", max_length=4096, seed=0, shuffle=False)
    made = step_labels([source], tokenizer, **values)
    assert len(made) == len(source) == 189
    batch = made.batch(0, slice(None), 189)
    several = 0
    solution = batch.texts.loss_mask
    marked = np.asarray(mark_step_ends(batch.texts.tokens, solution, token_tables(tokenizer)))
    assert not (batch.step_ends & ~marked).any()
    for row in range(189):
        record = source[row]
        assert batch.labels[row][batch.step_ends[row]].tolist() == record["labels"]
        lines = sum(len(split_steps(step)) for step in record["steps"])
        assert marked[row].sum() == lines
        several += lines > len(record["steps"])
    assert several > 0
