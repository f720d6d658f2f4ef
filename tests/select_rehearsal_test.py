"""Rehearsal sets: embeddings, the best of every cluster, given answers and drawn ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.rehearsal import get_config
from rlhf_jax import build, sections
from rlhf_jax.mesh import make_mesh
from rlhf_jax.models.completions import embed_completions
from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from rlhf_jax.select_rehearsal import check_config, select_rehearsal
from tests.conformance.rewards_test import batch
from tests.roles_test import saved_run

SAID = {  # prompts, and answers of one or seven letters, some of them twice
    "prompt": ("aaaa", "aaab", "aaaa", "zzzz", "zzzy", "zzzz"),
    "completions": (["a", "aaaaaaa"], "aa", ["a"], ["zzz", "zz"], "z", ["z", "zzzzzzzzzzzz"]),
}


@pytest.fixture(name="policy", scope="module")
def policy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    saved_run(folder, named_size("tiny", layers=1, vocab_size=260), make_mesh({"data": -1}))
    return str(folder)


def config_of(policy, *, select, rewards=None, **data):
    """Given answers in bytes, scored by their length."""
    data = dict(name="inline", options=SAID, template="{prompt}", max_prompt=6) | data
    rewards = rewards or dict(size=dict(name="length", per_token=1.0))
    return ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1),
            model=dict(init_from=policy),
            data=dict(**data, overlong="error", tokenizer="byte"),
            rollout=dict(
                prompts=4, samples=1, max_tokens=9, max_draws=1, sampling=dict(temperature=1.0)
            ),
            rewards=rewards,
            select=dict(clusters=2, keep=1) | select,
        )
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_embedding_is_the_mean_state_over_prompt_and_completion():
    config = named_size("tiny", layers=1, vocab_size=260)
    model, rollouts = decoder(config), batch()
    params = jax.jit(model.init)(jax.random.key(0))
    found = jax.jit(lambda r: embed_completions(model, params, {}, r))(rollouts)
    assert found.shape == (8, config.width)
    for row in (0, 5):  # alone and without padding
        prompts = rollouts.prompts
        ids = [
            *prompts.tokens[row // 2][prompts.mask[row // 2]],
            *rollouts.tokens[row][rollouts.mask[row]],
        ]
        tokens = jnp.array([ids])
        there = jnp.ones(tokens.shape, bool)
        apply = jax.jit(lambda p, t, m: model.apply(p, t, jnp.arange(t.shape[1])[None], m, None))
        hidden = apply(params, tokens, there).hidden
        np.testing.assert_allclose(found[row], hidden[0].mean(axis=0), atol=1e-5)


def test_given_answers_the_best_of_each_cluster_is_kept(policy, tmp_path):
    config = config_of(policy, select=dict(completions="completions"))
    sections.check("select_rehearsal", config)
    summary = select_rehearsal(config, str(tmp_path))
    wanted = dict(answers=9, answers_truncated=1, answers_repeated=1, clusters=2, kept=2)
    assert {name: summary[name] for name in wanted} == wanted
    kept = lines(tmp_path / "rehearsal.jsonl")
    both = {("aaaa", "aaaaaaa"), ("zzzz", "zzz")}  # the longest of each letter: score 8 and 4
    assert {(line["prompt"], line["completion"]) for line in kept} == both
    assert {line["score"] for line in kept} == {8.0, 4.0}
    assert {line["cluster"] for line in kept} == {0, 1}
    table = json.loads((tmp_path / "report.json").read_text())["clusters"]
    assert [one["answers"] for one in table] == sorted([4, 3], reverse=True)
    assert "`aaaa`" in (tmp_path / "report.md").read_text()
    # A policy run reads what was written.
    rows = dict(kind="texts", name=f"jsonl:{tmp_path / 'rehearsal.jsonl'}", template="{prompt}")
    section = ConfigDict(rows | dict(max_length=16, rows=2))
    source = build.examples("extra.rehearsal", section, build.tokenizer(config), 0)
    assert len(source) == 2
    assert int(source.batch(0, slice(None), 2).loss_mask.sum()) == 8 + 4  # with end-of-text


@pytest.mark.slow
def test_the_policys_own_answers(policy, tmp_path):
    config = config_of(policy, select=dict(problems=5, clusters=3, keep=2))
    config.rollout.update(samples=4, max_tokens=30)
    summary = select_rehearsal(config, str(tmp_path))
    assert summary["answers"] == 20 and summary["clusters"] == 3
    kept = lines(tmp_path / "rehearsal.jsonl")
    assert len(kept) == summary["kept"] <= 6
    assert {line["cluster"] for line in kept} == {0, 1, 2}  # every cluster contributes
    assert {line["prompt"] for line in kept} <= set(SAID["prompt"])
    assert summary["score_kept"] > summary["score"]


@pytest.mark.parametrize(
    ("select", "rewards", "message"),
    [
        (dict(), None, "select.problems is missing, and the policy draws"),
        (dict(problems=9), None, "select.problems=9 but data has 6"),
        (dict(problems=3, completions="completions"), None, "select.problems=3 beside select.comp"),
        (dict(completions="prmpt"), None, r"select.completions: .*no field 'prmpt'"),
        (
            dict(problems=3),
            {key: dict(name="length", per_token=1.0) for key in "ab"},
            "rewards has a, b; wanted one",
        ),
        (
            dict(problems=3),
            dict(a=dict(name="length", per_token=1.0, weight=1.0)),
            r"rewards\.a\.weight: no such key",
        ),
        (
            dict(problems=3),
            dict(a=dict(name="length", scale=dict(limit=0.3))),
            "rewards.a.scale is of the run that trains",
        ),
    ],
)
def test_what_cannot_be_selected_is_refused(select, rewards, message, policy, tmp_path):
    config = config_of(policy, select=select, rewards=rewards)
    with pytest.raises(ValueError, match=message):
        select_rehearsal(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_cluster_without_a_good_answer_is_reported_and_gives_none(policy, tmp_path):
    config = config_of(policy, select=dict(completions="completions", above=4.0))
    assert select_rehearsal(config, str(tmp_path / "one"))["kept"] == 1
    table = json.loads((tmp_path / "one" / "report.json").read_text())["clusters"]
    assert sorted(one["kept"] for one in table) == [0, 1]
    config.select.above = 99.0
    with pytest.raises(ValueError, match=r"no answer has a score above select.above=99.0"):
        select_rehearsal(config, str(tmp_path / "none"))


def test_more_clusters_than_answers_are_refused(policy, tmp_path):
    config = config_of(policy, select=dict(completions="completions", clusters=8))
    with pytest.raises(ValueError, match=r"select.clusters: 8 clusters of 7 different embeddings"):
        select_rehearsal(config, str(tmp_path))


def test_the_config_selects_by_the_exact_checker():
    config = get_config("small,clusters=4").stages.rehearsal.config
    check_config(config)
    assert config.select.clusters == 4
