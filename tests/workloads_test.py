"""Workloads A to D run shrunken and say what they measured, in the keys that others print too."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import workload_assets, workloads
from benchmarks.letter_share import share_of
from rlhf_jax.text.tokenizer import load_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--small", "--threads=2"]  # not pinned: other tests run in this process
# What programs of other origin print; the ratio of two lines needs the same names in both.
KEYS = {
    "contender", "workload", "name", "variant", "versions", "threads", "import_s", "load_before",
    "setup_s", "status", "first_step_s", "time_to_first_step_s", "reps_s", "median_s", "min_s",
    "max_s", "cpu_s", "cpu_median_s", "tokens_per_step", "tokens_per_s", "peak_rss_mib",
    "load_after", "extra",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("assets")
    workload_assets.make(made, workloads.parse("A", SMALL))
    return made


def lines_of(capsys, letter, *arguments):
    workloads.main(letter, [*SMALL, *arguments])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def check_line(line, letter, reps):
    assert line.keys() == KEYS | {"ceilings"}
    assert (line["workload"], line["name"]) == (letter, workloads.NAMES[letter])
    assert line["status"] == "ok"
    assert len(line["reps_s"]) == len(line["cpu_s"]) == reps
    assert 0 < line["min_s"] <= line["median_s"] <= line["max_s"]
    assert min(line["cpu_s"]) > 0
    parts = line["import_s"] + line["setup_s"] + line["first_step_s"]
    assert line["time_to_first_step_s"] == pytest.approx(parts, abs=0.01)
    assert line["ceilings"]["copy_gb_per_s"] > 0
    assert line["ceilings"]["matmul_tflop_per_s"] > 0


def test_pair_steps_on_assets_of_its_own(capsys):
    (line,) = lines_of(capsys, "D", "--reps=2", "--warmup=0")
    check_line(line, "D", reps=2)
    assert line["tokens_per_step"] == 4 * 2 * 8  # pairs, sides, tokens
    assert len(line["extra"]["losses"]) == 3
    assert line["extra"]["small"]


def test_rollouts_on_a_named_folder(capsys, folder):
    (line,) = lines_of(capsys, "A", "--reps=1", "--warmup=1", f"--workdir={folder}")
    check_line(line, "A", reps=1)
    assert line["tokens_per_step"] == 4 * 4  # prompts, tokens


@pytest.mark.slow
def test_policy_steps(capsys, folder):
    both = lines_of(capsys, "B", "--workload=B,C", "--reps=1", "--warmup=0", f"--workdir={folder}")
    for letter, line, rows in zip("BC", both, (4 * 2, 4), strict=True):
        check_line(line, letter, reps=1)
        assert line["tokens_per_step"] == rows * 4
    # Shares of one of eight letters, and a space behind each word of four.
    assert all(0 <= score < 0.5 for score in both[0]["extra"]["score_mean"])


@pytest.mark.slow
def test_started_by_its_path_from_anywhere(tmp_path, folder):
    command = [sys.executable, ROOT / "benchmarks/workload_d.py", "--small", "--reps=1"]
    done = subprocess.run(
        [*command, "--workload=D", "--warmup=0", "--threads=1", "--variant=default"],
        env={"PEER_BENCH_WORKDIR": str(folder), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_line(json.loads(done.stdout), "D", reps=1)


def test_line_counts_what_comes_after_warm_up():
    options = workloads.parse("A", ["--reps=3", "--warmup=1"])
    assert options.steps == 5
    clock = workloads.Clock("A", options, import_seconds=2.0)
    clock.wall, clock.cpu = [9.0, 8.0, 1.0, 4.0, 2.0], [7.0, 6.0, 1.5, 0.5, 1.0]
    line = clock.line(10, {})
    assert line["reps_s"] == [1.0, 4.0, 2.0]
    assert (line["min_s"], line["median_s"], line["max_s"]) == (1.0, 2.0, 4.0)
    assert (line["cpu_s"], line["cpu_median_s"]) == ([1.5, 0.5, 1.0], 1.0)
    assert (line["first_step_s"], line["time_to_first_step_s"]) == (9.0, 11.0)
    assert line["tokens_per_s"] == 5.0


def test_texts_are_their_tokens(folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    prompts = json.loads((folder / "prompts.json").read_text())
    pairs = json.loads((folder / "pairs.json").read_text())
    for text in (prompts[0], prompts[-1], pairs[0]["chosen"], pairs[-1]["rejected"]):
        assert tokenizer.encode(text["text"]) == text["ids"]
    assert {len(prompt["ids"]) for prompt in prompts} == {6}


def test_share_of_a_letter():
    assert share_of("e", "eels") == 0.5
    assert share_of("e", "") == 0.0


def test_bad_input_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no prompts\.json"):
        workloads.main("D", [*SMALL, f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit):
        workloads.parse("D", ["--workload=E"])
    assert "'E' is none of A, B, C, D" in capsys.readouterr().err
