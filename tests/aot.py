"""Programs compiled for TPUs that are not there, and what their machine code says.

libtpu compiles for a named topology without a device; the compiled program tells the bytes it
needs on each chip, and its text every buffer, copy and collective.
"""

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.mesh import make_mesh, shardings_for, spec_for
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import Model, decoder
from rlhf_jax.rewards.base import combine
from rlhf_jax.rewards.outcome_model import outcome_model
from rlhf_jax.rewards.process_model import process_model
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.training.experience import (
    compile_evaluate,
    compile_score,
    make_evaluate_step,
    make_experience,
)
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import Models, abstract_state
from rlhf_jax.training.update import compile_update, make_update_step
from rlhf_jax.types import Prompts, Rollouts, TokenTables

STEPS = ("generate", "score", "evaluate", "update")


class Sizes(NamedTuple):
    """One PPO iteration. ``microbatches`` are per minibatch, of which there are two."""

    config: ModelConfig
    axes: dict[str, int]
    prompts: int
    samples: int
    prompt_tokens: int
    max_tokens: int
    microbatches: int

    @property
    def rows(self) -> int:
        """Rollouts in one microbatch."""
        return self.prompts * self.samples // (2 * self.microbatches)


class Program(NamedTuple):
    """A compiled step with the abstract arguments it was lowered for."""

    arguments: tuple
    compiled: Any


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology such as "v5p:2x2x4": 16 chips, none of them real."""
    # A second process may load the library too, and none waits for a metadata server.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


# The four steps, lowered from shapes alone.


class Iteration:
    """The four steps of PPO with two learned rewards, from shapes with shardings."""

    def __init__(self, sizes: Sizes, devices: list[jax.Device]):
        config = sizes.config
        self.sizes, self.mesh = sizes, make_mesh(sizes.axes, devices=devices)
        headless = functools.partial(dataclasses.replace, config, lm_head=False)
        self.models = Models(
            policy=decoder(config),
            value=decoder(headless(score_heads=("value",))),
            reference=decoder(config),
        )
        self.algorithm = ppo()
        self.optimizers = {role: make_optimizer(learning_rate=1e-6) for role in ("policy", "value")}
        judges = {name: decoder(headless(score_heads=(name,))) for name in ("outcome", "process")}
        learned = {name: self.params(model) for name, model in judges.items()}
        self.reward = combine(
            {
                "outcome": (self._reward(outcome_model, judges, learned, "outcome"), 1.0),
                "process": (self._reward(process_model, judges, learned, "process"), 1.0),
            }
        )
        self.state = abstract_state(
            {
                "policy": self.params(self.models.policy),
                "value": self.params(self.models.value),
            },
            self.optimizers,
            self.algorithm.init,
            self.mesh,
        )
        reference = self.params(self.models.reference)
        self.frozen = {"policy": {}, "value": {}, "reference": reference}

    def _reward(self, factory, judges, learned, name):
        return factory(model=judges[name], params=learned[name], rows=self.sizes.rows)

    def params(self, model: Model) -> Any:
        """Abstract parameters, sharded by the model's rules."""
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        return _with_shardings(shapes, shardings_for(model.axes(), shapes, self.mesh, model.rules))

    def rows(self, tree: Any) -> Any:
        """Abstract leaves with their leading axis split as rows of a batch."""
        rules = self.models.policy.rules

        def sharding(x):
            logical = ("batch",)[: x.ndim] + (None,) * (x.ndim - 1)
            return NamedSharding(self.mesh, spec_for(logical, x.shape, self.mesh, rules))

        return _with_shardings(tree, jax.tree.map(sharding, tree))

    def whole(self, tree: Any) -> Any:
        """Abstract leaves that every device holds whole."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return _with_shardings(tree, jax.tree.map(lambda _: replicated, tree))

    @functools.cached_property
    def rollouts(self) -> Rollouts:
        """What `generate` returns; that it lies like this is a test of its own."""
        return self.rows(jax.eval_shape(self._sample, *self.arguments("generate")))

    def arguments(self, step: str) -> tuple:
        """The abstract arguments of one of `STEPS`."""
        params = self.state.params
        if step == "score":
            return self.reward.init(), self.rollouts
        if step == "evaluate":
            return params, self.frozen, self.rollouts
        if step == "update":
            return self.state, self.frozen, self._experience(), self._key()
        sizes = self.sizes
        return (
            params["policy"],
            self.rows(_abstract_prompts(sizes.prompts, sizes.prompt_tokens)),
            self._key(),
            self.whole(jax.eval_shape(make_sampling)),
            self.whole(jax.eval_shape(lambda: _tables(sizes.config.vocab_size))),
            self.whole(jax.ShapeDtypeStruct((), jnp.int32)),
        )

    @functools.cache  # noqa: B019 - programs live as long as the iteration
    def program(self, step: str) -> Program:
        """One of `STEPS` compiled, as training compiles it."""
        compiled = {
            "generate": lambda: jax.jit(self._sample),
            "score": lambda: compile_score(self.reward.score).compiled,
            "evaluate": lambda: compile_evaluate(self._evaluate, self.mesh),
            "update": lambda: compile_update(self._update(), self.state, self.mesh),
        }[step]()
        arguments = self.arguments(step)
        with jax.set_mesh(self.mesh):
            return Program(arguments, compiled.lower(*arguments).compile())

    def _sample(self, params, prompts, key, sampling, tables, version):
        return generate(
            self.models.policy, params, {}, prompts, key, samples=self.sizes.samples,
            sampling=sampling, max_tokens=self.sizes.max_tokens, tables=tables, version=version,
            mesh=self.mesh,
        )  # fmt: skip

    @property
    def _evaluate(self):
        return make_evaluate_step(
            self.models, self.algorithm.needs, temperature=1.0, rows=self.sizes.rows
        )

    def _update(self):
        return make_update_step(
            self.models, self.algorithm, self.optimizers, epochs=1, minibatches=2,
            microbatches=self.sizes.microbatches, temperature=1.0, group_size=self.sizes.samples,
        )  # fmt: skip

    def _experience(self):
        def build(params, frozen, state, rollouts):
            outputs = self._evaluate(params, frozen, rollouts)
            return make_experience(rollouts, self.reward.score(state, rollouts)[0], *outputs, {})

        params, frozen, rollouts = self.arguments("evaluate")
        return self.rows(jax.eval_shape(build, params, frozen, self.reward.init(), rollouts))

    def _key(self):
        return self.whole(jax.eval_shape(lambda: jax.random.key(0)))


def _with_shardings(shapes, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _abstract_prompts(rows: int, width: int) -> Prompts:
    def build():
        tokens, row = jnp.zeros((rows, width), jnp.int32), jnp.zeros(rows, jnp.int32)
        return Prompts(tokens=tokens, mask=tokens == 0, record=row, source=row, draw=row)

    return jax.eval_shape(build)


def _tables(vocab: int) -> TokenTables:
    table = jnp.zeros(vocab, bool)
    return TokenTables(
        ends_text=table,
        ends_step=table,
        text_before=table,
        text_after=table,
        pad=jnp.zeros((), jnp.int32),
    )
