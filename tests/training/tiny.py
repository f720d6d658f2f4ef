"""A tiny real model, rollouts of it and everything an update needs; imported by the tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.mesh import ShardingRules, make_mesh, shard_batch, shardings_for
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import decoder
from rlhf_jax.training.experience import compile_evaluate, make_evaluate_step, make_experience
from rlhf_jax.training.state import Models, create_state
from rlhf_jax.training.update import compile_update, make_update_step
from rlhf_jax.types import Prompts, Rollouts, Scores, Texts

VOCAB = 16
RULES = ShardingRules()


def config(**changes):
    sizes = dict(
        vocab_size=VOCAB, width=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp_width=24
    )
    return ModelConfig(**(sizes | dict(remat="full", logprob_chunk=4) | changes))


def one_device():
    return make_mesh({}, devices=jax.devices()[:1])


@functools.cache
def init_config(model_config, seed, mesh):
    model = decoder(model_config, RULES)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def fill(path, leaf, sharding):
        name = path[-1].key
        if name in ("lora_b", "bias"):
            values = np.zeros(leaf.shape)
        else:
            values = (name == "scale") + 0.2 * rng.normal(size=leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), sharding)

    shardings = shardings_for(model.axes(), shapes, mesh, RULES)
    return jax.tree_util.tree_map_with_path(fill, shapes, shardings)


def init(model, seed, mesh):
    """Parameters of a model; the same arrays on every call, so a step that spoiled them would
    be seen. Drawn on the host: compiling `model.init` takes longer than a whole test."""
    return init_config(model.config, seed, mesh)


def texts(rows, length, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, length + 1, rows)
    mask = np.arange(length)[None] < sizes[:, None]
    tokens = np.where(mask, rng.integers(0, VOCAB, (rows, length)), 0)
    return Texts(
        tokens=tokens.astype(np.int32),
        mask=mask,
        loss_mask=mask & (np.arange(length)[None] > 0),
        segment=mask.astype(np.int32),
    )


def rollouts(prompts, samples, prompt_length=3, length=6, seed=0):
    """Random completions; log-probs of the sampler are left at 0."""
    rng = np.random.default_rng(seed)
    rows = prompts * samples
    real = rng.integers(1, prompt_length + 1, prompts)
    sizes = rng.integers(1, length + 1, rows)
    mask = np.arange(length)[None] < sizes[:, None]
    zeros = np.zeros((rows, length), np.float32)
    return Rollouts(
        prompts=Prompts(
            tokens=rng.integers(0, VOCAB, (prompts, prompt_length)).astype(np.int32),
            mask=np.arange(prompt_length)[None] >= prompt_length - real[:, None],
            record=np.arange(prompts, dtype=np.int32),
            source=np.zeros(prompts, np.int32),
            draw=np.zeros(prompts, np.int32),
        ),
        tokens=rng.integers(0, VOCAB, (rows, length)).astype(np.int32),
        mask=mask,
        step_ends=mask & (np.arange(length)[None] % 3 == 2),
        logprobs=zeros,
        behaviour_logprobs=zeros,
        truncated=sizes == length,
        sample=np.tile(np.arange(samples, dtype=np.int32), prompts),
        version=np.zeros(rows, np.int32),
    )


def scores(batch, seed=1):
    rng = np.random.default_rng(seed)
    outcome = rng.normal(size=batch.tokens.shape[0]).astype(np.float32)
    process = rng.normal(size=batch.tokens.shape).astype(np.float32)
    process = np.where(batch.step_ends, process, np.float32(0))
    return Scores(outcome=outcome, process=process, parts={"toy": outcome})


class Setup:
    """Models, state and compiled steps of one algorithm on one mesh."""

    def __init__(
        self,
        algorithm,
        *,
        mesh=None,
        policy=None,
        value=None,
        optimizers=None,
        group_size=2,
        rows=None,
        epochs=1,
        minibatches=1,
        microbatches=1,
        temperature=0.7,
    ):
        self.mesh = mesh or one_device()
        self.algorithm, self.group_size, self.rows = algorithm, group_size, rows
        policy = policy or config()
        reference = decoder(config(), RULES) if algorithm.needs.reference else None
        self.models = Models(
            policy=decoder(policy, RULES),
            value=decoder(value, RULES) if value else None,
            reference=reference,
        )
        self.params, self.frozen = {}, {"policy": {}, "value": {}}
        roles = {"policy": self.models.policy} | ({"value": self.models.value} if value else {})
        self.optimizers = optimizers or {role: optax.adam(1e-2) for role in roles}
        with jax.set_mesh(self.mesh):
            for seed, (role, model) in enumerate(roles.items()):
                tree = init(model, seed, self.mesh)
                self.params[role], self.frozen[role] = partition(tree, model.config)
            if reference is not None:
                self.frozen["reference"] = init(reference, 7, self.mesh)
        self.reset()
        step = make_update_step(
            self.models,
            algorithm,
            self.optimizers,
            epochs=epochs,
            minibatches=minibatches,
            microbatches=microbatches,
            temperature=temperature,
            group_size=group_size,
        )
        self.update_step = compile_update(step, self.state, self.mesh)
        self.evaluate_step = compile_evaluate(
            make_evaluate_step(self.models, algorithm.needs, temperature=temperature, rows=rows),
            self.mesh,
        )

    def reset(self):
        """Back to the first state."""
        self.state = create_state(
            self.models, self.params, self.optimizers, self.algorithm, self.mesh
        )

    def experience(self, batch, batch_scores=None, extra=None):
        put = lambda tree: shard_batch(self.mesh, RULES, tree)  # noqa: E731
        batch, batch_scores, extra = put(
            (batch, scores(batch) if batch_scores is None else batch_scores, extra or {})
        )
        with jax.set_mesh(self.mesh):
            outputs = self.evaluate_step(self.state.params, self.frozen, batch)
            return make_experience(batch, batch_scores, *outputs, extra)

    def update(self, experience, seed=0):
        """One update of `self.state`; returns the metrics as (total, count) on the host."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.update_step(
                self.state, self.frozen, experience, jax.random.key(seed)
            )
        return {name: (float(m.total), float(m.count)) for name, m in metrics.items()}


def host(tree):
    return jax.tree.map(np.asarray, tree)


def assert_equal(a, b):
    """Two trees of arrays, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


def assert_close(a, b, atol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), host(a), host(b))


def largest_change(a, b):
    changes = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), host(a), host(b))
    return max(jax.tree.leaves(changes))
