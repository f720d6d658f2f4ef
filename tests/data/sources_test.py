"""Sources by name: JSONL with faults named by line, prepared TFDS sets, fields and dialogues."""

import gzip
import hashlib
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rlhf_jax.data.sources import (
    MappedSource,
    RecordSource,
    TfdsSource,
    open_source,
    place,
    read_jsonl,
)

ROWS = [{"question": "é 1+1?", "answer": "#### 2"}, {"question": "2+2?", "answer": "#### 4"}]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, "utf-8")
    return path


def all_of(source):
    assert isinstance(source, RecordSource)
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_plain_and_gzipped(name, tmp_path):
    path = write(tmp_path / name, ROWS)
    assert all_of(open_source(f"jsonl:{path}")) == ROWS
    assert all_of(open_source(f"jsonl:{path}", "all")) == ROWS


def test_jsonl_splits_are_files(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:1])
    write(tmp_path / "test.jsonl", ROWS[1:])
    name = f"jsonl:{tmp_path}/{{split}}.jsonl"
    assert [all_of(open_source(name, split)) for split in ("train", "test")] == [ROWS[:1], ROWS[1:]]
    # Never the training file in place of a test split.
    with pytest.raises(ValueError, match=r"no split .test.; write \{split\} into the path"):
        open_source(f"jsonl:{tmp_path}/train.jsonl", "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": \n', "line 3: not JSON"),
        ('{"a": 1}\n[1]\n', "line 2: list where an object is wanted"),
        ("\n\n", "holds no records"),
    ],
)
def test_broken_lines_are_named(text, message, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(path)
    assert str(path) in str(error.value)


def test_absent_file_and_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_source(f"jsonl:{tmp_path}/none.jsonl")
    for name in ("gsm8k", "csv:a", "jsonl:", ""):
        with pytest.raises(ValueError, match="neither 'arithmetic', 'jsonl:<path>' nor"):
            open_source(name)
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match="no option feilds; they have fields, format"):
        open_source(f"jsonl:{path}", options={"feilds": {}})
    with pytest.raises(ValueError, match="format='chat' is not one of plain, dialogue"):
        open_source(f"jsonl:{path}", options={"format": "chat"})


