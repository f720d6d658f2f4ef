"""Wrappers of the config's algorithm section: put around it, or refused when it is built."""

import pytest

from configs.ppo_tiny import get_config
from rlhf_jax import build
from rlhf_jax.algorithms.grpo import grpo


def config_with(**algorithm):
    config = get_config()
    config.algorithm = dict(name="grpo", kl_coef=0.0) | algorithm
    config.rollout.max_draws = 3 if "select" in algorithm else 1
    return config


def test_without_wrappers_the_algorithm_is_the_functions_own():
    own = grpo(kl_coef=0.0)
    for wrappers in ({}, dict(omit_truncated=False)):
        plain = build.algorithm(config_with(**wrappers))
        assert plain.select is None
        assert plain.targets.__qualname__ == own.targets.__qualname__
        assert plain.loss.__qualname__ == own.loss.__qualname__


@pytest.mark.parametrize(
    ("wrappers", "outermost"),
    [
        (dict(correction=dict(how="tis")), "correction."),
        (dict(correction=dict(how="token_mask", low=0.2, high=5.0)), "correction."),
        (dict(omit_truncated=True, correction=dict(how="tis")), "omit_truncated."),
        (dict(select=dict(how="signal"), omit_truncated=True), "select."),
        (dict(select=dict(how="range", reward="exact", low=0.2, high=0.8)), "select."),
        (dict(imitate=dict(reward="exact", above=0.5, weight=0.1)), "group_relative."),
    ],
)
def test_wrappers_are_put_around_in_one_order(wrappers, outermost):
    made = build.algorithm(config_with(**wrappers))
    assert made.targets.__qualname__.startswith(outermost)
    assert made.loss.__qualname__.startswith("imitate.") == ("imitate" in wrappers)
    assert (made.select is not None) == ("select" in wrappers)
    assert made.needs == build.algorithm(config_with()).needs


@pytest.mark.parametrize(
    ("wrappers", "message"),
    [
        (dict(corection=dict(how="tis")), r"algorithm.corection: no such key; did you mean 'corr"),
        (dict(correction=dict(high=2.0)), "algorithm.correction.how is missing"),
        (dict(correction=dict(how="tis", cap=2.0)), "algorithm.correction.cap: no such key"),
        (dict(correction=dict(how="tis", high="2")), "algorithm.correction.high='2' is str"),
        (dict(correction=dict(how="icepop")), "algorithm.correction: how='icepop' is unknown"),
        (dict(correction=dict(how="tis", low=0.5)), "algorithm.correction: low=0.5, but tis"),
        (
            dict(correction=dict(how="token_mask", low=-1.0)),
            r"algorithm.correction: low=-1.0 and high=2.0; wanted 0 <= low",
        ),
        (
            dict(correction=dict(how="sequence_mask", low=3.0, high=2.0)),
            r"algorithm.correction: low=3.0 and high=2.0",
        ),
        (dict(omit_truncated=1), "algorithm.omit_truncated=1 is int; wanted bool"),
        (dict(select=dict(how="dynamic")), "algorithm.select: how='dynamic' is unknown"),
        (dict(select=dict(how="range", low=0.2, high=0.8)), "how='range' needs reward"),
        (
            dict(select=dict(how="range", reward="exact", low=0.8, high=0.2)),
            "algorithm.select: low=0.8 and high=0.2; wanted low <= high",
        ),
        (dict(imitate=dict(reward="exact", above=0.5)), "algorithm.imitate.weight is missing"),
        (
            dict(imitate=dict(reward="exact", above=0.5, weight=-1.0)),
            r"algorithm.imitate: weight=-1.0; wanted more than 0",
        ),
        (
            dict(imitate=dict(reward="exakt", above=0.5, weight=0.1)),
            r"algorithm.imitate.reward='exakt' is none of rewards; did you mean 'exact'\?; known: ",
        ),
        (
            dict(name="superhf", kl_coef=0.1, imitate=dict(reward="exact", above=0.5, weight=0.1)),
            "superhf takes omit_truncated, select; leave imitate out",
        ),
        (
            dict(select=dict(how="signal", reward="exakt")),
            r"algorithm.select.reward='exakt' is none of rewards; did you mean 'exact'\?; known: ",
        ),
    ],
)
def test_bad_values_are_named_with_the_way_out(wrappers, message):
    with pytest.raises(ValueError, match=message):
        build.algorithm(config_with(**wrappers))


