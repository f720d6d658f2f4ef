"""Completions of a file: the published model's own choices, whatever the batch."""

import subprocess
import sys

import numpy as np
import pytest

from benchmarks import stories260k
from benchmarks.published_models import make, save
from rlhf_jax.generate import generate
from rlhf_jax.mesh import make_mesh
from rlhf_jax.models.config import named_size
from rlhf_jax.score import score
from tests.model_folders import CONFIG, TENSORS, hf_folder, read, run_of, write
from tests.models.load_test import reference_logits
from tests.processes import ROOT, ends_of, environment

PROMPTS = [
    dict(tokens=[3, 1, 4, 1, 5], id="a"),
    dict(prompt="two words and a little more", id="b"),  # wider than the others
    dict(prompt="x", id="c", answer=7),
    dict(tokens=[9, 9], id="d"),
    dict(prompt="yes", id="e"),
]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("hf"))


def run(folder, tmp_path, rows=PROMPTS, name="out", **keywords):
    prompts = write(tmp_path / f"{name}_prompts.jsonl", rows)
    output = tmp_path / f"{name}.jsonl"
    keywords = dict(tokenizer="byte", max_tokens=6) | keywords
    count = generate(model=folder, prompts=prompts, output=str(output), **keywords)
    assert count == len(rows)
    return read(output)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()


def test_greedy_is_the_argmax_of_the_published_model(hf, tmp_path):
    found = run(hf, tmp_path, greedy=True)
    assert [row["id"] for row in found] == list("abcde")
    for row in found:
        tokens, logprobs = row["prompt_tokens"], []
        for _ in row["tokens"][0]:
            ahead = log_softmax(reference_logits(CONFIG, TENSORS, tokens)[-1])
            tokens = [*tokens, int(np.argmax(ahead))]
            logprobs.append(ahead.max())
        assert row["tokens"] == [tokens[len(row["prompt_tokens"]) :]]
        np.testing.assert_allclose(row["logprobs"][0], logprobs, atol=1e-4)
        assert row["truncated"] == [len(row["tokens"][0]) == 6 and tokens[-1] != 256]


def test_lines_keep_their_fields_and_say_what_was_sampled(hf, tmp_path):
    found = run(hf, tmp_path, samples=3)
    assert [row["id"] for row in found] == list("abcde")
    assert found[2]["answer"] == 7
    assert found[2]["prompt"] == "x" and found[2]["prompt_tokens"] == [120]
    assert found[0]["prompt_tokens"] == [3, 1, 4, 1, 5]
    assert found[0]["prompt"] == "\x03\x01\x04\x01\x05"
    for row in found:
        assert {len(row[key]) for key in ("completions", "tokens", "logprobs", "truncated")} == {3}
        assert [len(ids) for ids in row["tokens"]] == [len(x) for x in row["logprobs"]]
        assert all(x < 0 for sample in row["logprobs"] for x in sample)
    assert len({tuple(sample) for row in found for sample in row["tokens"]}) > 10


def test_rows_are_no_longer_than_the_positions_that_a_model_learned(tmp_path):
    model = make("gpt2", n_positions=40)
    folder = str(save(model, tmp_path / "gpt2"))
    keywords = dict(tokenizer="chars:abc", max_tokens=6, greedy=True)
    for length, name in ((34, "fits"), (20, "short")):  # both are padded beyond 34 elsewhere
        found = run(folder, tmp_path, [dict(tokens=[3] * length)], name=name, **keywords)
        assert len(found[0]["tokens"][0]) <= 6
    with pytest.raises(ValueError, match=r"record 2 has 35 tokens.*have room for 34"):
        run(folder, tmp_path, [dict(tokens=[3] * n) for n in (2, 35)], **keywords)
    with pytest.raises(ValueError, match=r"--max_tokens=40, but the model has learned 40"):
        run(folder, tmp_path, [dict(tokens=[3])], **keywords | dict(max_tokens=40))
    texts = write(tmp_path / "texts.jsonl", [dict(tokens=[3] * 40)])
    words = dict(model=folder, tokenizer="chars:abc", output=str(tmp_path / "scores.jsonl"))
    assert score(input=texts, **words) == 1
    texts = write(tmp_path / "texts.jsonl", [dict(tokens=[3] * 41)])
    with pytest.raises(ValueError, match=r"record 1 has 41 tokens.*have room for 40"):
        score(input=texts, overwrite=True, **words)