def test_fields_are_renamed(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    source = open_source(f"jsonl:{path}", options={"fields": {"prompt": "question"}})
    assert source[1] == {"answer": "#### 4", "prompt": "2+2?"}
    swapped = MappedSource(
        ROWS, fields={"question": "answer", "answer": "question"}, format="plain"
    )
    assert swapped[1] == {"question": "#### 4", "answer": "2+2?"}
    absent = open_source(f"jsonl:{path}", options={"fields": {"prompt": "problem"}})
    with pytest.raises(ValueError, match=r"no field problem, .*; the record has question"):
        absent[0]


def test_dialogues_become_prompts_and_replies(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant:"
    rows = [{"chosen": start + " a", "rejected": start + " b", "subset": "x"}]
    path = write(tmp_path / "a.jsonl", rows)
    source = open_source(f"jsonl:{path}", options={"format": "dialogue"})
    assert source[0] == {"prompt": start, "chosen": " a", "rejected": " b", "subset": "x"}


class Words(tfds.core.GeneratorBasedBuilder):
    """A small set in either file format, as somebody else might have prepared it."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "text": tfds.features.Text(),
                "numbers": tfds.features.Sequence(np.float32),
                "nested": {"label": tfds.features.ClassLabel(names=["no", "yes"])},
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"é {i}", "numbers": [0.5] * (i % 3), "nested": {"label": i % 2}}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    Words(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


@pytest.mark.parametrize("name", ["words", "words:1.0.0", "words/1.0.0"])
def test_prepared_sets_are_read(name, words):
    source = open_source(f"tfds:{name}", "train", data_dir=str(words))
    assert isinstance(source, TfdsSource)
    assert len(source) == 10
    assert source[2] == {"text": "é 2", "numbers": [0.5, 0.5], "nested": {"label": 0}}
    assert len(open_source(f"tfds:{name}", "train[:50%]", data_dir=str(words))) == 5


def test_prepared_sets_that_are_absent_or_ambiguous(words, tmp_path):
    with pytest.raises(ValueError, match="no prepared data set 'verbs' under"):
        open_source("tfds:verbs", data_dir=str(words))
    with pytest.raises(ValueError, match=r"words/1\.0\.0 has no split 'dev'; it has"):
        open_source("tfds:words", "dev", data_dir=str(words))
    for config in ("en/1.0.0", "en/1.1.0", "en/1.10.0"):
        shutil.copytree(words / "words" / "1.0.0", tmp_path / "words" / config)
    # The newest version by number, not by name.
    info = tmp_path / "words/en/1.10.0/dataset_info.json"
    newest = json.loads(info.read_text())
    newest["splits"] = newest["splits"][:1]
    info.write_text(json.dumps(newest))
    kept = newest["splits"][0]["name"]
    other = {"train": "test", "test": "train"}[kept]
    with pytest.raises(ValueError, match=f"no split '{other}'"):
        open_source("tfds:words", other, data_dir=str(tmp_path))
    shutil.copytree(words / "words" / "1.0.0", tmp_path / "words/de/1.0.0")
    with pytest.raises(ValueError, match="'words' is one of words/de, words/en; name it in full"):
        open_source("tfds:words", data_dir=str(tmp_path))
    assert len(open_source("tfds:words/de", kept, data_dir=str(tmp_path))) in (2, 10)


@pytest.mark.data
@pytest.mark.parametrize("name", ["c4", "c4/en", "c4/en:3.0.1"])
def test_tfrecord_ends_in_the_conversion_command(name, data_dir):
    with pytest.raises(ValueError, match="prepared as tfrecord") as error:
        open_source(f"tfds:{name}", data_dir=str(data_dir / "c4_mini_tfds"))
    folder = data_dir / "c4_mini_tfds/c4/en/3.0.1"
    assert str(error.value).splitlines()[-1] == (
        f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record"
    )


@pytest.mark.data
def test_gsm8k_in_its_own_form(data_dir):
    source = open_source(f"jsonl:{data_dir}/gsm8k/{{split}}.jsonl.gz", "test")
    assert len(source) == 660
    assert all("\n#### " in source[i]["answer"] for i in range(len(source)))


def test_inline_records_stand_in_the_config():
    source = open_source("inline", "all", options={"prompt": ("a", "b"), "answer": [1, 2]})
    assert all_of(source) == [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "got no column"),
        ({"prompt": ()}, "got {'prompt': 0}"),
        ({"prompt": ("a", "b"), "answer": (1,)}, "got {'prompt': 2, 'answer': 1}"),
        ({"prompt": "ab"}, r"no list in \['prompt'\]"),  # text is no column of letters
    ],
)
def test_inline_columns_are_lists_of_one_length(columns, message):
    with pytest.raises(ValueError, match=message):
        open_source("inline", options=columns)


def numbered(path, count=200):
    """Two records for each prompt, in a file; the prompts are numbers."""
    rows = [dict(prompt=f"{i // 2}", chosen=f"{i}", rejected="-") for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def test_halves_are_all_records_and_share_no_prompt(tmp_path):
    name = numbered(tmp_path / "a.jsonl")
    halves = [open_source(name, options=dict(half=half)) for half in "ab"]
    found = [[source[i] for i in range(len(source))] for source in halves]
    chosen = [int(record["chosen"]) for half in found for record in half]
    assert sorted(chosen) == list(range(200))
    first, second = ({record["prompt"] for record in half} for half in found)
    assert not first & second
    assert 70 < len(found[0]) < 130  # by chance, and the same chance every time
    # By the definition, for one of them: the lowest bit of the digest's first byte.
    bit = hashlib.sha256(b'"0"').digest()[0] & 1
    assert ("0" in second) == bool(bit)


def test_a_record_s_half_depends_on_its_prompt_alone(tmp_path):
    """Not on order or on other records: a longer file keeps old records where they were."""
    short, long = numbered(tmp_path / "a.jsonl", 100), numbered(tmp_path / "b.jsonl", 200)
    of = [open_source(name, options=dict(half="a")) for name in (short, long)]
    few, many = ([source[i]["prompt"] for i in range(len(source))] for source in of)
    assert few == many[: len(few)]


def test_halves_are_made_of_mapped_fields_and_know_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(dict(q=[{"role": "user", "content": f"{i}"}])) + "\n"
                            for i in range(9)))  # fmt: skip
    options = dict(fields=dict(prompt="q"), half="b")
    source = open_source(f"jsonl:{path}", options=options)
    line = int(source[0]["prompt"][0]["content"]) + 1
    assert place(source, 0) == f"{path}, line {line}"
    by_old_name = dict(half="b", half_by="q")
    assert len(open_source(f"jsonl:{path}", options=by_old_name)) == len(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(half="c"), "options.half='c' is not one of a, b"),
        (dict(half="a", half_by="question"), "line 1: no field question, by which .*half_by.*has"),
        (dict(half_by="prompt"), "options.half_by='prompt', but options.half names no half"),
        (dict(halb="a"), "no option halb; they have fields, format, half, half_by"),
    ],
)
def test_halves_that_cannot_be_made_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_source(numbered(tmp_path / "a.jsonl"), options=options)


def test_an_empty_half_is_named(tmp_path):
    name = numbered(tmp_path / "a.jsonl", 2)  # one prompt
    kept = "b" if hashlib.sha256(b'"0"').digest()[0] & 1 else "a"
    assert len(open_source(name, options=dict(half=kept))) == 2
    with pytest.raises(ValueError, match="holds none of the 2 records"):
        open_source(name, options=dict(half="a" if kept == "b" else "b"))
