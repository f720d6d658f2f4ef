"""Step ends on devices against the splitter of texts, on vocabularies that merge line breaks."""

import gzip
import json

import jax
import numpy as np
import pytest

from rlhf_jax.text import steps
from rlhf_jax.text.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer

BYTES = ByteTokenizer()
mark = jax.jit(steps.mark_step_ends)

TRICKY = [
    "",
    "\n",
    " \n\n ",
    "one step",
    "one step\n",
    "\n\none step\n\n",
    "a.\nb.\nc",
    "a.\nb.\nc.\n",
    "a\n\nb\n\n\nc",
    "a\n \n\t\nb",
    "a  \n  b\n",
    "a.\r\nb.\r\n\r\nc",
    "a;\n}\n}\n",
    "x\n)\n).\n\n#### 5",
    "\\[\nx\n\\]\n",
    "a\u00a0\n\u00a0\nb",
    "é\n\u3000\nü\u2028v",
    "7\n8\n",
    "```\nif x:\n        y\n\n```\n",
]


def ends_of(tokenizer, text, eos=True):
    """Positions of step ends of one text, and its ids."""
    ids = tokenizer.encode(text) + ([tokenizer.eos_ids[0]] if eos else [])
    tables = steps.token_tables(tokenizer)
    tokens = np.array(ids, np.int32)
    return ids, np.flatnonzero(mark(tokens, np.ones(len(ids), bool), tables)).tolist()


def slow_ends(texts, valid):
    """The rule of the module once more, as a loop over token texts."""
    found, opened = [], False
    for t in range(valid):
        head, line_break, tail = texts[t].rpartition("\n")
        if line_break and (opened or head.strip(steps.BLANK)):
            found.append(t)
        if line_break:
            opened = bool(tail.strip(steps.BLANK))
        else:
            opened = opened or bool(tail.strip(steps.BLANK))
    if not opened and found:  # nothing visible after the last break: the line ends with the row
        found.pop()
    return [*found, valid - 1] if valid else []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a\nb\n", ["a", "b"]),
        ("  a \r\n\r\n b", ["a", "b"]),
        ("a b", ["a b"]),
        ("\n \n", [""]),
        ("", [""]),
    ],
)
def test_splits_literal_texts(text, wanted):
    assert steps.split_steps(text) == wanted


@pytest.mark.parametrize(
    ("text", "eos", "wanted"),
    [
        ("ab\nc", True, [2, 4]),  # the break closes ab, end-of-text closes c
        ("ab\nc\n", True, [2, 5]),  # c's own break is not an end: end-of-text takes its place
        ("ab\nc\n", False, [2, 4]),  # cut off behind the break
        ("ab\nc", False, [2, 3]),  # cut off within the line
        ("\na\n\n \nb", True, [2, 7]),  # only the first break behind visible text
        ("", True, [0]),
        ("\n\n", True, [2]),
    ],
)
def test_marks_literal_texts(text, eos, wanted):
    assert ends_of(BYTES, text, eos)[1] == wanted


def test_rows_padding_and_masks():
    texts = ["a\nb\n", "", "abc", "a\n"]
    tables = steps.token_tables(BYTES)
    tokens = np.full((2, 2, 6), BYTES.encode("\n")[0], np.int32)  # padding looks like a break
    mask = np.zeros((2, 2, 6), bool)
    for row, text in enumerate(texts):
        ids = BYTES.encode(text)
        tokens[row // 2, row % 2, : len(ids)] = ids
        mask[row // 2, row % 2, : len(ids)] = True
    ends = np.asarray(mark(tokens, mask, tables))
    assert [np.flatnonzero(e).tolist() for e in ends.reshape(4, 6)] == [[1, 3], [], [2], [1]]
    np.testing.assert_array_equal(steps.mark_host_step_ends(tokens, mask, tables), ends)
    # Behind a prompt: its lines are not steps, and an open prompt line opens none.
    prompted = np.array([BYTES.encode("q\nA:\nx\ny")], np.int32)
    under = np.arange(8)[None] >= 4
    assert np.flatnonzero(mark(prompted, under, tables)[0]).tolist() == [6, 7]


def test_random_bytes_agree_with_the_loop_and_the_splitter():
    rng = np.random.default_rng(0)
    characters = np.array([ord(c) for c in " \n\r\tab"])
    tables = steps.token_tables(BYTES)
    tokens = rng.choice(characters, (300, 12)).astype(np.int32)
    valid = rng.integers(0, 13, 300)
    mask = np.arange(12) < valid[:, None]
    ends = np.asarray(mark(tokens, mask, tables))
    np.testing.assert_array_equal(steps.mark_host_step_ends(tokens, mask, tables), ends)
    for row in range(300):
        text = BYTES.decode(tokens[row, : valid[row]])
        assert np.flatnonzero(ends[row]).tolist() == slow_ends(text, valid[row])
        assert ends[row].sum() == (len(steps.split_steps(text)) if valid[row] else 0)


def test_text_behind_a_break_within_one_token():
    class Merged(CharTokenizer):
        """A vocabulary with whole breaks inside tokens, as o200k's ``"\\n/"``."""

        def __init__(self):
            super().__init__("ab")
            self.vocab_size = 7

        def token_texts(self):
            return [None, None, "a", "b", "\n/", ".\n", "\n"]

    tables = steps.token_tables(Merged())
    for ids, wanted in [
        ([2, 4, 6, 3, 1], [1, 2, 4]),  # a "\n/" "\n" b: three lines
        ([6, 4, 6, 1], [3]),  # nothing before "\n/": one line
        ([2, 4, 1], [1, 2]),  # "/" is the last line
        ([2, 6, 5, 1], [1, 3]),
    ]:
        tokens = np.array(ids, np.int32)
        got = np.flatnonzero(mark(tokens, np.ones(len(ids), bool), tables)).tolist()
        texts = [Merged().token_texts()[i] or "" for i in ids]
        assert got == wanted == slow_ends(texts, len(ids))
        assert len(got) == len(steps.split_steps("".join(texts)))


def test_tables_cover_a_padded_vocabulary():
    tables = steps.token_tables(BYTES, vocab_size=300)
    assert tables.ends_step.shape == (300,) and not tables.ends_step[258:].any()
    assert np.flatnonzero(tables.ends_text).tolist() == [256]
    assert np.flatnonzero(steps.step_table(BYTES)).tolist() == [10]
    with pytest.raises(ValueError, match="smaller than the tokenizer's 258"):
        steps.token_tables(BYTES, vocab_size=100)


def published(name, data_dir, folder):
    """A published vocabulary, unpacked into `folder`."""
    if name != "sentencepiece":
        with gzip.open(data_dir / "tokenizers" / name / "tokenizer.json.gz") as packed:
            (folder / "tokenizer.json").write_bytes(packed.read())
        return load_tokenizer(str(folder / "tokenizer.json"))
    with gzip.open(data_dir / "tokenizers/sentencepiece_cc32k/spm.model.gz") as packed:
        (folder / "spiece.model").write_bytes(packed.read())
    named = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"extra_ids": 0}))
    return load_tokenizer(str(folder))


