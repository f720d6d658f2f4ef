"""Readers of published sets: small records by hand, errors, and the facts known of real files."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data import process_sets, reward_sets
from rlhf_jax.data.plain_forms import Pair, Samples, check_item
from rlhf_jax.data.process_sets import find_form
from rlhf_jax.data.record_files import open_records
from rlhf_jax.ops.length_bias import pair_lengths
from rlhf_jax.ops.reward_metrics import best_of_k


def read(form, record):
    return find_form(form)[1](record)


def items(data_dir, form, file):
    source = open_records(f"jsonl:{data_dir / file}.jsonl.gz")
    return [item for i in range(len(source)) for item in read(form, source[i])]


PAIR = dict(prompt="p", chosen="c", rejected="r")
MESSAGES = [{"role": "user", "content": "p"}]
ANSWER = [{"role": "assistant", "content": "c"}]


def test_plain_pairs():
    assert read("pairs", PAIR | dict(subset="s")) == [Pair("p", "c", "r", {"subset": "s"})]
    tied = read("pairs", PAIR | dict(tie=True, models=["a", "b"]))[0]
    assert tied.tie and tied.models == ("a", "b")
    whole = dict(chosen=MESSAGES + ANSWER, rejected=[*MESSAGES, ANSWER[0] | {"content": "r"}])
    assert read("pairs", whole) == [Pair(MESSAGES, "c", "r")]
    assert read("pairs", whole | dict(prompt="p")) == [Pair("p", "c", "r")]
    dialogues = dict(chosen="\n\nHuman: p\n\nAssistant: c", rejected="\n\nHuman: p\n\nAssistant: r")
    assert read("pairs", dialogues) == [Pair("\n\nHuman: p\n\nAssistant:", " c", " r")]


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("pairs", dict(prompt="p", chosen="c"), "no field rejected"),
        ("pairs", PAIR | dict(chosen=MESSAGES), "ends in a message of 'user'"),
        ("pairs", PAIR | dict(models=["a"]), "'models' holds"),
        ("rm_bench", PAIR | dict(domain="d", chosen=["a"], rejected=["b", "c"]), "1 chosen but 2"),
        ("rm_bench", PAIR | dict(domain="d"), "'chosen' holds str; wanted a list"),
        ("judgebench", dict(question="q", source="s", label="A"), "label='A'; wanted A>B"),
        ("llmbar", dict(input="i", output_1="a", output_2="b", label=0), "label=0; wanted 1 or 2"),
        ("pandalm", dict(annotator1=1, annotator2=3, annotator3=1), "annotators say"),
        ("ppe_human", PAIR | dict(winner="left"), "winner='left'"),
        (
            "ppe_correctness",
            dict(prompt="p", response_1="a", scores=[1, 0]),
            "2 scores for 1 fields",
        ),
        ("ppe_correctness", dict(prompt="p", response_1="a", scores=[0.5]), "wanted true or false"),
        ("samples", dict(prompt="p", completions=["a"], correct=[1, 0]), "2 labels for 1"),
        ("ultrafeedback", dict(instruction="i", completions=[{}]), "overall_score=None"),
        ("processbench", dict(problem="p", steps=["a"], label=1), "label=1; wanted -1, or a step"),
        ("processbench", dict(problem="p", steps=[], label=-1), "'steps' holds list"),
        ("prmbench", dict(question="q", steps=["a"], error_steps=[2]), r"error_steps=\[2\]"),
        ("pairs", PAIR | dict(tie="false"), "field 'tie' holds 'false', not true or false"),
        ("pairs", PAIR | dict(prompt=""), "field 'prompt' is empty; wanted a prompt"),
        ("ppe_correctness", dict(prompt="p", response_1="a", scores=None), "'scores' holds None"),
        ("reward_bench_2", PAIR | dict(chosen=["a"], rejected=[]), "'rejected' holds an empty"),
        (
            "ultrafeedback",
            dict(completions=[dict(overall_score=float("nan"), response="a")]),
            "overall_score=nan; wanted a finite number",
        ),
        ("ranked", dict(instruction=3, output=["a", "b"]), "field 'instruction' holds int"),
        ("solutions", dict(prompt="p", steps=["a"], labels=[2]), "labels hold 2"),
        ("solutions", dict(prompt="p", steps=["a"], labels=[]), r"labels=\[\]; wanted one"),
    ],
)
def test_a_record_of_another_form_is_an_error(form, record, message):
    with pytest.raises(ValueError, match=message):
        read(form, record)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Pair("p", "a", "b", models=(1, "b")), r"models are \(1, 'b'\); wanted two names"),
        (Pair("p", "a", "b", models=("a", "")), "wanted two names"),
        (Pair("p", "a", "b", {"language": 3}), "category language is 3; wanted text"),
        (Samples("p", ["a"], [True], {"generator": None}), "category generator is None"),
    ],
)
def test_names_are_texts(item, message):
    with pytest.raises(ValueError, match=message):
        check_item(item)
    check_item(Pair("p", "a", "b", {"language": "en"}, models=("a", "b")))


def test_unknown_forms_list_the_known():
    with pytest.raises(ValueError, match=r"form='rmbench'; known pairs: pairs, reward_bench"):
        find_form("rmbench")


def test_rm_bench_is_nine_pairs_of_three_levels():
    record = dict(prompt="p", domain="chat", chosen=["a", "b", "c"], rejected=["x", "y", "z"])
    found = read("rm_bench", record)
    level = {(one.chosen, one.rejected): one.categories["level"] for one in found}
    # Row: style of the better answer; column: of the worse one.
    assert [[level[c, r] for r in "xyz"] for c in "abc"] == [
        ["normal", "hard", "hard"],
        ["easy", "normal", "hard"],
        ["easy", "easy", "normal"],
    ]


def test_labels_that_name_the_second_turn_the_pair():
    ab = dict(question="p", response_A="c", response_B="r", source="mmlu-pro-law")
    first = read("judgebench", ab | dict(label="A>B", response_model="m"))[0]
    assert first[:3] == ("p", "c", "r")
    assert first.categories == dict(kind="mmlu-pro", source="mmlu-pro-law", model="m")
    assert read("judgebench", ab | dict(label="B>A"))[0][:3] == ("p", "r", "c")
    bar = dict(input="p", output_1="c", output_2="r", subset="s")
    assert read("llmbar", bar | dict(label=2)) == [Pair("p", "r", "c", {"subset": "s"})]
    auto = {"scenario": "s", "prompt": "p", "response 1": "c", "response 2": "r"}
    labelled = [read("autoj", auto | {"label": label})[0] for label in (0, 1, 2)]
    assert [(one.chosen, one.tie) for one in labelled] == [("c", False), ("r", False), ("c", True)]


@pytest.mark.parametrize(
    ("votes", "chosen", "tie"),
    [
        ((1, 1, 2), "c", False),
        ((2, 0, 2), "r", False),
        ((0, 0, 1), "c", True),
        ((0, 1, 2), "c", True),
    ],
)
def test_pandalm_takes_most_votes(votes, chosen, tie):
    record = dict(instruction="i", input="x", response1="c", response2="r", cmp_key="m_n")
    record |= {f"annotator{i + 1}": vote for i, vote in enumerate(votes)}
    found = read("pandalm", record)[0]
    assert (found.prompt, found.chosen, found.tie) == ("i\n\nx", chosen, tie)
    assert found.models == (("m", "n") if chosen == "c" else ("n", "m"))


def test_ppe_and_reward_bench():
    record = dict(
        prompt="p", response_1="a", response_2="b", model_a="m", model_b="n", language="English",
        hard_prompt=True, math_prompt=False, winner="model_b",
    )  # fmt: skip
    found = read("ppe_human", record)[0]
    assert found[:3] == ("p", "b", "a") and found.models == ("n", "m") and not found.tie
    assert found.categories == dict(
        language="English", hard_prompt="hard_prompt", math_prompt="not math_prompt"
    )
    assert read("ppe_human", record | dict(winner="tie (bothbad)"))[0].tie
    best = {f"response_{i}": f"answer {i}" for i in range(1, 13)}
    record = best | dict(prompt="p", scores=[False] * 11 + [True], model_name="g", question_id=3)
    found = read("ppe_correctness", record)[0]
    assert found.completions == [f"answer {i}" for i in range(1, 13)]
    assert found.correct == [False] * 11 + [True] and found.categories == {"generator": "g"}

    record = PAIR | dict(subset="hep-cpp", chosen_model="human", rejected_model="m")
    found = read("reward_bench", record)[0]
    assert found.categories == dict(subset="hep-cpp", section="reasoning") and found.models is None
    assert read("reward_bench", record | dict(chosen_model="n"))[0].models == ("n", "m")
    record = dict(prompt="p", chosen=["c"], rejected=["x", "y", "z"], subset="Math")
    wanted = Samples("p", ["c", "x", "y", "z"], [True, False, False, False], {"subset": "Math"})
    assert read("reward_bench_2", record) == [wanted]


def test_lists_of_answers_become_all_their_pairs():
    record = dict(instruction="i", input="", output=["a", "b", "c"], history=[["q", "r"]])
    found = read("ranked", record)
    assert [(one.chosen, one.rejected) for one in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [message["role"] for message in found[0].prompt] == ["user", "assistant", "user"]
    answers = [
        dict(response=answer, overall_score=score, model=model)
        for answer, score, model in (("a", 3, "m"), ("b", 5.0, "n"), ("c", 3, "o"))
    ]
    found = read("ultrafeedback", dict(instruction="i", completions=answers, source="s"))
    assert [(p.chosen, p.rejected, p.tie) for p in found] == [
        ("b", "a", False), ("b", "c", False), ("a", "c", True),
    ]  # fmt: skip
    assert found[0].models == ("n", "m")


def test_samples_are_joined_by_prompt():
    rows = [dict(question=q, solution=s, is_correct=z) for q, s, z in
            [("p", "a", True), ("q", "b", False), ("p", "c", False)]]  # fmt: skip
    found = reward_sets.joined([one for row in rows for one in read("samples", row)])
    assert found == [Samples("p", ["a", "c"], [True, False]), Samples("q", ["b"], [False])]
    many = [Samples("p", ["a", "b"], [True, False]), Samples("p", ["c", "d"], [True, True])]
    assert reward_sets.joined(many) == many  # two generators' samples of one prompt stay apart


def test_step_labels_before_and_behind_the_first_wrong_step():
    record = dict(id="omni-math-7", generator="g", problem="p", steps=["a", "b", "c"], label=1)
    found = read("processbench", record)[0]
    assert (found.labels, found.first_wrong) == ([1.0, 0.0, None], 1)
    assert found.categories == {"generator": "g", "source": "omni-math"}
    right = read("processbench", record | dict(label=-1))[0]
    assert (right.labels, right.first_wrong) == ([1.0] * 3, process_sets.NO_ERROR)
    trace = dict(task="t", input="p", steps=["a", "b"])
    assert read("bigbench_mistake", trace | dict(mistake_index=0))[0].labels == [0.0, None]
    assert read("bigbench_mistake", trace | dict(mistake_index=None))[0].first_wrong == -1


def test_prmbench_in_both_forms():
    record = dict(
        original_question="o", modified_question="q", original_process=["a"],
        modified_process=["a", "b", "c"], error_steps=[2, 3], classification="circular",
    )  # fmt: skip
    found = read("prmbench", record)[0]
    assert (found.prompt, found.labels, found.first_wrong) == ("q", [1.0, 0.0, 0.0], 1)
    cut = dict(question="q", steps=["a", "b", "c"], error_steps=[])
    assert read("prmbench", cut)[0].first_wrong == -1


def test_mr_ben_counts_from_one_and_leaves_out_what_names_no_step():
    record = dict(
        Subject="s", Question="q", Options="A: 1", Model_Solution_Steps=["a", "b"],
        Model_Solution_Correctness="incorrect", Model_Solution_First_Error_Step="2",
    )  # fmt: skip
    found = read("mr_ben", record)[0]
    assert (found.prompt, found.first_wrong) == ("q\nA: 1", 1)
    assert read("mr_ben", record | dict(Model_Solution_First_Error_Step="    else:")) == []
    assert read("mr_ben", record | dict(Model_Solution_Steps="def f():")) == []
    right = record | dict(
        Model_Solution_Correctness="correct", Model_Solution_First_Error_Step="N/A"
    )
    assert read("mr_ben", right)[0].first_wrong == -1


def test_files_of_all_kinds_hold_the_same_records(tmp_path):
    rows = [PAIR | dict(n=i) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        json.dump(rows, file)
    (tmp_path / "b.json").write_text(json.dumps(dict(version=1, data=rows)))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    for name in ("jsonl:a.jsonl", "json:a.json.gz", "json:b.json", "parquet:0.parquet", "parquet:"):
        kind, _, file = name.partition(":")
        source = open_records(f"{kind}:{tmp_path / file}")
        assert [source[i] for i in range(len(source))] == rows
    renamed = open_records(f"parquet:{tmp_path}", options=dict(fields=dict(prompt="chosen")))
    assert renamed[0]["prompt"] == "c"
    assert open_records("inline", options=dict(a=(1, 2)))[1] == {"a": 2}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("json:x.json", None, "no such file"),
        ("json:x.json", '{"a": 1}\n{"a": 2}\n', "for one object a line, name it jsonl:"),
        ("json:x.json", "[1]", "record 0: int; wanted an object"),
        ("json:x.json", '{"a": 1}', "dict; wanted one array"),
        ("json:x.json", "[]", "holds no records"),
        ("parquet:x.parquet", "text", "cannot be read as Parquet"),
        ("parquet:x.parquet", None, "no such file"),
        ("parquet:", "", r"no \*.parquet"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    kind, _, file = name.partition(":")
    if text:
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_records(f"{kind}:{tmp_path / file}")


def test_files_know_their_options(tmp_path):
    with pytest.raises(ValueError, match="json files have no option colour"):
        open_records("json:x", options=dict(colour=1))


# Facts known of real files, from the sets' own papers or counted on them.


@pytest.mark.data
@pytest.mark.parametrize(
    ("form", "file", "count", "ties"),
    [
        ("rm_bench", "rm_bench/pairs", 9 * 454, 0),
        ("judgebench", "judgebench/pairs", 318, 0),
        ("llmbar", "llmbar/pairs", 530, 0),
        ("autoj", "autoj_pairwise/pairs", 836, 234),
        ("pandalm", "pandalm/pairs", 614, 63),
        ("pairs", "hhh_alignment/pairs", 138, 0),
        ("pairs", "ultrafeedback_mini/train", 703, 0),
        ("processbench", "processbench/gsm8k", 218, None),
        ("processbench", "processbench/olympiadbench", 698, None),
        ("prmbench", "prmbench/modified", 3746, None),
        ("prmbench", "prmbench/original", 1065, None),
        ("bigbench_mistake", "bigbench_mistake/traces", 1413, None),
        ("prm800k", "prm800k_sample/trajectories", 189, None),
        ("samples", "math_best_of_n/bon", 71, None),
    ],
)
def test_every_record_of_the_real_files_is_read(data_dir, form, file, count, ties):
    found = items(data_dir, form, file)
    assert len(found) == count
    if ties is not None:
        assert sum(item.tie for item in found) == ties


@pytest.mark.data
def test_the_longer_wins_in_real_sets(data_dir):
    def share(form, file, kept=lambda item: True):
        found = [item for item in items(data_dir, form, file) if kept(item)]
        chosen, rejected = (np.array([len(item[i]) for item in found]) for i in (1, 2))
        floats = chosen.astype(float), rejected.astype(float)
        return pair_lengths(*floats, chosen, rejected).longer_wins

    assert 0.76 <= share("pairs", "ukp_convarg1/test") <= 0.80
    assert 0.52 <= share("pairs", "ultrafeedback_mini/train") <= 0.56

    def of(name):
        return lambda item: item.categories["subset"] == name

    assert share("pairs", "hh_rlhf/train", of("harmless-base")) == pytest.approx(0.44, abs=0.03)
    assert share("pairs", "hh_rlhf/train", of("helpful-base")) == pytest.approx(0.60, abs=0.03)
    for name in ("adv-neighbor", "adv-gptinst", "adv-manual"):
        assert 0.05 <= share("llmbar", "llmbar/pairs", of(name)) <= 0.2
    assert 0.4 <= share("llmbar", "llmbar/pairs", of("adv-gptout")) <= 0.5


@pytest.mark.data
def test_known_accuracies_of_real_solutions(data_dir):
    source = open_records(f"jsonl:{data_dir}/gsm8k/model_solutions.jsonl.gz")
    by_model = {}
    for i in range(len(source)):
        by_model.setdefault(source[i]["model"], []).append(read("samples", source[i])[0].correct[0])
    wanted = {"6b_finetuning": 22.1, "6b_verification": 40.3, "175b_finetuning": 34.1,
              "175b_verification": 56.2}  # fmt: skip
    assert {k: round(100 * np.mean(v), 1) for k, v in by_model.items()} == wanted
    joined = reward_sets.joined(items(data_dir, "samples", "gsm8k/model_solutions"))
    assert len(joined) == 660 and all(len(one.completions) == 4 for one in joined)

    # Best of 8 by the scores of a published reward model, the mean, and any of the 8.
    source = open_records(f"jsonl:{data_dir}/math_best_of_n/bon.jsonl.gz")
    correct = np.array([read("samples", source[i])[0].correct for i in range(71)], float)
    scores = np.array([source[i]["rm_score"] for i in range(71)])
    first, last = best_of_k(scores, correct, [1, 8])
    assert round(100 * first, 1) == 90.5 and round(100 * last, 1) == 94.4
    assert round(100 * best_of_k(correct, correct, [8])[0], 1) == 95.8
