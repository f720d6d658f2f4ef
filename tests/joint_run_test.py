"""Advantage models and ODIN from a config: trained, measured, exported, and paid by."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import eval_reward
from configs.pairs import get_config as pairs_config
from configs.ppo_tiny import get_config as ppo_config
from rlhf_jax import policy_run, roles, run_folder
from rlhf_jax.evaluate import evaluate
from rlhf_jax.export import export
from rlhf_jax.fit import open_sources
from rlhf_jax.learned_judge import make_learned
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.policy_plan import make_plan
from rlhf_jax.policy_sampler import PolicySampler
from rlhf_jax.score import readings_of, score
from rlhf_jax.train_policy import score_device, train_policy
from rlhf_jax.train_reward import check, train_reward
from rlhf_jax.training.keys import Purpose
from tests.cards import card
from tests.model_folders import read, write

KINDS = ("advantage", "odin")
TOKENIZER = ppo_config().data.tokenizer
ROWS = [
    dict(prompt=f"{i}+{j}=", chosen=str(i + j), rejected=str(i + j + 1) + "0" * (i % 3))
    for i in range(3)
    for j in range(4)
]
TAKEN = dict(
    advantage=dict(name="advantage_model"), odin=dict(name="outcome_model", head="quality")
)


def reward_config(data, kind, *, rank=0, start=""):
    source = dict(kind="pairs", template="{prompt}", max_length=12, rows=8, name=f"jsonl:{data}")
    model = dict(init_from=str(start)) if start else dict(name="tiny", layers=1)
    if rank:
        model |= dict(lora_rank=rank, lora_targets=("query", "down"))
    shipped = pairs_config(f"kind={kind}").stages.reward.config.reward.to_dict()
    return ConfigDict(
        dict(
            seed=0,
            mesh=dict(data=-1),
            model=model,
            reward=shipped,
            card=card("pairs", "held"),
            data=dict(tokenizer=TOKENIZER),
            sources=dict(pairs=dict(**source, weight=1.0)),
            optimizer=dict(learning_rate=1e-2, schedule="constant", warmup=0),
            updates=dict(microbatches=2),
            train=dict(steps=12, max_skipped=1),
            eval=dict(every=12, sources=dict(held=source)),
            checkpoint=dict(every=6, keep=3),
            log=dict(every=1),
        )
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    write(folder / "pairs.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def runs(root):
    """kind -> the folder of a run, trained once."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = root / kind
            train_reward(reward_config(root / "pairs.jsonl", kind), str(made[kind]))
        return made[kind]

    return run


