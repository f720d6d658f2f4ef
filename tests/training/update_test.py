"""The update step: exact under microbatching and sharding, compiled once, safe against NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.mesh import make_mesh
from rlhf_jax.models.completions import evaluate_completions, evaluate_texts
from rlhf_jax.ops.masking import masked_sum, mean_of
from rlhf_jax.training.experience import COMPILER_OPTIONS
from rlhf_jax.training.update import Batch, make_update_step, permute_groups, split_groups
from rlhf_jax.types import Algorithm, Experience, Needs, Targets, Term
from tests.compiling import AS_USERS
from tests.training.tiny import (
    Setup,
    assert_close,
    assert_equal,
    config,
    host,
    largest_change,
    rollouts,
    scores,
    texts,
)

QUICK = {"xla_backend_optimization_level": 0}  # for references that run once
CRITIC = config(lm_head=False, score_heads=("value",))


def reinforce(*, extra=(), init=lambda: ()):
    """−advantage · log-prob as token mean, NLL on extra rows, and a running mean of scores."""

    def targets(experience, group_size, state):
        mask = experience.rollouts.mask
        advantages = jnp.broadcast_to(experience.scores.outcome[:, None], mask.shape)
        if state:
            state = {"mean": 0.9 * state["mean"] + 0.1 * experience.scores.outcome.mean()}
        return Targets(advantages=advantages, returns=advantages, mask=mask), state

    def loss(output, experience, targets, group_size):
        policy = mean_of(-targets.advantages * output.logprobs, targets.mask)
        terms = {"policy": Term(weight=1.0, mean=policy)}
        for name in extra:
            rows = experience.extra[name]
            mean = mean_of(-output.extra[name], rows.loss_mask)
            terms[name] = Term(weight=0.5, mean=mean)
        return terms, {}

    return Algorithm(init=init, targets=targets, loss=loss, needs=Needs(extra=extra))


def sgd(*roles):
    return {role: optax.sgd(0.5) for role in roles}


def outcomes(batch, change):
    """Scores with `change` applied to the outcomes."""
    given = scores(batch)
    return dataclasses.replace(given, outcome=change(given.outcome).astype(np.float32))


def ppo_setup(**changes):
    """PPO with a critic of its own: two epochs of two minibatches of two microbatches."""
    sizes = dict(epochs=2, minibatches=2, microbatches=2, rows=4) | changes
    return Setup(ppo(kl_coef=0.1), value=CRITIC, optimizers=sgd("policy", "value"), **sizes)


@pytest.fixture(scope="module", autouse=True)
def compiled_as_users_do():
    """Four updates at a rate of a half make much of rounding, and numbers are held to 1e-5."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AS_USERS.items():
            patch.setitem(COMPILER_OPTIONS, name, value)
        yield


@pytest.fixture(scope="module")
def single():
    return ppo_setup()


@pytest.fixture(scope="module")
def sharded():
    return ppo_setup(mesh=make_mesh({"data": 2, "tensor": 2}))


@pytest.fixture(scope="module")
def rehearsing():
    """REINFORCE and extra rows, one minibatch."""
    return Setup(reinforce(extra=("rehearsal",)), optimizers=sgd("policy"), microbatches=2, rows=4)


def result(setup, batch):
    """Metrics and new parameters of one update from the first state."""
    setup.reset()
    return setup.update(setup.experience(batch)), host(setup.state.params)


def assert_same_update(got, want, atol):
    assert_close(got[1], want[1], atol=atol)
    assert got[0].keys() == want[0].keys()
    for name, value in want[0].items():
        np.testing.assert_allclose(got[0][name], value, rtol=atol, atol=atol, err_msg=name)


def test_microbatches_change_nothing(single):
    batch = rollouts(8, 2)
    whole = ppo_setup(microbatches=1, rows=8)
    assert_same_update(result(single, batch), result(whole, batch), atol=1e-5)


@pytest.mark.parametrize(
    "axes", [{"data": 2, "tensor": 2}, pytest.param({"fsdp": 4}, marks=pytest.mark.slow)]
)
def test_four_devices_give_the_numbers_of_one(single, sharded, axes):
    batch = rollouts(8, 2)
    other = sharded if "tensor" in axes else ppo_setup(mesh=make_mesh(axes))
    assert_same_update(result(other, batch), result(single, batch), atol=1e-5)


