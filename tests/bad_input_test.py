"""Bad input: one clear line and exit status 2, at once, with nothing written and nothing compiled.

Every case runs a real program as `program.run` runs it behind the command line: configs and data
here, folders and command lines in `tests/bad_folder_test.py`.
"""

import json
import logging
import pathlib
import re

import jax
import pytest
from ml_collections import ConfigDict

from configs import ppo_tiny, quickstart
from rlhf_jax import build, program
from rlhf_jax.evaluate import evaluate
from rlhf_jax.label_samples import label_samples
from rlhf_jax.mesh import make_mesh
from rlhf_jax.pipeline import pipeline
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.train_policy import train_policy
from rlhf_jax.train_reward import train_reward
from rlhf_jax.train_sft import train_sft
from tests.roles_test import TINY, saved_run

MAINS = {f.__name__: f for f in (train_policy, train_sft, train_reward, label_samples, evaluate)}
STAGES = dict(train_sft="sft", train_reward="reward", label_samples="labels", evaluate="evaluation")
COMPILED = "/jax/core/compile/backend_compile_duration"
PAIR = dict(prompt="1+1=", chosen="2", rejected="3")


@pytest.fixture(name="cache", autouse=True)
def made_once(tmp_path_factory, monkeypatch):
    """Generated problems are made once for all tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "problems"))


@pytest.fixture(name="trained", scope="module")
def trained_run(tmp_path_factory):
    """The folder of a run with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    saved_run(folder, TINY, make_mesh({"data": -1}))
    return folder


def few_problems(tree: ConfigDict) -> ConfigDict:
    """The same with few generated problems: encoding them takes most of a check's time."""
    for key, value in tree.items():
        if key == "options" and "train" in value:
            value.update(train=1_100, test=300)
        elif isinstance(value, ConfigDict):
            few_problems(value)
    return tree


def config_of(name: str, trained: pathlib.Path) -> ConfigDict:
    """A config of a program that can start: small, from `trained` where it starts from a run."""
    pipeline = few_problems(quickstart.get_config("small"))
    if name == "pipeline":
        return pipeline
    if name == "train_policy":
        return ppo_tiny.get_config()
    config = pipeline.stages[STAGES[name]].config
    config.data.tokenizer = f"chars:{ppo_tiny.ALPHABET}"
    if name in ("train_reward", "label_samples"):
        config.model.init_from = str(trained)
    if name == "evaluate":
        for policy in config.policies.values():
            policy.init_from = str(trained)
        config.reward.init_from = ""
    return config


def put(config: ConfigDict, path: str, value) -> None:
    """Sets the key at `path`, whether it is there or not."""
    *sections, key = path.split(".")
    with config.unlocked(), config.ignore_type():
        for section in sections:
            config = config[section]
        if value is KeyError:
            del config[key]
        else:
            config[key] = value


def held() -> int:
    """Elements on devices; the four sampling values of a plan are scalars and do not count."""
    return sum(leaf.size for leaf in jax.live_arrays() if leaf.ndim)