@pytest.mark.parametrize(
    ("wrappers", "sizes", "message"),
    [
        (dict(select=dict(how="signal")), dict(max_draws=1), r"max_draws=1; set it to 2 or more"),
        (dict(select=dict(how="signal")), dict(samples=1), r"rollout.samples=1; set it to 2 or"),
        (
            dict(correction=dict(how="tis")),
            {"sampling.temperature": 0.0},
            "greedy samples have none; set rollout.sampling.temperature above 0",
        ),
    ],
)
def test_what_cannot_work_in_this_run_is_named(wrappers, sizes, message):
    config = config_with(**wrappers)
    config.rollout.update_from_flattened_dict(sizes)
    with pytest.raises(ValueError, match=message):
        build.algorithm(config)


TEXTS = dict(kind="texts", name="jsonl:best.jsonl", template="{prompt}", max_length=9, rows=8)


@pytest.mark.parametrize("name", ["grpo", "best_of_n", "online_dpo"])
def test_rehearsal_goes_around_any_algorithm(name):
    config = config_with()
    config.algorithm = dict(name=name, rehearsal=dict(weight=0.1))
    config.extra = dict(rehearsal=TEXTS)
    assert build.algorithm(config).needs.extra == ("rehearsal",)


@pytest.mark.parametrize(
    ("rehearsal", "extra", "message"),
    [
        (dict(weight=0.1), {}, "algorithm.rehearsal trains on auxiliary rows, and the config has"),
        (dict(weight=0.0), dict(rehearsal=TEXTS), "algorithm.rehearsal: weight=0.0; wanted a"),
        (dict(), dict(rehearsal=TEXTS), "algorithm.rehearsal.weight is missing"),
        (dict(weight=1.0, rows="x"), dict(rehearsal=TEXTS), "algorithm.rehearsal.rows: no such"),
        (
            dict(weight=1.0),
            dict(rehearsal=TEXTS | dict(kind="pairs")),
            "extra.rehearsal.kind='pairs', but algorithm.rehearsal trains on texts",
        ),
        (
            dict(weight=1.0),
            dict(rehearsal=TEXTS | dict(rows=7)),
            "extra.rehearsal.rows=7 does not divide into updates.minibatches=2",
        ),
    ],
)
def test_rehearsal_without_its_rows_is_refused(rehearsal, extra, message):
    config = config_with(rehearsal=rehearsal)
    config.extra = extra
    with pytest.raises(ValueError, match=message):
        build.algorithm(config)


def test_an_algorithm_that_asks_one_reward_names_one_that_is_there():
    config = config_with()
    config.algorithm = dict(name="expert_iteration", reward="exakt")
    said = r"algorithm.reward='exakt' is none of rewards; did you mean 'exact'\?; known: exact, "
    with pytest.raises(ValueError, match=said):
        build.algorithm(config)
    config.algorithm.reward = "exact"
    build.algorithm(config)


def test_an_algorithm_says_what_may_be_around_it(tmp_path, monkeypatch):
    """A file outside the package whose loss knows no advantages refuses a correction."""
    folder = tmp_path / "shelf_of_mine"
    folder.mkdir()
    (folder / "imitates.py").write_text(
        "from rlhf_jax.algorithms.grpo import grpo\n"
        "def imitates():\n"
        "    return grpo()._replace(wraps=('omit_truncated', 'select'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = config_with()
    config.algorithm = dict(name="shelf_of_mine.imitates", correction=dict(how="tis"))
    said = (
        "algorithm.correction would not change the loss of shelf_of_mine.imitates as it says; "
        "shelf_of_mine.imitates takes omit_truncated, select; leave correction out"
    )
    with pytest.raises(ValueError, match=said):
        build.algorithm(config)
    config.algorithm = dict(name="shelf_of_mine.imitates", omit_truncated=True)
    assert build.algorithm(config).targets.__qualname__.startswith("omit_truncated.")