def solutions(data_dir):
    """All GSM8K train answers, a part of MATH, PRM800K steps with three kinds of joints."""

    def read(name):
        with gzip.open(data_dir / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    gsm8k = [row["answer"] for row in read("gsm8k/train.jsonl.gz")]
    math = [row["solution"] for row in read("math/train.jsonl.gz")[:3000]]
    rows = read("prm800k_sample/trajectories.jsonl.gz")
    joints = ["\n", "\n\n", ".\n", "\r\n", "\n\n\n"]
    prm = [joints[i % 5].join(row["steps"]) + "\n" * (i % 3) for i, row in enumerate(rows)]
    return TRICKY + gsm8k + math + prm


def check_texts(tokenizer, texts):
    """Every text's step ends: as many as lines, each behind its own line's text."""
    tables, names = steps.token_tables(tokenizer), tokenizer.token_texts()
    texts = sorted(texts, key=len)
    total = 0
    for start in range(0, len(texts), 1024):
        ids = [[*tokenizer.encode(t), tokenizer.eos_ids[0]] for t in texts[start : start + 1024]]
        width = 256 * -(-max(map(len, ids)) // 256)
        tokens = np.zeros((len(ids), width), np.int32)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = one
        mask = np.arange(width) < np.array([len(one) for one in ids])[:, None]
        ends = np.asarray(mark(tokens, mask, tables))
        for row, one in enumerate(ids):
            lines = steps.split_steps(tokenizer.decode(one))
            found = np.flatnonzero(ends[row]).tolist()
            assert found == slow_ends([names[i] or "" for i in one], len(one))
            assert len(found) == len(lines), repr(tokenizer.decode(one))
            total += len(found)
            if (tables.ends_step & tables.text_after)[one].any():
                continue  # GPT-2's "\n\u00a0" belongs to two lines: cannot be cut between them
            pieces = np.split(np.array(one), np.array(found[:-1]) + 1)
            for piece, line in zip(pieces, lines, strict=True):
                assert tokenizer.decode(piece.tolist()).strip(steps.BLANK) == line
    return total


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("neox20b", "deepseek_r1"))],
)
def test_published_vocabularies_on_real_solutions(name, data_dir, tmp_path):
    tokenizer = published(name, data_dir, tmp_path)
    texts = solutions(data_dir)
    # These vocabularies lose nothing, so the host sees the same lines in the original text.
    assert check_texts(tokenizer, texts) == sum(len(steps.split_steps(t)) for t in texts)


@pytest.mark.data
@pytest.mark.parametrize("name", ["gpt2", "neox20b", "deepseek_r1"])
def test_published_vocabularies_on_random_tokens(name, data_dir, tmp_path):
    """What an untrained policy samples: any ids, many of them breaks."""
    tokenizer = published(name, data_dir, tmp_path)
    tables, names = steps.token_tables(tokenizer), tokenizer.token_texts()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tokenizer.vocab_size, (400, 24)).astype(np.int32)
    breaks = np.flatnonzero(tables.ends_step)
    tokens = np.where(rng.random(tokens.shape) < 0.4, rng.choice(breaks, tokens.shape), tokens)
    tokens = tokens.astype(np.int32)
    tokens[:, -1] = tokenizer.eos_ids[0]
    ends = np.asarray(mark(tokens, np.ones(tokens.shape, bool), tables))
    for row in range(400):
        ids = tokens[row].tolist()
        found = np.flatnonzero(ends[row]).tolist()
        assert found == slow_ends([names[i] or "" for i in ids], len(ids))
        assert len(found) == len(steps.split_steps(tokenizer.decode(ids)))


@pytest.mark.data
def test_a_vocabulary_without_line_breaks_has_one_step(data_dir, tmp_path):
    tokenizer = published("sentencepiece", data_dir, tmp_path)
    assert not steps.step_table(tokenizer).any()
    texts = solutions(data_dir)[::20]
    assert check_texts(tokenizer, texts) == len(texts)