def test_compiles_once_and_leaves_frozen_trees_alive(sharded):
    sharded.reset()
    frozen, params = host(sharded.frozen), host(sharded.params)
    layout = jax.tree.map(lambda x: x.sharding, sharded.state)
    for seed in range(3):
        experience = sharded.experience(rollouts(8, 2, seed=seed))
        sharded.update(experience, seed)
    assert sharded.update_step._cache_size() == 1
    assert sharded.evaluate_step._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, sharded.state) == layout
    # Scoring after training still works and the reference has not moved with the policy.
    again = sharded.experience(rollouts(8, 2, seed=2))
    assert_equal(again.ref_logprobs, experience.ref_logprobs)
    assert largest_change(again.logprobs, experience.logprobs) > 1e-3
    assert_equal(sharded.frozen, frozen)
    assert_equal(sharded.params, params)


def test_a_score_that_is_not_a_number_skips_the_update_and_the_next_one_recovers(sharded):
    batch = rollouts(8, 2)
    bad = outcomes(batch, lambda x: np.where(np.arange(16) == 5, np.nan, x))
    before = host(sharded.state)
    metrics = sharded.update(sharded.experience(batch, bad))
    # PPO whitens over the batch, so one bad score spoils every minibatch of every epoch.
    assert metrics["update/skipped"] == (4.0, 4.0)
    assert int(sharded.state.skipped) == 4
    assert_equal(sharded.state.params, before.params)
    assert_equal(sharded.state.opt_state, before.opt_state)
    metrics = sharded.update(sharded.experience(batch))
    assert metrics["update/skipped"] == (0.0, 4.0)
    assert int(sharded.state.skipped) == 0
    assert largest_change(sharded.state.params, before.params) > 1e-4
    assert int(sharded.state.step) == int(before.step) + 2


@pytest.mark.parametrize(
    ("prompts", "samples", "length", "epochs", "minibatches", "microbatches", "dtype"),
    [
        pytest.param(4, 2, 6, 1, 1, 1, "float32", marks=pytest.mark.slow),
        (4, 2, 7, 1, 1, 4, "float32"),
        (6, 3, 5, 2, 3, 1, "float32"),
        (8, 1, 16, 2, 2, 2, "bfloat16"),
    ],
)
def test_first_minibatch_has_ratio_exactly_one(
    prompts, samples, length, epochs, minibatches, microbatches, dtype
):
    setup = Setup(
        reinforce(),
        policy=config(compute_dtype=dtype, width=32, head_dim=16),
        optimizers=sgd("policy"),
        group_size=samples,
        rows=prompts * samples // (minibatches * microbatches),
        epochs=epochs,
        minibatches=minibatches,
        microbatches=microbatches,
    )
    experience = setup.experience(rollouts(prompts, samples, length=length))
    total, count = setup.update(experience)["update/first_logprob_gap"]
    assert count >= prompts * samples / minibatches
    assert total == 0.0
    # Not because nothing is compared: one update later the policy has moved.
    total, _ = setup.update(experience)["update/first_logprob_gap"]
    assert total > 1e-3