def policy_config(folder, kind, **changes):
    config = ppo_config()
    config.model.layers = 1
    config.value.init_from = "judge"
    section = dict(weight=1.0, init_from=str(folder)) | TAKEN[kind]
    config.rewards = dict(judge=section | changes)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_says_what_it_is_and_pays_what_is_evaluated(runs, kind, tmp_path):
    """The reward of a policy run says of its samples what `score`, from which `evaluate_reward`
    reads, says of the same texts."""
    folder = runs(kind)
    lines = read(folder / "metrics.jsonl")
    assert lines[-1]["loss/pairs"] < lines[0]["loss/pairs"]
    if kind == "odin":  # pairs train the sum of both heads
        assert lines[-1]["eval/held/length_correlation"] > 0.7
        assert lines[-1]["eval/held/accuracy_with_length"] > 0.7
    else:
        assert lines[-1]["eval/held/accuracy"] > 0.7
    page = (folder / "card.md").read_text()
    facts = json.loads((folder / "card.json").read_text())
    assert f"{kind}: " in page and facts["training"][kind]
    assert facts["probes"]["head"] == {"advantage": "outcome", "odin": "quality"}[kind]

    run, state = policy_run.start(make_plan(policy_config(folder, kind)))
    rollouts = jax.device_get(run.sample(state, 0, jax.random.key(1)))
    paid, _ = score_device(run, state.rewards, state.reference, rollouts)
    assert np.std(np.asarray(paid.parts["judge"])) > 1e-3
    text, asked = run.plan.tokenizer, rollouts.prompts
    rows, texts = [], []
    for row in np.flatnonzero(~rollouts.truncated)[:8]:
        prompt = asked.tokens[row // rollouts.group_size][asked.mask[row // rollouts.group_size]]
        answer = rollouts.tokens[row][rollouts.mask[row]][:-1].tolist()  # without end-of-text
        if text.encode(text.decode(answer)) == answer:  # no special token within
            rows.append(row)
            texts.append(dict(prompt=text.decode(prompt.tolist()), completion=text.decode(answer)))
    wanted = np.asarray(paid.parts["judge"])[rows]
    assert len(texts) > 2
    given, output = write(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl"
    score(model=str(folder), input=given, output=str(output), end_of_text=True)
    said = np.array([line["score"] for line in read(output)])
    np.testing.assert_allclose(said, wanted, rtol=0, atol=3e-6)
    beside = {"advantage": "expected", "odin": "length_score"}[kind]
    assert all(np.isfinite(line[beside]) for line in read(output))


def eval_config(folder, path):
    config = eval_reward.get_config()
    config.reward.init_from = str(folder)
    config.data.update(dict(max_length=32, rows=8, template="{prompt}"))
    config.resamples = 30
    config.reward_sets = ConfigDict(dict(pairs=dict(form="pairs", name=f"jsonl:{path}")))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_report_measures_what_pays(runs, root, kind, tmp_path):
    numbers = evaluate(eval_config(runs(kind), root / "pairs.jsonl"), str(tmp_path / "report"))
    lines = read(tmp_path / "report" / "scores.jsonl")
    texts = [
        dict(prompt=row["prompt"], completion=row[side])
        for row in ROWS
        for side in ("chosen", "rejected")
    ]
    given, output = write(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl"
    score(model=str(runs(kind)), input=given, output=str(output), end_of_text=True)
    said = np.array([line["score"] for line in read(output)]).reshape(-1, 2)
    np.testing.assert_allclose([line["scores"] for line in lines], said, atol=3e-6)
    assert numbers["pairs/accuracy"] == pytest.approx(np.mean(said[:, 0] > said[:, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(runs, root, kind, tmp_path):
    config = reward_config(root / "pairs.jsonl", kind)
    config.train.steps = 6
    train_reward(config, str(tmp_path))
    config.train.steps = 12
    train_reward(config, str(tmp_path))
    place = (make_mesh({"data": 4}), ShardingRules())
    jax.tree.map(
        np.testing.assert_array_equal,
        *(roles.load(str(folder), *place) for folder in (tmp_path, runs(kind))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_trains_on_it(runs, kind, tmp_path):
    config = policy_config(runs(kind), kind, normalise=True)
    config.train.steps = 2
    state = train_policy(config, str(tmp_path))
    assert int(state.train.step) == 2
    lines = read(tmp_path / "metrics.jsonl")
    assert all(np.isfinite(line["reward/judge"]) for line in lines)
    if kind == "advantage":
        assert all(np.isfinite(line["reward/judge/expected"]) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_with_several_heads_train_and_pay_on_the_policys_base(root, kind, tmp_path):
    base = root / f"base_{kind}"
    policy = ppo_config()
    policy.model.layers, policy.train.steps, policy.rollout.max_tokens = 1, 1, 6
    policy.value.init_from = "policy"
    policy.rewards = dict(length=dict(name="length", weight=1.0, per_token=-1.0, free=0))
    train_policy(policy, str(base))
    folder = root / f"lora_{kind}"
    train_reward(reward_config(root / "pairs.jsonl", kind, rank=2, start=base), str(folder))
    config = policy_config(folder, kind)
    config.model = dict(init_from=str(base), lora_rank=2)
    config.value.init_from = "policy"
    run, state = policy_run.start(make_plan(config))
    assert "embed" not in state.rewards["device"]["judge"]["params"]  # adapters and heads alone
    rollouts = run.sample(state, 0, jax.random.key(1))
    paid, _ = score_device(run, state.rewards, state.reference, rollouts)
    judged = make_learned("judge", config)(PolicySampler(config, Purpose.EVALUATE))(rollouts)
    np.testing.assert_allclose(paid.parts["judge"], judged, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_is_exported_is_the_part_that_has_a_form(runs, tmp_path):
    with pytest.raises(
        ValueError, match=r"--what is missing: the run is an advantage model, r − e"
    ):
        export(workdir=str(runs("advantage")), output=str(tmp_path / "a"))
    export(workdir=str(runs("advantage")), output=str(tmp_path / "r"), what="outcome")
    export(workdir=str(runs("odin")), output=str(tmp_path / "q"))
    place = (make_mesh({"data": 1}, jax.devices()[:1]), ShardingRules())
    for kind, folder, head in (("advantage", "r", "outcome"), ("odin", "q", "quality")):
        ours = roles.load(str(runs(kind)), *place)["heads"][head]
        written = roles.load(str(tmp_path / folder), *place)["heads"]
        assert written.keys() == {"outcome"}
        np.testing.assert_array_equal(written["outcome"]["kernel"], ours["kernel"])


@pytest.mark.slow
def test_sampled_answers_teach_what_is_expected(root, tmp_path):
    """Texts without labels beside the pairs; an evaluation of them on their own."""
    samples = [dict(prompt=row["prompt"], completion=row["rejected"]) for row in ROWS]
    path = write(tmp_path / "samples.jsonl", samples)
    config = reward_config(root / "pairs.jsonl", "advantage")
    text = dict(kind="texts", template="{prompt}", max_length=12, rows=8, name=f"jsonl:{path}")
    config.sources.samples = dict(**text, weight=1.0)
    config.eval.sources.more = dict(text)
    config.card = card("pairs", "samples", "held", "more")
    train_reward(config, str(tmp_path / "run"))
    last = read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["eval/loss/more_expected"] < 0.5 and "loss/pairs_expected" not in last
    assert "squared error of what is expected" in (tmp_path / "run" / "card.md").read_text()


def test_bad_configs_are_named_before_anything_runs(root):
    def bad(kind, words, **changes):
        config = reward_config(root / "pairs.jsonl", kind)
        with config.unlocked():
            for path, value in changes.items():
                config.update_from_flattened_dict({path.replace("__", "."): value})
        with pytest.raises(ValueError, match=words):
            check(config)

    bad("odin", r"reward\.score_heads=\('quality',\) with reward\.odin; wanted \('quality', 'le",
        reward__score_heads=("quality",))  # fmt: skip
    bad("advantage", r"wanted \('outcome', 'expected'\) and beside them at most \('process',\)",
        reward__score_heads=("outcome", "expected", "tone"))  # fmt: skip
    bad("advantage", r"reward\.advantage: margin=-1\.0; wanted more than 0",
        reward__advantage__margin=-1.0)  # fmt: skip
    bad("odin", r"sources\.pairs\.kind='correctness' with reward\.odin",
        sources__pairs__kind="correctness")  # fmt: skip
    bad("odin", r"updates.*smoothing=0\.1: labels follow one head", updates__smoothing=0.1)
    bad("odin", "^reward: ODIN with 2 members", reward__members=2, reward__ensemble="linear")
    bad("advantage", r"sources\.pairs\.template=''", sources__pairs__template="")
    bad("advantage", r"sources\.pairs\.head='outcome' with reward\.advantage",
        sources__pairs__head="outcome")  # fmt: skip
    write(root / "unasked.jsonl", [*ROWS[:7], ROWS[7] | dict(prompt="")])
    for part in ("sources.pairs", "eval.sources.held"):
        config = reward_config(root / "pairs.jsonl", "advantage")
        config.update_from_flattened_dict({f"{part}.name": f"jsonl:{root / 'unasked.jsonl'}"})
        wanted = rf"{part}: .*unasked\.jsonl, line 8: the prompt has no tokens"
        with pytest.raises(ValueError, match=wanted):
            open_sources(check(config))
    config.sources.pairs.name = config.eval.sources.held.name
    config.reward = reward_config("", "odin").reward
    assert len(open_sources(check(config)).sources["pairs"]) == 8  # no head reads its prompt
    for kind in KINDS:
        config = reward_config(root / "pairs.jsonl", kind)
        with config.unlocked():
            del config.reward[kind]
        with pytest.raises(ValueError, match=rf"the heads of reward\.{kind}, which is missing"):
            check(config)


@pytest.mark.slow
def test_what_a_folder_of_another_kind_says(runs):
    folder = str(runs("advantage"))
    config = policy_config(folder, "odin")
    with pytest.raises(ValueError, match=r"rewards\.judge reads head 'quality', but .* has \['exp"):
        make_plan(config)
    models = run_folder.read_models(folder)
    assert [one.less for one in readings_of(models["reward"])] == ["expected"]
