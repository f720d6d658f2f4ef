"""What every reward on the shelf must do: members are found by listing it, and built small."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.find import find, members
from rlhf_jax.mesh import ShardingRules, make_mesh, shard_batch
from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from rlhf_jax.rewards.base import combine
from rlhf_jax.rewards.code_sandbox import namespaces_work
from tests.models.batches import drawn
from tests.rewards.examples import TOKENIZER, permute_groups, random_rollouts, spell

MEMBERS = members("rewards")
HEADS = ("outcome", "process", "expected")
CONFIG = named_size(
    "tiny", layers=1, vocab_size=TOKENIZER.vocab_size, score_heads=HEADS, lm_head=False
)
MODEL = decoder(CONFIG)
PARAMS = drawn(MODEL)
MEMBERS_CONFIG = dataclasses.replace(CONFIG, members=3, ensemble="linear")
MEMBERS_MODEL = decoder(MEMBERS_CONFIG)
MEMBERS_PARAMS = drawn(MEMBERS_MODEL)
# Logits are made without the table of embeddings, so that a row of it may hold NaN.
LM_CONFIG = dataclasses.replace(CONFIG, lm_head=True, score_heads=(), tie_embeddings=False)
LM_MODEL = decoder(LM_CONFIG)
LM_PARAMS, LM_START = drawn(LM_MODEL, 0), drawn(LM_MODEL, 1)
NUMBERS = [3, 5, 7, 11]
# What the graders read of a record; all of them call the first answer of a group right.
RECORDS = [
    {
        "answer": f"#### {number}",
        "letter": letter,
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
        "test_list": [f"assert so == {number}"],
    }
    for number, letter in zip(NUMBERS, "ABCD", strict=True)
]
RESOURCES = {
    "model": MODEL,
    "params": PARAMS,
    "rows": 4,
    "decode": TOKENIZER.decode,
    "encode": TOKENIZER.encode,
    "words": ("so",),
    "records": lambda source, record: RECORDS[record],
    "allow": True,
    "isolation": "hook" if namespaces_work() else "namespaces",
}
LM_MEMBERS = ("implicit_model", "generative_model")  # those that read log-probs or logits
# Where a member reads another field than most, or has keys without a default.
FIELDS = {
    "choice": {"answer": "letter"},
    "overlong": {"limit": 30, "buffer": 20},
    "generative_model": {"yes": "y", "no": "n"},  # bytes
}


def made(name, **changes):
    """The member with its default values and the resources that it names."""
    factory = find("rewards", name)
    resources = {**RESOURCES, "mesh": make_mesh({"data": 2}, jax.devices()[:2])}
    if name == "ensemble":
        resources |= {"model": MEMBERS_MODEL, "params": MEMBERS_PARAMS}
    if name in LM_MEMBERS:
        resources |= {"model": LM_MODEL, "params": LM_PARAMS, "reference": LM_START}
    resources |= changes
    wanted = inspect.signature(factory).parameters
    given = {k: v for k, v in resources.items() if k in wanted}
    return factory(**given, **FIELDS.get(name, {}))


def batch():
    """Four groups of two; half of the answers are right; one completion is cut off."""
    answers = [  # the first is Python as well
        [f"so={n}\n#Answer: {letter}\n#### {n}", f"#### {n + 1}\nlonger,than the other"]
        for n, letter in zip(NUMBERS, "ABCD", strict=True)
    ]
    prompts = [f"question {'x' * n}" for n in NUMBERS]
    rollouts = spell(prompts, [text for pair in answers for text in pair], group=2)
    breaks = (rollouts.tokens == ord("\n")) & rollouts.mask
    truncated = np.arange(8) == 5
    return dataclasses.replace(rollouts, step_ends=rollouts.step_ends | breaks, truncated=truncated)


def program(reward):
    return jax.jit(reward.score) if reward.where == "device" else reward.score


@functools.cache
def usual(name):
    """The member and its program, compiled once for the tests that share them."""
    reward = made(name)
    return reward, program(reward)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_shelf_has_the_members_of_this_step():
    learned = {"outcome_model", "process_model", "ensemble"}
    learned |= {"advantage_model", "generative_model", "implicit_model"}
    assert {"exact_match", "keywords", "length", *learned} <= set(MEMBERS)


@pytest.mark.parametrize("name", MEMBERS)
def test_scores_have_the_contracts_shapes_and_say_something(name):
    (reward, score), rollouts = usual(name), batch()
    scores, _ = score(reward.init(), rollouts)
    assert scores.outcome.shape == (8,) and scores.process.shape == rollouts.mask.shape
    assert {x.dtype for x in jax.tree.leaves(scores)} == {jnp.dtype("float32")}
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(scores))
    assert next(iter(scores.parts)) == reward.name
    said = np.abs(scores.outcome) + np.abs(scores.process).sum(1)
    assert len(set(said.tolist())) > 1
    np.testing.assert_array_equal(np.asarray(scores.process)[~rollouts.mask], 0)


@pytest.mark.parametrize("name", MEMBERS)
def test_padding_says_nothing(name):
    """Other pad tokens, NaN in every number at padding, NaN in the embedding of the pad token."""
    rollouts = batch()
    prompts, mask = rollouts.prompts, rollouts.mask
    changed = dataclasses.replace(
        rollouts,
        prompts=dataclasses.replace(
            prompts, tokens=np.where(prompts.mask, prompts.tokens, 65).astype(np.int32)
        ),
        tokens=np.where(mask, rollouts.tokens, TOKENIZER.pad_id).astype(np.int32),
        logprobs=np.where(mask, rollouts.logprobs, np.nan).astype(np.float32),
        behaviour_logprobs=np.where(mask, rollouts.behaviour_logprobs, np.nan).astype(np.float32),
        step_ends=rollouts.step_ends | ~mask,
    )
    params = MEMBERS_PARAMS if name == "ensemble" else PARAMS
    params = LM_PARAMS if name in LM_MEMBERS else params
    table = params["embed"]["table"].at[TOKENIZER.pad_id].set(jnp.nan)
    poisoned = {**params, "embed": {**params["embed"], "table": table}}
    (clean, score), dirty = usual(name), made(name, params=poisoned)
    expected, _ = score(clean.init(), rollouts)
    found, _ = score(dirty.init(), changed)  # parameters are state: the same program
    assert_same(expected, found)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_rows_place_in_the_batch_does_not_matter(name):
    (reward, score), rollouts = usual(name), batch()
    moved, rows = permute_groups(rollouts, [2, 0, 3, 1])
    expected, _ = score(reward.init(), rollouts)
    found, _ = score(reward.init(), moved)
    assert_same(jax.tree.map(lambda x: np.asarray(x)[rows], expected), found)


@pytest.mark.parametrize("name", MEMBERS)
def test_scores_are_pure_and_the_state_keeps_its_form(name):
    """So that a loop compiles once, and a state that was written and read goes on unchanged."""
    (reward, score), rollouts = usual(name), batch()
    state = reward.init()
    first, after = score(state, rollouts)
    assert jax.eval_shape(lambda: state) == jax.eval_shape(lambda: after)
    read = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), after)
    assert_same(first, score(read, rollouts)[0])


DEVICE = [name for name in MEMBERS if made(name).where == "device"]


@pytest.mark.parametrize("name", DEVICE)
def test_compiles_once_for_batches_of_one_shape(name):
    reward, score = usual(name)
    jax.clear_caches()
    state = reward.init()
    for seed in range(3):
        _, state = score(state, random_rollouts(seed))
    assert score._cache_size() == 1


@pytest.mark.parametrize("name", MEMBERS)
def test_parts_are_unweighted_and_scores_weighted(name):
    (reward, score), rollouts = usual(name), batch()
    alone, _ = score(reward.init(), rollouts)
    whole = combine({"label": (reward, 0.3)})
    scores, _ = program(whole)(whole.init(), rollouts)
    np.testing.assert_allclose(scores.parts["label"], alone.parts[reward.name], rtol=1e-6)
    np.testing.assert_allclose(scores.outcome, 0.3 * alone.outcome, rtol=1e-6)
    np.testing.assert_allclose(scores.process, 0.3 * alone.process, rtol=1e-6)


@pytest.mark.parametrize("name", MEMBERS)
def test_weight_zero_logs_and_does_not_train(name):
    (reward, score), rollouts = usual(name), batch()
    alone, _ = score(reward.init(), rollouts)
    whole = combine({"label": (reward, 0.0)})
    scores, _ = program(whole)(whole.init(), rollouts)
    np.testing.assert_allclose(scores.parts["label"], alone.parts[reward.name], rtol=1e-6)
    np.testing.assert_array_equal(scores.outcome, np.zeros(8))
    np.testing.assert_array_equal(scores.process, np.zeros(rollouts.mask.shape))


@pytest.mark.parametrize("name", MEMBERS)
def test_four_devices_give_the_scores_of_one(name):
    (reward, score), rollouts = usual(name), batch()
    expected, _ = score(reward.init(), rollouts)
    mesh = make_mesh({"data": 2, "fsdp": 2})
    with jax.set_mesh(mesh):
        found, _ = score(reward.init(), shard_batch(mesh, ShardingRules(), rollouts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected, found)
