"""Numbers that are known of fixed public sets, as our readers and metrics find them.

They were counted on the files by other means, before there was a reader here. Shares of
ProcessBench are of the whole set, of which the files hold a part.
"""

import itertools

import numpy as np
import pytest

from rlhf_jax.data.process_sets import find_form
from rlhf_jax.data.record_files import open_records
from rlhf_jax.ops.length_bias import pair_lengths
from rlhf_jax.ops.reward_metrics import cohen_kappa
from rlhf_jax.ops.voting import majority_of_k
from rlhf_jax.reward_numbers import pair_findings
from rlhf_jax.rewards.math_answer import final_answer

pytestmark = pytest.mark.data


def read(data_dir, form, file):
    """(records, their items) of a set."""
    source = open_records(f"jsonl:{data_dir / file}.jsonl.gz")
    records = [source[i] for i in range(len(source))]
    return records, [item for record in records for item in find_form(form)[1](record)]


def test_every_answer_of_gsm8k_has_its_mark(data_dir):
    source = open_records(f"jsonl:{data_dir}/gsm8k/train.jsonl.gz")
    assert len(source) == 7473
    assert all(final_answer(source[i]["answer"]) for i in range(len(source)))


def test_the_majority_of_eight(data_dir):
    records, items = read(data_dir, "samples", "math_best_of_n/bon")
    correct = [np.array(item.correct, float) for item in items]
    answers = [record["pred"] for record in records]

    def share(weights):
        votes = zip(answers, correct, strict=True)
        found = [majority_of_k(a, z, (8,), weights=weights)[0] for a, z in votes]
        return np.mean(found)

    # 93.0 % is with the answer that came first where two have as many votes, as in 2 of 71.
    assert round(100 * share(np.array([1 + 1e-6] + [1.0] * 7)), 1) == 93.0
    # In expectation over ties, as everywhere here, each of the two is half right.
    assert share(None) == pytest.approx(65 / 71, abs=1e-12)
    draws = [sum(z) == 4 and len(set(a)) == 2 for a, z in zip(answers, correct, strict=True)]
    assert sum(draws) == 2 and share(None) + 1 / 71 == pytest.approx(66 / 71, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "total", "flawless", "lucky"),
    [
        ("gsm8k", 400, 193, 7),
        ("math", 1000, 406, 94),
        ("olympiadbench", 1000, 339, 161),
        ("omnimath", 1000, 241, 259),
    ],
)
def test_flawless_solutions_of_processbench(data_dir, name, total, flawless, lucky):
    """Flawless ones, and wrong steps under a right answer, as in the whole set: within 4 SE of a
    part drawn without replacement, and no more than the whole has."""
    records, items = read(data_dir, "processbench", f"processbench/{name}")
    good = np.array([item.first_wrong == -1 for item in items])
    right = np.array([record["final_answer_correct"] for record in records])
    for found, whole in ((good, flawless), (~good & right, lucky)):
        count, share = len(found), whole / total
        error = np.sqrt(count * share * (1 - share) * (total - count) / (total - 1))
        assert abs(found.sum() - count * share) < 4 * error
        assert 0 <= whole - found.sum() <= total - count


def longer_wins(items):
    """In percent, by characters."""
    chosen, rejected = (np.array([len(item[i]) for item in items]) for i in (1, 2))
    return 100 * pair_lengths(chosen * 1.0, rejected * 1.0, chosen, rejected).longer_wins


@pytest.mark.parametrize(
    ("form", "file", "subset", "low", "high"),
    [
        ("pairs", "ukp_convarg1/train", None, 76, 80),
        ("pairs", "ukp_convarg1/test", None, 76, 80),
        ("pairs", "ultrafeedback_mini/train", None, 52, 55),
        ("llmbar", "llmbar/pairs", "adv-neighbor", 9, 18),
        ("llmbar", "llmbar/pairs", "adv-gptinst", 9, 18),
        ("llmbar", "llmbar/pairs", "adv-manual", 9, 18),
        ("llmbar", "llmbar/pairs", "adv-gptout", 43, 47),
    ],
)
def test_the_longer_one_wins_as_often_as_was_counted(data_dir, form, file, subset, low, high):
    _, items = read(data_dir, form, file)
    kept = [item for item in items if subset in (None, item.categories.get("subset"))]
    assert low <= round(longer_wins(kept)) <= high


@pytest.mark.parametrize(("subset", "percent"), [("helpful-base", 60), ("harmless-base", 44)])
def test_the_longer_one_wins_in_hh(data_dir, subset, percent):
    """ "About" so many percent, of all pairs here: within 2 standard errors."""
    items = [
        item for part in ("train", "test") for item in read(data_dir, "pairs", f"hh_rlhf/{part}")[1]
    ]
    kept = [item for item in items if item.categories["subset"] == subset]
    error = np.sqrt(percent * (100 - percent) / len(kept))
    assert abs(longer_wins(kept) - percent) < 2 * error


def slow_kappa(first, second):
    """By counting."""
    pairs = list(zip(first, second, strict=True))
    same = sum(a == b for a, b in pairs) / len(pairs)
    chance = sum((first.count(k) / len(pairs)) * (second.count(k) / len(pairs)) for k in (0, 1, 2))
    return (same - chance) / (1 - chance)


def test_people_agree_on_pandalm(data_dir):
    """About 0.85 between every two of the three, says its README of the whole set."""
    records, items = read(data_dir, "pandalm", "pandalm/pairs")
    columns = [[record[f"annotator{i}"] for record in records] for i in (1, 2, 3)]
    kappas = [cohen_kappa(*map(np.array, two)) for two in itertools.combinations(columns, 2)]
    wanted = [slow_kappa(*two) for two in itertools.combinations(columns, 2)]
    np.testing.assert_allclose(kappas, wanted, rtol=0, atol=1e-12)
    assert np.round(kappas, 3).tolist() == [0.857, 0.903, 0.865]
    # The report on a reward model has it beside the accuracy: what a model could reach.
    scores, lengths = (
        np.random.default_rng(0).random((len(items), 2)),
        np.ones((len(items), 2), int),
    )
    found = pair_findings(items, scores, lengths, np.arange(len(items)), resamples=2, seed=0)
    assert found.numbers["annotator_kappa"].value == pytest.approx(np.mean(wanted), abs=1e-12)