def test_the_ratio_is_one_where_norms_follow_products():
    """Sums of squares behind a product, which one program joins and another keeps apart unless
    `experience.APART` says so: with jax 0.10.2 these 128 tokens were then 2e-7 off on average."""
    normed = config(layers=1, kv_heads=1, width=64, head_dim=32, mlp_width=128, qk_norm=True)
    normed = dataclasses.replace(normed, remat="products", logprob_chunk=128)
    setup = Setup(reinforce(), policy=normed, optimizers=sgd("policy"), group_size=8, rows=8)
    experience = setup.experience(rollouts(1, 8, prompt_length=8, length=16))
    total, _ = setup.update(experience)["update/first_logprob_gap"]
    assert total == 0.0


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_driven_kl_coef_reaches_the_loss(microbatches):
    """β of the experience and not of the config, in every microbatch."""

    def updated(beta, driven):
        sizes = dict(microbatches=microbatches, rows=8 // microbatches)
        setup = Setup(grpo(kl_coef=beta), optimizers=sgd("policy"), **sizes)
        experience = setup.experience(rollouts(4, 2))
        experience = dataclasses.replace(experience, kl_coef=driven and jnp.float32(driven))
        return setup.update(experience), host(setup.state.params)

    metrics, params = updated(0.1, 0.5)
    wanted, want = updated(0.5, None)
    assert_close(params, want, atol=1e-6)
    assert metrics["update/loss"] == pytest.approx(wanted["update/loss"], abs=1e-6)
    _, configured = updated(0.1, None)
    assert largest_change(params, configured) > 1e-3


def test_one_update_is_the_gradient_of_a_loop_over_rows(rehearsing):
    """Plain REINFORCE, group by group, and NLL on extra rows, which reach the loss."""
    rehearsing.reset()
    model, batch, rows = rehearsing.models.policy, rollouts(4, 2), texts(6, 7)
    given = scores(batch)
    before = host(rehearsing.state.params["policy"])
    metrics = rehearsing.update(rehearsing.experience(batch, given, {"rehearsal": rows}))
    tokens = float(batch.mask.sum())

    def group_loss(params, group, advantages):
        out = evaluate_completions(model, params, {}, group, temperature=0.7, rows=None)
        return -masked_sum(advantages[:, None] * out.logprobs, group.mask) / tokens

    def nll(params):
        logprobs = evaluate_texts(model, params, {}, rows).logprobs
        return -masked_sum(logprobs, rows.loss_mask) / rows.loss_mask.sum()

    one_group = jax.jit(jax.value_and_grad(group_loss), compiler_options=QUICK)
    rehearsal, grads = jax.jit(jax.value_and_grad(nll), compiler_options=QUICK)(before)
    loss = 0.5 * float(rehearsal)
    expected = jax.tree.map(lambda p, g: p - 0.5 * 0.5 * g, before, grads)
    for i in range(4):
        group = jax.tree.map(lambda x, i=i: np.split(x, 4)[i], batch)
        value, grads = one_group(before, group, given.outcome[2 * i : 2 * i + 2])
        loss += float(value)
        expected = jax.tree.map(lambda p, g: p - 0.5 * g, expected, grads)
    assert_close(rehearsing.state.params["policy"], expected, atol=5e-6)
    assert metrics["update/loss"] == (pytest.approx(loss, abs=1e-5), 1.0)
    assert metrics["loss/policy"][1] == tokens
    total, count = metrics["loss/rehearsal"]
    assert count == rows.loss_mask.sum()
    assert total / count == pytest.approx(float(rehearsal), abs=1e-5)


def test_a_term_with_nothing_to_average_contributes_nothing_and_is_counted(rehearsing):
    rehearsing.reset()
    batch, rows = rollouts(4, 2), texts(6, 7)
    silent = outcomes(batch, np.zeros_like)
    rows = dataclasses.replace(rows, loss_mask=np.zeros_like(rows.loss_mask))
    before = host(rehearsing.state.params)
    metrics = rehearsing.update(rehearsing.experience(batch, silent, {"rehearsal": rows}))
    assert metrics["update/terms_empty"] == (1.0, 1.0)
    assert metrics["loss/rehearsal"] == (0.0, 0.0)
    assert metrics["update/loss"] == (0.0, 1.0)
    assert metrics["update/skipped"] == (0.0, 1.0)
    assert_equal(rehearsing.state.params, before)


def test_missing_or_uneven_extra_rows_are_named(rehearsing):
    batch = rollouts(4, 2)
    with pytest.raises(ValueError, match="needs extra rows 'rehearsal'"):
        rehearsing.update(rehearsing.experience(batch))
    with pytest.raises(ValueError, match=r"extra\['rehearsal'\] has 5 rows"):
        rehearsing.update(rehearsing.experience(batch, None, {"rehearsal": texts(5, 7)}))


def test_only_the_bad_minibatch_is_skipped_and_the_running_mean_stays_finite(rehearsing):
    algorithm = reinforce(init=lambda: {"mean": 0.5})
    setup = Setup(algorithm, optimizers=sgd("policy"), minibatches=2)
    batch = rollouts(4, 2)
    bad = outcomes(batch, lambda x: np.where(np.arange(8) == 5, np.inf, x))
    before = host(setup.state.params)
    metrics = setup.update(setup.experience(batch, bad))
    assert metrics["update/skipped"] == (1.0, 2.0)
    assert largest_change(setup.state.params, before) > 1e-4
    assert float(setup.state.algorithm["mean"]) == 0.5
    setup.update(setup.experience(batch))
    expected = 0.45 + 0.1 * scores(batch).outcome.mean()
    assert float(setup.state.algorithm["mean"]) == pytest.approx(expected, abs=1e-6)
    assert setup.update_step._cache_size() == 1
    # Two minibatches are shuffled by the key; a single pass over one minibatch is not.
    extra = {"rehearsal": texts(6, 7)}
    assert shuffle_matters(setup, batch, {}) > 1e-6
    assert shuffle_matters(rehearsing, batch, extra) == 0.0


def shuffle_matters(setup, batch, extra):
    """The largest difference in parameters between updates with two keys."""
    results = []
    for seed in (0, 1):
        setup.reset()
        setup.update(setup.experience(batch, None, extra), seed)
        results.append(host(setup.state.params))
    return largest_change(*results)


def test_value_head_on_the_policy_s_trunk():
    setup = Setup(ppo(kl_coef=0.1, value_clip=None), policy=config(score_heads=("value",)))
    before = host(setup.state.params)
    experience = setup.experience(rollouts(4, 2))
    assert float(jnp.abs(experience.values).max()) > 1e-3
    first = setup.update(experience)["loss/value"]
    assert largest_change(setup.state.params["policy"]["heads"], before["policy"]["heads"]) > 1e-3
    for _ in range(5):
        last = setup.update(experience)["loss/value"]
    assert last[0] < 0.9 * first[0]


def test_lora_trains_adapters_over_a_frozen_base_that_is_also_the_reference():
    setup = Setup(grpo(kl_coef=0.1), policy=config(lora_rank=2))
    setup.frozen["reference"] = {}  # stands for: the base under the policy's adapters
    base, before = host(setup.frozen["policy"]), host(setup.state.params)
    experience = setup.experience(rollouts(4, 2))
    # Adapters begin as the identity, so policy and reference agree.
    assert_close(experience.logprobs, experience.ref_logprobs, atol=1e-6)
    paths = jax.tree_util.tree_leaves_with_path(before)
    assert all("lora_" in jax.tree_util.keystr(path) for path, _ in paths)
    metrics = [setup.update(experience)["update/loss"][0] for _ in range(4)]
    assert largest_change(setup.state.params, before) > 1e-4
    assert metrics[-1] < metrics[0]
    assert_equal(setup.frozen["policy"], base)


def marked_batch(prompts, samples, extra):
    """Every row says which group it belongs to."""
    group = np.arange(prompts * samples) // samples
    batch = rollouts(prompts, samples)
    zeros = np.zeros(batch.tokens.shape, np.float32)
    mark = zeros + group[:, None].astype(np.float32)
    experience = Experience(
        rollouts=batch,
        scores=scores(batch),
        logprobs=mark,
        ref_logprobs=zeros,
        values=zeros,
        extra={"rows": texts(extra, 4)},
    )
    return Batch(experience, Targets(advantages=mark, returns=zeros, mask=batch.mask))


def test_groups_stay_whole_and_every_leaf_moves_alike():
    samples, prompts = 3, 8
    batch = jax.tree.map(jnp.asarray, marked_batch(prompts, samples, extra=12))
    orders = []
    for epoch in range(2):
        key = jax.random.fold_in(jax.random.key(0), epoch)
        chunks = host(split_groups(permute_groups(batch, key, samples), 4, samples))
        rows = chunks.experience.logprobs[..., 0]  # [4 chunks, 6 rows]
        np.testing.assert_array_equal(rows, chunks.targets.advantages[..., 0])
        groups = rows.reshape(4, 2, samples)
        assert (groups == groups[..., :1]).all()
        np.testing.assert_array_equal(
            groups[..., 0], chunks.experience.rollouts.prompts.record.astype(float)
        )
        np.testing.assert_array_equal(
            chunks.experience.rollouts.sample.reshape(4, 2, samples),
            np.broadcast_to(np.arange(samples), (4, 2, samples)),
        )
        assert sorted(groups[..., 0].ravel()) == list(range(prompts))
        extra = chunks.experience.extra["rows"].tokens.reshape(12, 4)
        before = np.asarray(batch.experience.extra["rows"].tokens)
        np.testing.assert_array_equal(np.sort(extra, axis=0), np.sort(before, axis=0))
        orders.append(groups[..., 0].ravel().tolist())
    assert orders[0] != orders[1]


def test_impossible_sizes_are_named(sharded):
    args = (sharded.models, sharded.algorithm, sharded.optimizers)
    sizes = dict(epochs=1, minibatches=1, microbatches=1, temperature=1.0, group_size=2)
    with pytest.raises(ValueError, match="minibatches=0"):
        make_update_step(*args, **(sizes | {"minibatches": 0}))
    with pytest.raises(ValueError, match="needs 2 or more"):
        make_update_step(sharded.models, grpo(), args[2], **(sizes | {"group_size": 1}))
    with pytest.raises(ValueError, match=r"6 prompts do not split into minibatches=2 x micro"):
        sharded.update(sharded.experience(rollouts(6, 2)))
    with pytest.raises(ValueError, match="groups of 4, but group_size=2"):
        sharded.update(sharded.experience(rollouts(8, 4)))


def test_a_step_refuses_to_run_outside_its_mesh(sharded):
    experience = sharded.experience(rollouts(8, 2))
    with pytest.raises(ValueError, match="set_mesh"):
        sharded.update_step(sharded.state, sharded.frozen, experience, jax.random.key(0))
