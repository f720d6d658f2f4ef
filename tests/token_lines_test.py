"""Lines of a file in batches of few shapes: order, widths, fillers, and what is refused."""

import gzip
import json

import pytest

from rlhf_jax import token_lines
from rlhf_jax.data.examples import Row
from rlhf_jax.text.tokenizer import ByteTokenizer, load_tokenizer
from rlhf_jax.token_lines import Encoder, batch_rows, check_output, in_order, padded, read_rows
from tests.model_folders import write


def test_widths_are_few_and_hardly_larger_than_the_row():
    assert [padded(n) for n in (1, 16, 17, 32, 33, 49, 65, 97, 129, 1025)] == [
        16, 16, 32, 32, 48, 64, 96, 128, 192, 1536,
    ]  # fmt: skip
    assert all(n <= padded(n) < 1.5 * n + 16 for n in range(1, 5000))
    assert len({padded(n) for n in range(1, 5000)}) < 20


def test_batches_have_whole_shards():
    assert batch_rows(16, 100, 4) == 16
    assert batch_rows(16, 3, 4) == 4
    assert batch_rows(5, 100, 4) == 8


def letters(record):
    return Row([0] * record["length"], 0)


def test_results_come_in_the_order_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(token_lines, "_WINDOW", 3)
    lengths = [40, 3, 20, 5, 70, 4, 41, 6, 2, 90, 1]
    rows = [dict(length=n, id=f"line {i}") for i, n in enumerate(lengths)]
    path = write(tmp_path / "in.jsonl", rows)
    seen = []

    def run(lines, width):
        assert len(lines) == 2
        seen.append((width, [line.index for line in lines]))
        return [dict(width=width, index=line.index) for line in lines]

    found = list(in_order(path, letters, run, rows=2, count=len(rows)))
    assert [row["index"] for row in found] == list(range(len(rows)))
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert all(padded(row["length"]) == row["width"] for row in found)
    assert seen[:2] == [(96, [4, 4]), (48, [0, 0])]  # the widest of the first six lines first


def test_gzipped_lines_are_read(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(dict(length=2)) + "\n\n" + json.dumps(dict(length=3)) + "\n")
    assert [len(line.row.tokens) for line in read_rows(str(path), letters)] == [2, 3]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"length": 2}\n{"length": \n')
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: not JSON"):
        token_lines.count_rows(str(path), letters)
    path.write_text("")
    with pytest.raises(ValueError, match=r"in\.jsonl holds no records"):
        token_lines.count_rows(str(path), letters)
    with pytest.raises(ValueError, match=r"absent\.jsonl: no such file"):
        token_lines.count_rows(str(tmp_path / "absent.jsonl"), letters)


def test_prompts_in_every_form():
    def ids(record, template=token_lines.PLAIN):
        return Encoder(ByteTokenizer(), 258, template).prompt(record)

    assert ids(dict(prompt="ab", id=3)) == [97, 98]
    assert ids(dict(tokens=[0, 257])) == [0, 257]
    assert ids(dict(question="b"), "a{question}") == [97, 98]


def test_dialogues_go_through_the_chat_template(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    text = load_tokenizer("byte", chat_template=str(path))
    encoder = Encoder(text, 258)
    asked, answer = dict(role="user", content="q"), dict(role="assistant", content="z")
    assert text.decode(encoder.prompt(dict(messages=[asked], prompt="another"))) == "u:q|a:"
    assert text.decode(encoder.prompt(dict(messages=[asked, answer]))) == "u:q|a:"
    rows = [
        encoder.text(dict(messages=[asked], completion="z"), ended=ended) for ended in (True, False)
    ]
    assert [text.decode(row.tokens) for row in rows] == ["u:q|a:z|", "u:q|a:z|"]
    assert [row.tokens[-1] for row in rows] == [256, ord("|")]
    assert all(text.decode(row.tokens[row.prompt :]) == "z|" for row in rows)
    assert encoder.text(dict(messages=[asked, answer]), ended=True) == rows[0]
    # A template that the user names is what makes prompts, whatever else the record has.
    assert Encoder(text, 258, "{q}").prompt(dict(messages=[asked], q="x", tokens=[1])) == [120]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (dict(question="b"), "no field tokens or messages or prompt; the record has question"),
        (dict(prompt="a", tokens=[1]), "has tokens and prompt; wanted tokens or the others"),
        (dict(prompt=""), "the prompt is empty"),
        (dict(prompt=["a"]), "field 'prompt' holds list where text is wanted"),
        (dict(messages="hi"), "tokenizer 'byte' has no chat template"),
        (dict(tokens=[]), "'tokens' holds an empty list"),
        (dict(tokens="ab"), "'tokens' holds str"),
        (dict(tokens=[1, 258]), r"'tokens' holds 258 at index 1; .* from 0 to 257"),
        (dict(tokens=[1.0]), "'tokens' holds 1.0 at index 0"),
        (dict(tokens=[True]), "'tokens' holds True at index 0"),
        (dict(tokens=[-1]), "'tokens' holds -1 at index 0"),
    ],
)
def test_bad_prompts_are_named(record, words):
    with pytest.raises(ValueError, match=words):
        Encoder(ByteTokenizer(), 258).prompt(record)


def test_outputs_that_cannot_be_written_are_named(tmp_path):
    there = tmp_path / "out.jsonl"
    there.write_text("")
    check_output(str(there), overwrite=True)
    check_output(str(tmp_path / "new.jsonl"), overwrite=False)
    for path, words in (
        (there, "exists; name another file or set --overwrite"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "out.jsonl", "there is no folder"),
        (tmp_path / "out.jsonl.gz", "not as .gz"),
    ):
        with pytest.raises(ValueError, match=words):
            check_output(str(path), overwrite=False)
