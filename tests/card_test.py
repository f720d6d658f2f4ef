"""The card of a reward model: from a config to folder and export, and what may not be missing."""

import hashlib
import json
import re

import pytest
from huggingface_hub import ModelCard
from ml_collections import ConfigDict

from rlhf_jax import card, card_page, sections
from rlhf_jax.export import export
from rlhf_jax.pipeline import add_to_cards
from rlhf_jax.train_reward import check, open_probes, train_reward
from tests import cards

TRAIN, HELD = 12, 6


def words(number):
    return f"It is {number}. I counted."


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return f"jsonl:{path}"


def config_of(root):
    """Pairs of bytes; two pairs for each held-out prompt, and probes of its own."""
    rows = [dict(prompt=f"{i}+1=", chosen=words(i + 1), rejected=words(i)) for i in range(TRAIN)]
    held = [
        dict(prompt=f"{i // 2}+2=", chosen=words(i // 2 + 2), rejected=words(i % 2) + i * "!")
        for i in range(HELD)
    ]
    own = [
        dict(probe="paraphrase", prompt=f"{i}+1=", original=words(1), changed=f"That is {i}.")
        | dict(changed_prompt=f"{i} and 1 is ")
        for i in range(3)
    ]
    source = dict(kind="pairs", template="{prompt}", max_length=40, rows=4)
    probes = dict(source="held", records=5, pairs=write(root / "own.jsonl", own))
    return ConfigDict(
        dict(
            seed=3,
            mesh=dict(data=-1),
            model=dict(name="tiny", layers=1),
            reward=dict(score_heads=("outcome",)),
            data=dict(tokenizer="byte"),
            sources=dict(pairs=dict(**source, name=write(root / "train.jsonl", rows), weight=0.5)),
            optimizer=dict(learning_rate=1e-2, schedule="constant", warmup=0),
            updates=dict(microbatches=1, centre_coef=0.01),
            train=dict(steps=2, max_skipped=1),
            eval=dict(every=2, sources=dict(held=source | dict(name=write(root / "held", held)))),
            checkpoint=dict(every=2, keep=1),
            log=dict(every=1),
            card=cards.card("pairs", "held") | dict(probes=probes),
        )
    )


@pytest.fixture(name="run", scope="module")
def trained(tmp_path_factory):
    """The folder of a trained run, and that of its data."""
    root = tmp_path_factory.mktemp("card")
    train_reward(config_of(root), str(root / "run"))
    return root / "run"


@pytest.fixture(name="facts", scope="module")
def read_facts(run):
    return json.loads((run / "card.json").read_text())


def test_a_run_is_saved_with_its_card(run, facts):
    data = {one["label"]: one for one in facts["data"]}
    assert {label: one["use"] for label, one in data.items()} == dict(
        pairs="training", held="held out"
    )
    digest = hashlib.sha256((run.parent / "train.jsonl").read_bytes()).hexdigest()
    assert (data["pairs"]["sha256"], data["pairs"]["records"]) == (digest, TRAIN)
    for key, said in cards.PROVENANCE.items():
        assert data["held"][key] == said
    assert facts["model"]["base"] == "random weights of the size 'tiny'"
    assert facts["model"]["parameters"] == facts["model"]["trained_parameters"] > 1000
    assert facts["training"]["losses"][0]["weight"] == 0.5
    assert (facts["training"]["seed"], facts["training"]["centre_coef"]) == (3, 0.01)
    assert 0 <= facts["evaluation"]["held_out"]["eval/held/accuracy"] <= 1
    assert facts["limits"] == ["It knows sums of one digit."]


def test_probes_say_numbers_or_why_not(facts):
    probes = facts["probes"]
    assert (probes["source"], probes["use"], probes["records"]) == ("held", "held out", 5)
    found = {one["name"]: one for one in probes["findings"]}
    for name in ("length", "length_in_pairs", "format", "sycophancy", "refusal", "prompt_offset"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name
    assert found["length"]["prompts"] == 5 and found["length"]["unit"] == "reward per token"
    assert found["format"]["prompts"] == 3  # five records of three prompts
    assert 0 <= found["consistency"]["value"] <= 1 and probes["head"] == "outcome"
    assert found["prompt_offset"]["within"] > 0
    assert found["pairs/paraphrase"]["prompts"] == 3


def test_the_page_is_what_the_hub_reads(run, facts):
    loaded = ModelCard.load(run / "card.md")
    assert loaded.data.license == "apache-2.0" and "reward-model" in loaded.data.tags
    assert loaded.data.base_model is None  # random weights
    for said in (*cards.PROVENANCE.values(), *facts["limits"], "sycophancy", "eval/held/accuracy"):
        assert said in loaded.text
    joint = card_page.page(facts | dict(training=facts["training"] | dict(advantage={})))
    for said in ("numbers are of r, the outcome head", "are of r − e, the outcome head less"):
        assert said in joint and said not in loaded.text
    for title in ("Model", "Data and provenance", "Training", "Evaluation", "Probes"):
        assert f"\n## {title}\n" in loaded.text
    assert loaded.text.count("| pairs | Bradley-Terry") == 1


def test_the_page_names_limits_that_the_facts_show(facts):
    bare = facts | {"evaluation": {"held_out": {}, "reports": {}}, "licence": "ask us"}
    bare["probes"] = facts["probes"] | {"use": "training"}
    bare["data"] = [facts["data"][0] | {"licence": "unknown"}]
    bare["model"] = facts["model"] | {"base": "org/name", "from_random": False}
    page = ModelCard(card_page.page(bare))
    assert page.data.license == "other" and page.data.license_name == "ask us"
    assert page.data.base_model == "org/name"
    for said in ("Not evaluated", "on texts that it was trained on", "is not known: pairs"):
        assert said in page.text
    refused = dict(name="format", unit="", reason="no letters")
    bare["probes"] = facts["probes"] | {"findings": [refused]}
    assert "not applicable: no letters" in card_page.page(bare)


def test_an_export_takes_the_card_along(run, facts, tmp_path):
    export(workdir=str(run), output=str(tmp_path / "out"), pad_token_id=257)
    loaded = ModelCard.load(tmp_path / "out" / "README.md")
    assert loaded.data.pipeline_tag == "text-classification"
    assert loaded.data.library_name == "transformers"
    kept = json.loads((tmp_path / "out" / "card.json").read_text())
    assert kept.pop("exported") == dict(what="outcome", dtype="float32")
    assert kept == facts


def test_evaluations_are_added(run, facts, tmp_path):
    """By a pipeline or by hand, from the folders that evaluations wrote."""
    summary = {"outcome_model/pair_accuracy": 0.75, "outcome_model/pair_accuracy_low": 0.5}
    summary |= {"outcome_model/pair_accuracy_high": 0.875, "sft/accuracy": 0.1, "seconds": 3.0}
    report = tmp_path / "test_pairs"
    report.mkdir()
    (report / "summary.json").write_text(json.dumps(summary))
    (report / "config.json").write_text(json.dumps(dict(reward=dict(init_from=str(run)))))
    copy = tmp_path / "run"
    copy.mkdir()
    card.write(copy, facts)
    with pytest.raises(ValueError, match=r"measured reward\.init_from=.*not --workdir"):
        card.card(workdir=str(copy), reports=str(report))
    (report / "config.json").write_text(json.dumps(dict(reward=dict(init_from=str(copy)))))
    card.card(workdir=str(copy), reports=f"{report}, ")
    found = card.read(copy)["evaluation"]["reports"]["test_pairs"]
    assert found == {n: x for n, x in summary.items() if n.startswith("outcome_model")}
    page = (copy / "card.md").read_text()
    assert "| outcome_model/pair_accuracy | 0.75 (0.5 to 0.875) |" in page
    (report / "summary.json").write_text(json.dumps({"sft/accuracy": 0.1}))
    with pytest.raises(ValueError, match="no numbers of a reward model"):
        card.card(workdir=str(copy), reports=str(report))
    with pytest.raises(ValueError, match=r"has no card\.json"):
        card.add_report(report, "x", found)


FIELDS = [f"sources.pairs.{name}" for name in cards.PROVENANCE]


@pytest.mark.parametrize("path", [*FIELDS, "sources.held.licence", "sources.held", "sources"])
def test_a_missing_provenance_field_is_an_error(path, tmp_path):
    """Of the section and of every key in it, when the config is checked."""
    config = config_of(tmp_path)
    *outer, key = f"card.{path}".split(".")
    section = config
    for name in outer:
        section = section[name]
    with config.unlocked():
        del section[key]
    sections.check("train_reward", config)  # its keys and types are right
    missing = {"sources.held": "sources.held.origin", "sources": "sources.pairs.origin"}
    named = re.escape(f"card.{missing.get(path, path)} is missing; card.")
    with pytest.raises(ValueError, match=named + ".* has .*; wanted .*'unknown'"):
        check(config)


def test_what_else_a_card_may_not_be(tmp_path):
    def refused(match, **changes):
        config = config_of(tmp_path)
        for path, value in changes.items():
            section = config.card
            *outer, key = path.split("__")
            for name in outer:
                section = section[name]
            with section.ignore_type(), section.unlocked():
                section[key] = value
        with pytest.raises(ValueError, match=match):
            sections.check("train_reward", config)
            open_probes(check(config).config)

    refused(
        r"card\.sources\.pairs\.origin=' ' says nothing; wanted who", sources__pairs__origin=" "
    )
    refused(r"card\.licence='' says nothing", licence="")
    refused(r"card\.limits=\(\) says nothing; wanted a list", limits=())
    refused(r"card\.limits=\('a', ''\) says nothing", limits=("a", ""))
    refused(r"card\.limits='few' is str; wanted tuple", limits="few")
    refused(r"card\.sources\.pair: no such key; did you mean|pairs", sources__pair={})
    refused(r"card\.sources\.held\.origins: no such key", sources__held__origins="x")
    refused(r"card\.probes\.source='test'; wanted one of pairs, held", probes__source="test")
    refused(r"card\.probes\.pairs='own'; wanted 'jsonl:PATH'", probes__pairs="own")
    bad = write(tmp_path / "bad.jsonl", [dict(probe="a", prompt="b", original="c")])
    refused(r"card\.probes\.pairs: .*bad\.jsonl, line 1: no field changed", probes__pairs=bad)
    config = config_of(tmp_path)
    with config.unlocked():
        del config["card"]
    with pytest.raises(ValueError, match=r"card is missing; the config has .*; wanted card=dict"):
        check(config)


def test_an_embedded_task_is_known_by_its_options():
    one = card.fingerprint(dict(name="arithmetic", options=dict(max_ops=2)))
    assert one == card.fingerprint(dict(name="arithmetic", options=dict(max_ops=2)))
    assert one != card.fingerprint(dict(name="arithmetic", options=dict(max_ops=3)))
    assert set(one) == {"options_sha256"}
    assert card.fingerprint(dict(name="tfds:c4/en:3.0.1")) == {}


def test_a_pipeline_adds_what_its_stages_measured(facts, tmp_path):
    """To the card of the stage that an evaluation names, if it measured a reward model at all."""
    numbers = {"test/accuracy": 0.5, "seconds": 1.0}
    for name, found in (("report", numbers), ("policy_only", {"sft/accuracy": 1.0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(found))
    (tmp_path / "report" / "report.json").write_text("{}")
    (tmp_path / "model").mkdir()
    card.write(tmp_path / "model", facts)
    own = ConfigDict(dict(reward=dict(init_from="{workdir}/model")))
    stages = [
        ("model", ConfigDict(dict(program="train_reward", config=dict()))),
        ("report", ConfigDict(dict(program="evaluate_reward", config=own))),
        ("policy_only", ConfigDict(dict(program="evaluate", config=own))),
        ("gold", ConfigDict(dict(program="evaluate_gold", config=dict()))),
    ]
    add_to_cards(tmp_path, stages)
    assert card.read(tmp_path / "model")["evaluation"]["reports"] == {
        "report": {"test/accuracy": 0.5}
    }
    assert "| test/accuracy | 0.5 |" in (tmp_path / "model" / "card.md").read_text()
