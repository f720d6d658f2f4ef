"""Step labels from continuations, on a run of random weights that writes words of two letters."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax.continuations import Prefix, choose_widths, plan_batches, whole
from rlhf_jax.data.sources import JsonlSource
from rlhf_jax.data.steps import step_labels
from rlhf_jax.label_steps import check_config, label_steps, prefixes_of, read_solutions
from rlhf_jax.mesh import make_mesh
from rlhf_jax.parts import open_parts, through_parts
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.rehearse import rehearse
from rlhf_jax.step_solutions import Problem, Solution, cut, read_solution
from rlhf_jax.text.steps import token_tables
from rlhf_jax.text.tokenizer import CharTokenizer
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.types import Prompts
from tests.model_folders import read, run_of, write
from tests.rewards.examples import TOKENIZER, spell
from tests.roles_test import TINY

TEXT = CharTokenizer("ab \n")
TABLES = token_tables(TEXT)
PROMPTS = tuple(
    "".join(letters) for n in (1, 2, 3) for letters in itertools.product("ab", repeat=n)
)
N = 5  # solutions of a problem, and continuations of a prefix: one program draws both
RULE = dict(name="keywords", words=("a", "b"), limit=1)  # is "a" or "b" written as a word?
EOS = TEXT.eos_ids[0]


@pytest.fixture(name="policy", scope="module")
def policy_folder(tmp_path_factory):
    """The folder of a run with random weights."""
    config = dataclasses.replace(TINY, vocab_size=TEXT.vocab_size)
    mesh = make_mesh({"data": -1})
    return run_of(tmp_path_factory.mktemp("policy"), config, mesh, "chars:ab \n")[0]


def config_of(policy, **label):
    """Solutions that the policy draws for inline prompts, and continuations of each prefix."""
    data = dict(
        name="inline",
        split="train",
        options=dict(prompt=PROMPTS),
        template="{prompt}",
        max_prompt=15,
        overlong="error",
        tokenizer="chars:ab \n",
    )
    rollout = dict(prompts=4, samples=N, max_tokens=12, max_draws=1, sampling=dict(temperature=4.0))
    if "solutions" not in label:
        label = dict(solutions="policy", problems=14, draws=N) | label
    return ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1),
            model=dict(init_from=policy),
            data=data,
            rollout=rollout,
            label=dict(held_out=0.25, reward=RULE, every=1) | label,
        )
    )


@pytest.fixture(name="run", scope="module")
def whole_run(policy, tmp_path_factory):
    """The config, folder and summary of a run that was not disturbed."""
    config, folder = config_of(policy), tmp_path_factory.mktemp("labels")
    return config, folder, label_steps(config, str(folder))


def both(folder):
    return {name: read(folder / f"{name}.jsonl") for name in ("steps", "held_out_steps")}


def parts_of(folder, kind):
    paths = sorted((folder / "parts").glob(f"{kind}-*.jsonl"))
    return [line for path in paths for line in read(path)]


def by_rule(text):
    return bool({"a", "b"} & set(text.split()))


def test_labels_follow_from_outcomes_and_verdicts(run):
    _, folder, summary = run
    drawn = {line["index"]: line for line in parts_of(folder, "solutions")}
    assert sorted(drawn) == list(range(14 * N))
    outcomes = {(o["solution"], o["step"]): o["right"] for o in parts_of(folder, "outcomes")}
    assert all(len(right) == N for right in outcomes.values())
    rows = list(itertools.chain(*both(folder).values()))
    assert len({row["solution"] for row in rows}) == len(rows) > 6
    asked = set()
    for row in rows:
        one, last = drawn[row["solution"]], len(row["steps"]) - 1
        text = TEXT.decode(one["tokens"])
        assert row["steps"] == [line.strip() for line in text.split("\n") if line.strip()]
        assert (row["samples"], row["seed"]) == (N, 0)
        for step, (hard, soft) in enumerate(zip(row["labels"], row["soft_labels"], strict=True)):
            if step < last:
                right = outcomes[row["solution"], step]
                asked.add((row["solution"], step))
                assert (hard, soft) == (float(any(right)), pytest.approx(sum(right) / N))
            else:  # the solution's own verdict, or nothing where it was cut off
                assert hard == soft == (float(by_rule(text)) if one["ended"] else None)
    assert asked == set(outcomes)
    assert {len(row["steps"]) for row in rows} >= {1, 2}
    assert {label for row in rows for label in row["labels"]} == {0.0, 1.0, None}
    assert summary["prefixes"] == len(outcomes) and summary["continuations"] == N * len(outcomes)
    dropped = sum(number for name, number in summary.items() if name.startswith("dropped/"))
    assert summary["rows/steps"] + summary["rows/held_out_steps"] + dropped == 14 * N


def test_a_share_of_the_problems_is_held_out_whole(run):
    drawn = sorted(parts_of(run[1], "solutions"), key=lambda line: line["index"])
    order = dict.fromkeys(TEXT.decode(line["problem"][2]) for line in drawn)
    first = set(list(order)[: round(0.25 * 14)])
    found = {name: {row["prompt"] for row in rows} for name, rows in both(run[1]).items()}
    assert found["held_out_steps"] and found["held_out_steps"] <= first
    assert found["steps"] and not found["steps"] & first


def test_rates_are_written_and_nothing_is_compiled_once_warm(run):
    _, folder, summary = run
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["compiles_after_warmup"] == 0 and summary["widths"] == 1
    for what in ("continuations", "tokens"):
        assert summary[f"{what}_per_second"] > 0 and summary[f"warm/{what}_per_second"] > 0
    assert summary["tokens"] == sum(line["tokens"] for line in parts_of(folder, "outcomes"))


def test_outcomes_are_those_of_the_prefix_drawn_alone_and_judged_by_hand(run):
    config, folder, _ = run
    sampler = PolicySampler(config, Purpose.EVALUATE)
    drawn = {line["index"]: line for line in parts_of(folder, "solutions")}
    for outcome in parts_of(folder, "outcomes")[:3]:
        one = drawn[outcome["solution"]]
        _, ends = cut(one["tokens"], TEXT.decode(one["tokens"]), None, TABLES)
        given = one["tokens"][: ends[outcome["step"]]]
        row = one["problem"][2] + given
        assert TEXT.decode(given).endswith("\n")
        prompts = Prompts(  # the same prefix four times, in a batch of its own
            tokens=np.tile([[TEXT.pad_id] * (15 - len(row)) + row], (4, 1)).astype(np.int32),
            mask=np.tile([np.arange(15) >= 15 - len(row)], (4, 1)),
            record=np.full(4, outcome["solution"], np.int32),
            source=np.zeros(4, np.int32),
            draw=np.full(4, outcome["step"], np.int32),
        )
        rollouts = sampler.complete(sampler.place(prompts), step_key(0, Purpose.CONTINUE, 0))
        groups = [rows[:N] for rows in (rollouts.tokens, rollouts.mask, rollouts.truncated)]
        tokens, mask, truncated = map(np.asarray, groups)
        rows = zip(tokens, mask, ~truncated, strict=True)
        wanted = [ended and by_rule(TEXT.decode(given + t[m].tolist())) for t, m, ended in rows]
        assert outcome["right"] == [int(right) for right in wanted]
        assert outcome["tokens"] == mask.sum()


def test_a_run_that_was_killed_goes_on_with_its_parts_and_ends_alike(run, tmp_path):
    config, done, summary = run
    folder = tmp_path / "killed"
    shutil.copytree(done, folder)
    outcomes = sorted((folder / "parts").glob("outcomes-*.jsonl"))
    assert len(outcomes) > 2
    kept = outcomes[0]
    lost = [*outcomes[1:], sorted((folder / "parts").glob("solutions-*.jsonl"))[-1]]
    for path in (*lost, *folder.glob("*steps.jsonl"), folder / "summary.json"):
        path.unlink()
    outcomes[1].with_name(f"{outcomes[1].name}.tmp").write_text('{"solution": 3, "st')
    before = kept.stat().st_mtime_ns
    resumed = label_steps(config, str(folder))
    assert both(folder) == both(done)
    assert kept.stat().st_mtime_ns == before
    assert all(path.read_bytes() == (done / "parts" / path.name).read_bytes() for path in lost)
    assert resumed["continuations_before"] == N * len(read(kept))
    assert resumed["continuations"] == summary["continuations"]


# Solutions that are there already. Widths of 16 and 40 tokens.
LONG = "ab ab ab ab ab"
LINES = [
    {"prompt": "a", "steps": ["ab ab", " ", "ba\nab", "a"]},
    {"prompt": "ab", "completion": "ab\n\nab ab\nbb\n"},
    {"prompt": "a", "completion": "ab\nab ab ab", "truncated": True},
    {"prompt": "b", "completion": f"{LONG}\n{LONG}\nb"},
    {"prompt": "ba", "completion": " \n"},
    {"prompt": "bb", "completion": "ab ab", "truncated": True},
]


def of_lines(policy, tmp_path, lines, **changes):
    config = config_of(policy, solutions=f"jsonl:{write(tmp_path / 'in.jsonl', lines)}")
    config.label.held_out = 0.0
    config.data.update(dict(max_prompt=40) | changes)
    return config


@pytest.fixture(name="filed", scope="module")
def filed_run(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("filed")
    config = of_lines(policy, folder, LINES, max_prompt=20, overlong="skip")
    return folder / "run", label_steps(config, str(folder / "run"))


def test_solutions_of_a_file_with_all_that_may_be_wrong_with_them(filed):
    folder, summary = filed
    rows = {row["solution"]: row for row in read(folder / "steps.jsonl")}
    assert sorted(rows) == [0, 1, 2, 3]
    assert rows[0]["steps"] == ["ab ab", "ba\nab", "a"] and rows[0]["labels"][2] == 1.0
    assert rows[1]["steps"] == ["ab", "ab ab", "bb"] and rows[1]["labels"][2] == 0.0
    assert rows[2]["labels"][1] is None and rows[2]["labels"][0] in (0.0, 1.0)
    # 1 + 15 tokens fit, 1 + 30 do not; the last step needs no continuation.
    assert rows[3]["labels"][1:] == [None, 1.0] and rows[3]["labels"][0] in (0.0, 1.0)
    assert (summary["dropped/empty"], summary["dropped/unlabelled"]) == (1, 1)
    assert (summary["prefixes"], summary["prefixes_overlong"]) == (6, 1)
    given = {(line["solution"], line["step"]) for line in parts_of(folder, "outcomes")}
    assert given == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)}


def test_a_process_model_trains_on_hard_or_soft_labels(filed):
    folder, _ = filed
    found = {}
    for field in ("labels", "soft_labels"):
        source = step_labels(
            [JsonlSource(folder / "steps.jsonl")], TEXT, template="{prompt}", max_length=40,
            seed=0, shuffle=False, labels=field,
        )  # fmt: skip
        found[field] = source.batch(0, slice(0, 4), 4)
        assert found[field].step_ends.sum() == 3 + 3 + 1 + 2
    hard, soft = (np.asarray(found[field].labels) for field in ("labels", "soft_labels"))
    np.testing.assert_array_equal(hard > 0, soft > 0)
    assert set(np.unique(hard)) == {0.0, 1.0} and (soft <= hard).all()


def test_other_solutions_do_not_go_on_with_the_parts_of_the_first(filed, policy, tmp_path):
    folder, _ = filed
    shutil.copytree(folder.parent, tmp_path / "copy")
    path = folder.parent / "in.jsonl"
    config = of_lines(policy, folder.parent, LINES[:2], max_prompt=20, overlong="skip")
    try:
        with pytest.raises(ValueError, match=r"work on other solutions.*new workdir"):
            label_steps(config, str(folder))
    finally:
        shutil.copy(tmp_path / "copy" / "in.jsonl", path)


def test_weights_trained_anew_do_not_go_on_with_the_parts_of_the_first(filed, policy, monkeypatch):
    folder, _ = filed
    config = of_lines(policy, folder.parent, LINES, max_prompt=20, overlong="skip")
    digest = PolicySampler.digest
    monkeypatch.setattr(PolicySampler, "digest", lambda sampler: digest(sampler)[::-1])
    with pytest.raises(ValueError, match=r"by another policy.*new workdir"):
        label_steps(config, str(folder))


def test_records_of_the_data_may_hold_their_solutions(policy, tmp_path):
    lines = [{"q": "ab", "steps": ["a", "b"]}, {"q": "b", "solution": "a\nb\na"}] * 2
    config = config_of(policy, solutions="data", problems=2)
    config.data.update(name=f"jsonl:{write(tmp_path / 'in.jsonl', lines)}", template="{q}")
    del config.data["options"]
    found = read_solutions(config, PolicySampler(config, Purpose.EVALUATE))
    assert found.problems == 2 and len({one.index for one in found.solutions}) == 4
    solved = {(TEXT.decode(one.problem.prompt), "/".join(one.steps)) for one in found.solutions}
    assert solved == {("ab", "a/b"), ("b", "a/b/a")}
    assert sorted(one.length for one in prefixes_of(found)) == [3, 3, 4, 4, 5, 5]
    config.label.problems = 3
    with pytest.raises(ValueError, match=r"label.problems=3 but data has solutions of 2"):
        read_solutions(config, PolicySampler(config, Purpose.EVALUATE))


BAD_LINES = {
    "another prompt": ([{"prompt": "abab", "completion": "a"}], r"line 1.*'abab' is not among"),
    "no prompt": ([{"completion": "a"}], "line 1: .*prompt"),
    "no solution": ([{"prompt": "a"}], "line 1: .*completion"),
    "steps that are text": ([{"prompt": "a", "steps": "a\nb"}], "line 1: steps hold 'a.*list"),
    "steps of numbers": ([{"prompt": "a", "steps": [1]}], r"line 1: steps hold \[1\]"),
    "a strange flag": (
        [{"prompt": "a", "completion": "a", "truncated": 1}], "line 1: field 'truncated' holds 1"
    ),
    "nothing visible": ([{"prompt": "a", "steps": [" "]}], "no solution is left.*1 empty"),
    "an overlong prefix": (
        [LINES[3]], r"solution 0, step 2: .* 31 tokens but data.max_prompt=20; 1 prefixes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_refused_before_anything_is_written(case, policy, tmp_path):
    lines, message = BAD_LINES[case]
    config = of_lines(policy, tmp_path, lines, max_prompt=20)
    with pytest.raises(ValueError, match=message):
        label_steps(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


BAD_LABELS = {
    "solutions=people": (dict(solutions="people"), "wanted 'policy', 'data' or 'jsonl:PATH'"),
    "no draws": (dict(solutions="policy", problems=2), "label.draws is missing"),
    "draws of a file": (dict(solutions="data", draws=2), "label.draws=2 but"),
    "held_out=1": (dict(held_out=1.0), "label.held_out=1.0; wanted a share below 1"),
    "a learned reward": (dict(reward=dict(name="outcome_model")), "is a learned reward"),
    "an unknown key": (dict(reward=dict(name="exact_match", anser="x")), "anser: no such key"),
    "too many problems": (dict(problems=15), "label.problems=15 but data has 14"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_configs_are_refused(case, policy, tmp_path):
    changes, message = BAD_LABELS[case]
    with pytest.raises(ValueError, match=message):
        label_steps(config_of(policy, **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_equal_continuations_and_too_little_room_are_refused(policy, tmp_path):
    greedy = config_of(policy)
    greedy.rollout.sampling.temperature = 0.0
    with pytest.raises(ValueError, match="draws the same 5 times"):
        check_config(greedy)
    narrow = config_of(policy)
    narrow.data.max_prompt = 14
    with pytest.raises(ValueError, match=r"data.max_prompt=14.*3 \+ rollout.max_tokens=12"):
        label_steps(narrow, str(tmp_path / "run"))


def test_a_pipeline_plans_the_stage_and_its_file(policy, tmp_path):
    def plan(config):
        stage = ConfigDict(dict(program="label_steps", config=config))
        rehearse([("labels", stage)], str(tmp_path), [])

    plan(config_of(policy))
    with pytest.raises(ValueError, match=r"stages.labels.config: label.solutions: .*no such file"):
        plan(config_of(policy, solutions=f"jsonl:{tmp_path}/absent.jsonl"))
    with pytest.raises(ValueError, match=r"stages.labels.config.*label.problems=15"):
        plan(config_of(policy, problems=15))


# Parts of the work, without a model.


def solution(lengths, prompt=1, index=0):
    """A solution whose steps end after so many tokens."""
    tokens = list(range(2, 2 + lengths[-1]))
    steps = ["x"] * len(lengths)
    return Solution(index, 0, Problem(0, 0, [1] * prompt), tokens, True, steps, list(lengths))


def test_widths_waste_least():
    rng = np.random.default_rng(0)
    for most in (1, 2, 3):
        lengths = rng.integers(1, 100, 30).tolist()
        known = sorted({min(w, 96) for w in (16, 32, 48, 64, 96) if any(n <= w for n in lengths)})

        def tokens(widths):
            return sum(next(w for w in widths if w >= min(n, 96)) for n in lengths)  # noqa: B023

        choices = [c for r in range(1, most + 1) for c in itertools.combinations(known, r)]
        best = min(tokens(c) for c in choices if c[-1] == 96)
        found = choose_widths(lengths, 96, most)
        assert len(found) <= most and found == sorted(found) and tokens(found) == best
    assert choose_widths([], 96, 3) == []
    assert choose_widths([3, 5], 10, 3) == [10]


def test_batches_hold_every_prefix_once_and_the_widest_come_first():
    solutions = [solution([3, 20, 40, 90], index=i) for i in range(3)]
    prefixes = [Prefix(one, step) for one in solutions for step in range(3)]
    batches = plan_batches(prefixes, rows=2, limit=100, most=2)
    assert [batch.width for batch in batches] == [48, 48, 48, 16, 16]
    assert sorted(one for batch in batches for one in batch.prefixes) == sorted(prefixes)
    assert all(one.length <= batch.width for batch in batches for one in batch.prefixes)
    cut_off = plan_batches(prefixes, rows=9, limit=32, most=1)
    assert [(batch.width, len(batch.prefixes)) for batch in cut_off] == [(32, 9)]


def test_a_prefix_and_its_continuations_are_one_completion():
    drawn = spell(["q", "rr"], ["c", "dd", "", "eee"], group=2)
    rows = [TOKENIZER.encode(text) for text in ("xy\n", "z\n")]
    given, mask = np.zeros((2, 4), np.int32), np.zeros((2, 4), bool)
    for i, row in enumerate(rows):
        given[i, : len(row)], mask[i, : len(row)] = row, True
    found = jax.jit(whole)(drawn.prompts, given, mask, drawn, token_tables(TOKENIZER))
    tokens, seen = np.asarray(found.tokens), np.asarray(found.mask)
    assert tokens.shape == (4, 8) and found.group_size == 2
    texts = [TOKENIZER.decode(row[held]) for row, held in zip(tokens, seen, strict=True)]
    assert texts == ["xy\nc", "xy\ndd", "z\n", "z\neee"]
    ends = [np.flatnonzero(row).tolist() for row in np.asarray(found.step_ends)]
    assert ends == [[2, 4], [2, 5], [2], [1, 5]]
    assert (tokens[~seen] == TOKENIZER.pad_id).all()


def test_steps_of_several_lines_end_with_their_last_line():
    tokens, ended, steps, ends = read_solution({"steps": ["ab\nb", "", "a"]}, TEXT, TABLES)
    assert (TEXT.decode(tokens), ended, steps) == ("ab\nb\na", True, ["ab\nb", "a"])
    assert ends == [5, 7] and tokens[-1] == EOS
    tokens, ended, steps, ends = read_solution(
        {"solution": "ab\na", "truncated": True}, TEXT, TABLES
    )
    assert (ended, steps, ends, len(tokens)) == (False, ["ab", "a"], [3, 4], 4)


def test_tokens_that_do_not_tell_steps_apart_give_no_steps():
    tokens = TEXT.encode("a\nb")
    assert cut(tokens, "a\nb", None, TABLES) == (["a", "b"], [2, 3])
    blind = dataclasses.replace(TABLES, ends_step=np.zeros_like(TABLES.ends_step))
    assert cut(tokens, "a\nb", None, blind) == ([], [])


def test_parts_are_done_once_in_order(tmp_path):
    calls = []

    def work(ready):
        calls.append(ready)
        yield from ([{"part": n}] for n in range(ready, 3))

    parts = open_parts(tmp_path, "one")
    interrupted = through_parts(parts, "x", work)
    assert [next(interrupted), next(interrupted)] == [(True, [{"part": n}]) for n in (0, 1)]
    again = list(through_parts(open_parts(tmp_path, "one"), "x", work))
    assert again == [(False, [{"part": 0}]), (False, [{"part": 1}]), (True, [{"part": 2}])]
    assert calls == [0, 2]
    with pytest.raises(ValueError, match="other solutions"):
        open_parts(tmp_path, "two")
