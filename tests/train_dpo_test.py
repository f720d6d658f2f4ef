"""The program train_dpo: whole runs, full and with adapters, resume, and bad input."""

import json
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import ppo_tiny
from rlhf_jax import fit, roles, train_dpo
from rlhf_jax.mesh import make_mesh
from rlhf_jax.rehearse import rehearse
from tests.bad_input_test import jsonl, made_once, put, refused, trained_run  # noqa: F401
from tests.roles_test import RULES

LABELLED = [
    dict(prompt=f"{i}+1=", completion=str(i + right), label=right)
    for i in range(4)
    for right in (0, 1)
]
PAIRS = [dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(i)) for i in range(8)]


@pytest.fixture(name="data")
def pairs_file(tmp_path):
    return jsonl(tmp_path / "pairs.jsonl", *PAIRS)


def config_of(start, data, **changes):
    """Four steps on eight pairs, from `start`."""
    rows = dict(kind="pairs", name=data, template="{prompt}", max_length=8)
    config = ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1),
            model=dict(init_from=str(start)),
            data=dict(tokenizer=f"chars:{ppo_tiny.ALPHABET}"),
            sources=dict(pairs=dict(**rows, rows=4, weight=1.0)),
            dpo=dict(beta=0.2),
            optimizer=dict(learning_rate=1e-3, schedule="constant", warmup=0),
            updates=dict(microbatches=1),
            train=dict(steps=4, max_skipped=1),
            eval=dict(every=100, sources=dict(held_out=dict(**rows, rows=4))),
            checkpoint=dict(every=2, keep=2),
            log=dict(every=1),
        )
    )
    for path, value in changes.items():
        put(config, path.replace("__", "."), value)
    return config


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def test_a_run_learns_stops_and_goes_on_as_if_it_had_not(trained, data, tmp_path):
    """On pairs, and on answers that are right or wrong."""
    config = config_of(trained, data)
    labels = dict(config.sources.pairs, kind="correctness")
    labels["name"] = jsonl(tmp_path / "labelled.jsonl", *LABELLED)
    config.sources.labels = labels
    config.eval.sources.labels = {k: v for k, v in labels.items() if k != "weight"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    last = train_dpo.train_dpo(config, str(whole))
    for steps in (2, 4):
        config.train.steps = steps
        again = train_dpo.train_dpo(config, str(parts))
    assert same(last.train.params, again.train.params)
    assert same(last.train.opt_state, again.train.opt_state)
    assert lines(whole)[2:] == lines(parts)[-2:]
    start = np.log(np.float32(2))
    assert np.float32(lines(whole)[0]["loss/pairs"]) == start
    assert np.float32(lines(whole)[0]["loss/labels"]) == start
    final = lines(whole)[-1]
    assert final["eval/loss/labels"] < start
    assert final["eval/labels/reward_right"] > final["eval/labels/reward_wrong"]
    assert final["eval/loss/held_out"] < start and final["eval/held_out/reward_margin"] > 0

    mesh = make_mesh({"data": -1})
    with jax.set_mesh(mesh):
        before, policy = (roles.load(str(x), mesh, RULES) for x in (trained, whole))
    # What it was is held as it was; what it became is a policy like any other.
    assert same(last.reference, before) and same(policy, last.train.params["policy"])
    assert not same(policy, before)


def test_adapters_need_no_second_copy_of_the_model(trained, data):
    planned = fit.open_sources(train_dpo.check(config_of(trained, data, model__lora_rank=2)))
    with jax.set_mesh(planned.mesh):
        state = fit.create(planned)
        before = roles.load(str(trained), planned.mesh, planned.rules)
    still = fit.frozen(planned, state)
    ours, theirs = (jax.tree.leaves(still[name]) for name in ("policy", "reference"))
    assert all(a is b for a, b in zip(ours, theirs, strict=True))
    assert same(still["reference"], before)
    trains = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.train.params)}
    assert trains == {"lora_a", "lora_b"}


BAD = [
    (dict(dpo__beta=0.0), "dpo: beta=0.0; wanted more than 0"),
    (dict(dpo__loss="sigmod"), "dpo: loss='sigmod'; known: sigmoid, "),
    (dict(dpo__betta=0.1), "dpo.betta: no such key; known: beta, "),
    (dict(dpo=KeyError), "dpo is missing"),
    (dict(reward=dict(score_heads=("outcome",))), "reward: no such key"),
    (dict(model__score_heads=("outcome",)), "model.score_heads=.'outcome',.: DPO compares"),
    (dict(sources__pairs__head="outcome"), "sources.pairs.head='outcome', but a policy has no"),
    (dict(sources__pairs__kind="steps"), "sources.pairs.kind='steps'; this program takes pairs"),
    (
        dict(sources__pairs__kind="correctness", dpo__loss="ipo"),
        "dpo.loss='ipo', but source pairs is of kind 'correctness'",
    ),
    (
        dict(sources__pairs__kind="correctness", dpo__nll_coef=1.0),
        "dpo.nll_coef=1.0 is of pairs, and no source is of kind 'pairs'",
    ),
    (dict(sources__pairs__kind="texts"), "sources pairs hold texts alone; wanted one of kind"),
    (dict(sources__pairs__rows=6), "sources.pairs.rows=6 does not divide"),
    (dict(sources__pairs__chosen=("good",)), "sources.pairs: .*pairs.jsonl, line 1: .*good"),
    (dict(sources__pairs__max_length=4), "sources.pairs: .*max_length=4"),
    (dict(updates__smoothing=0.1), "updates.smoothing: no such key"),
    (dict(model__init_from="no"), "model.init_from='no'"),
]


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_bad_input_is_named_before_a_device_is_touched(
    changes, said, trained, data, tmp_path, capsys
):
    config = config_of(trained, data, **changes)
    line = refused(train_dpo.train_dpo, config, tmp_path / "run", capsys)
    assert re.search(said, line), line


def test_a_pipeline_sees_mistakes_in_its_dpo_stages_first(trained, data, tmp_path):
    def rehearsed(**changes):
        one, two = config_of(trained, data), config_of("{workdir}/one", data, **changes)
        stages = dict(one=one, two=two).items()
        stages = [(name, ConfigDict(dict(program="train_dpo", config=c))) for name, c in stages]
        rehearse(stages, str(tmp_path), ())

    rehearsed()
    with pytest.raises(ValueError, match=r"stages.two.config: dpo: beta=-1.0; wanted more"):
        rehearsed(dpo__beta=-1.0)
    with pytest.raises(ValueError, match=r"stages.two.config: sources.pairs.rows=6 does not"):
        rehearsed(sources__pairs__rows=6)