def refused(main, config: ConfigDict, workdir: pathlib.Path, capsys) -> str:
    """The line with which a program ends at once."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event)
    )
    before = held()
    there = sorted(workdir.rglob("*")) if workdir.is_dir() else workdir.exists()
    with pytest.raises(SystemExit) as ended:
        program.run(main, config, str(workdir))
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert COMPILED not in compiled
    assert held() == before
    assert there == (sorted(workdir.rglob("*")) if workdir.is_dir() else workdir.exists())
    return lines[-1].removeprefix("error: ")


UNKNOWN = {
    "train_policy": (
        *("sede", "updates.epoch", "log.evry", "data.templat", "rollout.promts", "train.step"),
        *("checkpoint.kep", "mesh.dta", "model.layer", "value.init", "optimizer.polcy"),
        *("rollout.sampling.topk", "rewards.length.fre", "algorithm.lamb", "optimizer.value.lr"),
        "data.options.max_op",
    ),
    "train_sft": (
        *("moddel", "updates.centre", "log.shwo", "data.tokeniser", "eval.evry", "train.max_skip"),
        *("sources.demonstrations.templte", "optimizer.warm", "model.rematt", "mesh.fdsp"),
    ),
    "train_reward": ("reward.heads", "sources.pairs.chozen", "sources.steps.seed"),
    "label_samples": ("label.problem", "rollout.max_token", "data.max_promt", "model.init"),
    "evaluate": ("policys", "problem", "policies.sft.init", "reward.surces", "data.splt"),
    "pipeline": (
        *("ordr", "stages.policy.cfg", "stages.policy.config.rollout.promts"),
        *("stages.evaluation.config.modess", "stages.reward.config.sources.pairs.templte"),
    ),
}


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name, paths in UNKNOWN.items() for path in paths]
)
def test_an_unknown_key_is_named_with_the_known_ones(name, path, trained, tmp_path, capsys):
    config = config_of(name, trained)
    put(config, path, 1)
    if name == "train_reward":  # its data comes from another stage
        for label in ("pairs", "correctness", "steps"):
            config.sources[label].name = f"jsonl:{tmp_path}/none.jsonl"
    line = refused(MAINS.get(name, pipeline), config, tmp_path / "run", capsys)
    stage, _, rest = path.partition(".config.")
    wanted = f"{stage}.config: {rest}" if rest else path
    if path.startswith("mesh."):
        assert "mesh: mesh has unknown axes" in line and "known: ['data', 'fsdp'" in line
    elif "options" in path:
        assert "data: options: arithmetic has no option max_op" in line and "max_ops" in line
    else:
        assert line.startswith(f"{wanted}: no such key")
        assert "known: " in line


CASES = [
    # a key that is absent, and a value of another type
    ("train_policy", {"rollout.samples": KeyError}, "rollout.samples is missing"),
    ("train_policy", {"rollout.samples": "4"}, "rollout.samples='4' is str; wanted int"),
    ("train_policy", {"updates.microbatches": 0}, "updates.microbatches=0; wanted 1 or more"),
    ("train_policy", {"model.width": "wide"}, "model.width='wide' is str; wanted int"),
    ("train_policy", {"algorithm.kl_coef": "x"}, "algorithm.kl_coef='x' is str; wanted float"),
    ("train_policy", {"rewards": 3}, "rewards=3 is int; wanted a section"),
    ("train_policy", {"algorithm.name": KeyError}, r"algorithm.name is missing; known: .*ppo"),
    ("train_policy", {"rewards.length.weight": KeyError}, "rewards.length.weight is missing"),
    ("train_policy", {"optimizer.value": KeyError}, "optimizer.value is missing"),
    ("train_policy", {"value": KeyError}, "value is missing and ppo trains a value model"),
    ("train_sft", {"sources.demonstrations.rows": KeyError}, "demonstrations.rows is missing"),
    ("train_sft", {"sources.demonstrations.weight": KeyError}, "demonstrations.weight is missing"),
    ("train_sft", {"sources.demonstrations.max_length": KeyError}, "max_length is missing"),
    # an unknown name
    ("train_policy", {"algorithm.name": "ppq"}, r"algorithm.name: 'ppq' .*known: best_of_n, .*ppo"),
    ("train_policy", {"rewards.length.name": "lenght"}, r"rewards.length.name: .*known: .*length"),
    ("train_policy", {"model.name": "huge"}, r"model.name='huge'; known sizes: tiny, small"),
    ("train_policy", {"data.name": "gsm8k"}, "data: data set 'gsm8k' is neither 'arithmetic'"),
    ("train_policy", {"data.tokenizer": "bites"}, "data.tokenizer: tokenizer 'bites' is neither"),
    ("train_sft", {"sources.demonstrations.kind": "text"}, r"kind='text'; .* takes texts"),
    # an algorithm that cannot work
    (
        "train_policy",
        {"algorithm": dict(name="grpo", clip_low=1.5)},
        r"clip_low=1.5; wanted",
    ),
    ("train_policy", {"algorithm": dict(name="rloo", kl_coef=-0.1)}, r"kl_coef=-0.1; wanted 0 or"),
    (
        "train_policy",
        {"algorithm": dict(name="dapo"), "rollout.samples": 1},
        "rollout.samples=1 but dapo needs groups of 2 or more; set rollout.samples",
    ),
    (
        "train_policy",
        {"algorithm": dict(name="grpo", credit="steps"), "rewards.process.weight": 0.0},
        "trains on scores of steps, and none of rewards .* add a process_model",
    ),
    # a watch that cannot work
    ("train_policy", {"monitor": dict(proxy="exact")}, "monitor.every is missing"),
    ("train_policy", {"monitor": dict(proxy="exat", every=1)}, "monitor.proxy='exat'; wanted one"),
    (
        "train_policy",
        {"monitor": dict(proxy="outcome", held_out="process", every=1)},
        r"monitor.held_out='process' has weight 1.0, .* set rewards.process.weight=0.0",
    ),
    (
        "train_policy",
        {"monitor": dict(proxy="outcome", every=1, alarms=dict(kl=9.0))},
        r"monitor.alarms.kl: no such key.*known: .*kl_max",
    ),
    # a group, a batch
    ("train_policy", {"rollout.samples": 1, "algorithm": dict(name="grpo")}, "grpo needs groups"),
    ("train_policy", {"rollout.prompts": 6}, r"holds 3 prompts .* 4 batch shards .* set rollout"),
    ("train_policy", {"rollout.prompts": 7}, "rollout.prompts=7 does not divide into"),
    ("train_policy", {"mesh.data": 3}, "mesh .* does not fit 4 devices"),
    ("train_sft", {"sources.demonstrations.rows": 6}, "demonstrations.rows=6 does not divide"),
    ("label_samples", {"rollout.prompts": 6}, "prompts=6 does not divide over the mesh's 4"),
    # around an algorithm, and the K axis
    (
        "train_policy",
        {"algorithm": dict(name="grpo", correction=dict(how="token_mask", low=3.0))},
        "algorithm.correction: low=3.0 and high=2.0; wanted 0 <= low <= 1 <= high",
    ),
    (
        "train_policy",
        {
            "algorithm": dict(name="grpo", select=dict(how="signal", reward="exat")),
            "rollout.max_draws": 2,
        },
        r"algorithm.select.reward='exat' is none of rewards; did you mean 'exact'",
    ),
    ("train_policy", {"rollout.axis": dict(samples=0)}, "axis.samples=0; wanted 1 or more"),
    (
        "train_policy",
        {"rollout.axis": dict(samples=3, hold="samples")},
        "makes 6 prompts .* wanted a multiple of 8 .* Samples that work: 1, 3; or make",
    ),
    # prompts over the limit, no data
    ("train_policy", {"data.max_prompt": 7}, r"data: .* but max_prompt=7; \d+ of 512 record"),
    ("train_policy", {"data.overlong": "cut"}, "overlong='cut' is not one of error, skip, trunc"),
    ("train_policy", {"data.max_prompt": 2, "data.overlong": "skip"}, "no records are left: 512"),
    # vocabularies
    ("train_policy", {"model.vocab_size": 5}, "20 tokens but model.name='tiny' has room for 5"),
    ("label_samples", {"data.tokenizer": "byte"}, r"258 tokens but model.init_from=.* room for 20"),
    # options of another kind of data set
    ("train_policy", {"data.name": "jsonl:a"}, r"data: options: jsonl .*: set options=dict\(\)"),
    # where models start from
    (
        "train_policy",
        {"model.init_from": "runs/none"},
        "init_from='runs/none' is no local path",
    ),
    ("train_policy", {"rewards.outcome.init_from": "no"}, "rewards.outcome.init_from='no' is not"),
    ("evaluate", {"policies.sft.init_from": "no"}, "^policies.sft.init_from='no' is not a folder"),
    ("evaluate", {"policies.sft.init_from": ""}, "^policies.sft.init_from is empty"),
    # what would be read or needed only after all sampling
    ("evaluate", {"modes": ("smaple",)}, "modes names 'smaple'; did you mean 'sample'"),
    ("evaluate", {"reference": "sfft"}, "reference='sfft'; wanted one of policies .*sft"),
    ("evaluate", {"problems": 1}, "problems=1; wanted 2 or more, .* reference='sft'"),
    ("evaluate", {"problems": 10**6}, r"problems=1000000 but data has \d+"),
    ("evaluate", {"reward.init_from": "no", "reward.sources": {}}, "^reward.init_from: no is not"),
    ("label_samples", {"label.problems": 10**6}, "label.problems=1000000 but data"),
    # stages that a pipeline would reach much later
    ("pipeline", {"order": ("sft", "sft")}, "name every stage to run, once"),
    ("pipeline", {"stages.policy.program": "train_polcy"}, r"policy.program=.*known: .*train_sft"),
    (
        "pipeline",
        {"stages.policy.config.model.init_from": "{workdir}/stf"},
        r"stages.policy.config: model.init_from=.* names 'stf'.*did you mean 'sft'",
    ),
    (
        "pipeline",
        {"stages.policy.config.rewards.outcome.head": "quality"},
        r"stages.policy.config: rewards.outcome reads head 'quality'",
    ),
    ("pipeline", {"stages.policy.config.rollout.prompts": 3}, "stages.policy.config: rollout.prom"),
    ("pipeline", {"stages.evaluation.config.data.max_prompt": 1}, "evaluation.config: data: "),
    (
        "pipeline",
        {"stages.labels.config.label.problems": 10**6},
        r"stages.labels.config: label.problems=1000000 but data has 1100",
    ),
    (
        "pipeline",
        {"stages.evaluation.config.problems": 10**6},
        r"stages.evaluation.config: problems=1000000 but data has 300",
    ),
    ("pipeline", {"stages.evaluation.config.modes": ("smaple",)}, "evaluation.config: modes names"),
    ("pipeline", {"stages.evaluation.config.reference": "sfft"}, "config: reference='sfft'"),
    (
        "pipeline",
        {"stages.evaluation.config.reward.sources.pairs.kind": "texts"},
        "evaluation.config: reward.sources.pairs.kind='texts'; .* takes pairs, correctness, steps",
    ),
    (
        "pipeline",
        {"stages.evaluation.config.policies.sft.init_from": "{workdir}/labels"},
        r"config: policies.sft.init_from: \{workdir\}/labels .* it holds no model",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), CASES)
def test_what_cannot_work_is_named(name, changes, message, trained, tmp_path, capsys):
    config = config_of(name, trained)
    for path, value in changes.items():
        put(config, path, value)
    line = refused(MAINS.get(name, pipeline), config, tmp_path / "run", capsys)
    assert re.search(message, line), line


def jsonl(path: pathlib.Path, *lines) -> str:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return f"jsonl:{path}"


FILES = [
    ((PAIR, '{"prompt": '), "a.jsonl, line 2: not JSON"),
    ((PAIR, [1]), "a.jsonl, line 2: list where an object is wanted"),
    ((PAIR, "", dict(prompt="", chosen="2")), "line 3: no field rejected; the record has prom"),
    ((PAIR, dict(chosen="2", rejected="3")), "line 2: template .* names field 'prompt', the"),
    ((PAIR, PAIR | dict(chosen=2)), "line 2: field 'chosen' holds int where text is wanted"),
    ((PAIR, PAIR | dict(prompt="1" * 60)), r"line 2 has \d+ tokens but max_length=\d+; 1 of 2"),
    ((PAIR, PAIR | dict(prompt="abc")), r"line 2: characters \['a', 'b', 'c'\]"),
    (("",), "a.jsonl holds no records"),
]


def keep_pairs(config):
    """Leaves the config one source, and the card what it says of that one."""
    config.sources = dict(pairs=config.sources.pairs.to_dict())
    config.card.sources = dict(pairs=config.card.sources.pairs.to_dict())


@pytest.mark.parametrize(("lines", "message"), FILES)
def test_a_broken_file_is_named_with_its_line(lines, message, trained, tmp_path, capsys):
    config = config_of("train_reward", trained)
    keep_pairs(config)
    config.sources.pairs.name = jsonl(tmp_path / "a.jsonl", *lines)
    line = refused(train_reward, config, tmp_path / "run", capsys)
    assert line.startswith("sources.pairs: ") and re.search(message, line), line


@pytest.mark.parametrize("part", ["sources", "eval.sources"])
def test_a_head_that_the_model_lacks_is_named(part, trained, tmp_path, capsys):
    config = config_of("train_reward", trained)
    with config.unlocked():
        config.eval.sources = dict(pairs=config.sources.pairs.to_dict())
        config[part].pairs.head = "of_group"
    line = refused(train_reward, config, tmp_path / "run", capsys)
    wanted = f"{part}.pairs.head='of_group'; reward.score_heads has outcome, process"
    assert line == wanted


def test_a_zipped_file_that_is_cut_short_is_named(trained, tmp_path, capsys):
    config = config_of("train_reward", trained)
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00\x00")
    keep_pairs(config)
    config.sources.pairs.name = f"jsonl:{tmp_path}/a.jsonl.gz"
    line = refused(train_reward, config, tmp_path / "run", capsys)
    assert "a.jsonl.gz, after line 0: cannot be read" in line


@pytest.mark.parametrize("kind", ["prompts", "texts", "pairs", "correctness", "steps"])
def test_every_door_counts_what_is_too_long(kind, tmp_path, caplog):
    """Of three records one is too long: an error, left out, or cut; and it is said how many."""
    text, lines = load_tokenizer(f"chars:{ppo_tiny.ALPHABET}"), []
    for count in (1, 40, 2):
        row = PAIR | dict(prompt="1" * count, completion="2", label=1.0, steps=["2"], labels=[1.0])
        lines.append(row)
    section = dict(name=jsonl(tmp_path / "a.jsonl", *lines), template="{prompt}", split="train")

    def door(overlong):
        if kind == "prompts":
            data = ConfigDict(dict(data=section | dict(max_prompt=9, overlong=overlong), seed=0))
            return build.prompts(data, text)
        own = section | dict(kind=kind, max_length=9, overlong=overlong, rows=1, weight=1.0)
        return build.examples("sources.a", ConfigDict(own), text, 0)

    with pytest.raises(ValueError, match=r"a.jsonl, line 2 has 4\d tokens but max_.*; 1 of 3 rec"):
        door("error")
    # Where the prompt fills the row, nothing is left to judge.
    cut = 3 if kind in ("prompts", "texts") else 2
    for overlong, kept, said in (("skip", 2, "skipped"), ("truncate", cut, "truncated")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = door(overlong)
        assert (len(source), source.num_overlong) == (kept, 1)
        assert f"{said} 1 of 3 records over max_" in caplog.text and "line 2" in caplog.text
        source.batch(0, slice(0, 3), 3)