def test_samples_do_not_depend_on_the_batch(hf, tmp_path):
    one = run(hf, tmp_path, samples=2, batch=1, temperature=0.7, top_p=0.9, name="one")
    all_at_once = run(hf, tmp_path, samples=2, batch=99, temperature=0.7, top_p=0.9, name="all")
    other = run(hf, tmp_path, samples=2, batch=99, temperature=0.7, top_p=0.9, seed=1, name="other")
    for a, b in zip(one, all_at_once, strict=True):
        assert (a["tokens"], a["completions"]) == (b["tokens"], b["completions"])
        for x, y in zip(a["logprobs"], b["logprobs"], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
    assert [row["tokens"] for row in one] != [row["tokens"] for row in other]


def rescored(folder, found, tmp_path, **keywords):
    """What `score` says of each sample's tokens."""
    rows = [
        dict(tokens=row["prompt_tokens"] + ids, prompt_tokens=len(row["prompt_tokens"]), said=said)
        for row in found
        for ids, said in zip(row["tokens"], row["logprobs"], strict=True)
    ]
    texts = write(tmp_path / "texts.jsonl", rows)
    score(model=folder, input=texts, output=str(tmp_path / "scored.jsonl"), **keywords)
    return read(tmp_path / "scored.jsonl")


def check_rescored(rows):
    for row in rows:
        again = row["logprobs"][row["prompt_tokens"] - 1 :]
        np.testing.assert_allclose(again, row["said"], atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_log_probs_are_those_of_score_on_a_run(tmp_path, rank):
    config = named_size("tiny", layers=1, lora_rank=rank)
    folder, _ = run_of(tmp_path / "run", config, make_mesh({"fsdp": -1}))
    found = run(folder, tmp_path, samples=2, tokenizer="")
    check_rescored(rescored(folder, found, tmp_path, batch=5))


@pytest.mark.data
def test_a_real_model_with_its_own_tokenizer(data_dir, tmp_path):
    folder = str(stories260k.convert(data_dir / "tiny_models" / "stories260K", tmp_path / "model"))
    rows = [dict(prompt="Once upon a time, there was"), dict(prompt="One day, a girl")]
    found = run(
        folder, tmp_path, rows, samples=2, max_tokens=24, tokenizer="", template="<s>{prompt}"
    )
    for row, given in zip(found, rows, strict=True):
        assert row["prompt_tokens"][0] == stories260k.BOS and row["prompt"] == given["prompt"]
        # It tells stories: far above 1/512 for a token.
        assert np.mean([x for sample in row["logprobs"] for x in sample]) > -2.5
    check_rescored(rescored(folder, found, tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(samples=0), "--samples=0; wanted 1 or more"),
        (dict(max_tokens=0), "--max_tokens=0"),
        (dict(batch=0), "--batch=0"),
        (dict(seed=-1), "--seed=-1; wanted 0 to"),
        (dict(temperature=-1.0), "temperature=-1"),
        (dict(top_p=0.0), "top_p=0"),
        (dict(max_prompt=4), r"prompts\.jsonl, line 1: the prompt has 5 tokens but --max_prompt=4"),
        (dict(rows=[dict(prompt="a"), dict(text="b")]), r"line 2: no field tokens .* has text"),
        (dict(rows=[dict(tokens=[260])]), "line 1: field 'tokens' holds 260 at index 0"),
        (dict(template="{question}"), "line 1: template .* names field 'question'"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(hf, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        run(hf, tmp_path, **change)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_reward_model_samples_nothing(tmp_path):
    config = named_size("tiny", layers=1, lm_head=False, score_heads=("outcome",))
    folder, _ = run_of(tmp_path / "run", config, make_mesh({"data": -1}))
    with pytest.raises(ValueError, match=r"is a reward model; rlhf_jax\.score"):
        run(folder, tmp_path)


BAD = (
    (["--model=x"], "--prompts, --output missing"),
    (["--modle=x"], "modle"),
    (["--samples=two"], "samples"),
    (["--config=configs/ppo_tiny.py"], "--config"),
)


@pytest.fixture(scope="module")
def ends(hf, tmp_path_factory):
    """How the command lines ended that sample nothing; the last two: a file is there, --help."""
    folder = tmp_path_factory.mktemp("ends")
    there = folder / "out.jsonl"
    there.write_text("")
    whole = ["--model=a", "--prompts=b", "--output=c"]
    lines = [[*(whole if flags[0] != "--model=x" else []), *flags] for flags, _ in BAD]
    prompts = write(folder / "in.jsonl", PROMPTS)
    lines += [[f"--model={hf}", f"--prompts={prompts}", f"--output={there}", "--tokenizer=byte"]]
    return ends_of([("generate", *flags) for flags in [*lines, ["--help"]]], folder / "said")


def test_the_command_line(hf, tmp_path):
    prompts = write(tmp_path / "in.jsonl", PROMPTS)
    output = tmp_path / "out.jsonl"
    flags = [f"--model={hf}", f"--prompts={prompts}", f"--output={output}", "--tokenizer=byte"]
    flags += ["--max_tokens=2", "--greedy", "--temperature=0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.generate", *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in read(output)] == list("abcde")


def test_a_file_that_is_there_is_kept(ends):
    again = ends[-2]
    assert again.returncode == 2 and "Traceback" not in again.stderr
    last = again.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --output=") and "out.jsonl' exists" in last


@pytest.mark.parametrize("case", range(len(BAD)), ids=[words for _, words in BAD])
def test_bad_flags_end_with_one_line_and_status_2(ends, case):
    done, (_, words) = ends[case], BAD[case]
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert "Traceback" not in done.stderr


def test_help_lists_the_flags(ends):
    shown = ends[-1].stdout
    assert all(f"--{name}" in shown for name in ("model", "samples", "[no]greedy", "process_id"))
    assert "--workdir" not in shown
