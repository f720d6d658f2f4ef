"""Samples of a trained policy for a range of problems, decoded: for labelling and evaluation."""

from collections.abc import Iterator, Mapping, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Key
from ml_collections import ConfigDict

from rlhf_jax import build, roles
from rlhf_jax.compile_watch import CompileWatch
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.mesh import ShardingRules, batch_shards, fetch_host, shard_batch
from rlhf_jax.models.completions import embed_completions, evaluate_completions
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.passes import check_positions
from rlhf_jax.models.transformer import decoder
from rlhf_jax.ops.masking import masked_sum
from rlhf_jax.parts import weights_digest
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.schema import within
from rlhf_jax.text.steps import token_tables
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.types import Array, Params, Prompts, Rollouts, Sampling


class Completion(NamedTuple):
    """One sampled completion, decoded, with the record its prompt was made from."""

    prompt: str
    completion: str
    ended: bool
    record: Mapping[str, Any]


class SamplerPlan(NamedTuple):
    """What a sampler is made of, without parameters."""

    text: Tokenizer
    mesh: Mesh
    rules: ShardingRules
    prompts: PromptSource
    described: ModelConfig


def of_policy(config: ConfigDict, name: str) -> ConfigDict:
    """The config of an evaluation with the folder of one of its ``policies`` as its model's."""
    own = config.copy_and_resolve_references()
    own.model.init_from = config.policies[name].init_from
    return own


def check_problems(path: str, problems: int, prompts: Sized) -> None:
    """Raises a ValueError for more problems than the data has: none may come twice."""
    if problems > len(prompts):
        raise ValueError(f"{path}={problems} but data has {len(prompts)}; set {path}")


def plan_sampler(config: ConfigDict, path: str = "model") -> SamplerPlan:
    """Checks ``config`` and builds all that needs no parameters.

    Args:
        path: the section in which ``model.init_from`` was named, for messages.

    Raises:
        ValueError: naming the field, what it is and what would be right.
    """
    folder = config.model.init_from
    if not folder:
        raise ValueError(f"{path}.init_from is empty; name the run or folder to sample from")
    text = build.tokenizer(config)
    mesh, rules = build.mesh(config)
    if config.rollout.prompts % batch_shards(mesh, rules):
        raise ValueError(
            f"rollout.prompts={config.rollout.prompts} does not divide over the mesh's "
            f"{batch_shards(mesh, rules)} batch shards; set rollout.prompts, or mesh.data and "
            "mesh.fsdp"
        )
    build.check_sampling(config.rollout.sampling)
    roles.describe(ConfigDict(dict(init_from=folder)), text.vocab_size, path=path)
    described = roles.describe(config.model, text.vocab_size)
    prompt, tokens = config.data.max_prompt, config.rollout.max_tokens
    with within(f"data.max_prompt={prompt} and rollout.max_tokens={tokens}"):
        check_positions(described, prompt + tokens)
    return SamplerPlan(text, mesh, rules, build.prompts(config, text), described)


class PolicySampler:
    """Draws ``rollout.samples`` completions of each problem of ``data`` with the policy of
    ``model.init_from``, in batches of ``rollout.prompts`` problems.

    Args:
        path: the section in which ``model.init_from`` was named, for messages.

    Raises:
        ValueError: for bad input, before any device is touched.
    """

    def __init__(self, config: ConfigDict, purpose: Purpose, path: str = "model"):
        plan = plan_sampler(config, path)
        roles.check_start(path, config.model.init_from)
        self._config, self._purpose = config, purpose
        self.text, self._mesh, self.prompts = plan.text, plan.mesh, plan.prompts
        self._model = decoder(plan.described, plan.rules)
        self.tables = token_tables(self.text, vocab_size=plan.described.vocab_size)
        self._params = None
        self.compiles = CompileWatch()

        def sample(params, prompts, key, sampling, tables, samples):
            return generate(
                self._model, params, {}, prompts, key, samples=samples,
                sampling=sampling, max_tokens=config.rollout.max_tokens, tables=tables,
                version=jnp.zeros((), jnp.int32), mesh=self._mesh,
            )  # fmt: skip

        def read(params, rollouts):
            return evaluate_completions(
                self._model, params, {}, rollouts, temperature=1.0, rows=None
            ).logprobs

        def embed(params, rollouts):
            return embed_completions(self._model, params, {}, rollouts)

        self._embed = jax.jit(embed)
        self._sample = jax.jit(sample, static_argnames="samples")
        self._read = jax.jit(read)

    def __len__(self) -> int:
        """How many problems the data has."""
        return len(self.prompts)

    def groups(self, problems: int, sampling: Sampling | None = None) -> Iterator[list[Completion]]:
        """The completions of the first ``problems`` problems, one list each.

        Args:
            sampling: in place of the config's; the program is not compiled anew.
        """
        for first, rollouts in self.batches(problems, sampling):
            yield from self.decode(rollouts)[: problems - first]

    def batches(
        self,
        problems: int,
        sampling: Sampling | None = None,
        *,
        start: int = 0,
        samples: int | None = None,
    ) -> Iterator[tuple[int, Rollouts]]:
        """Batches as (index of the first problem, rollouts on the devices), as in `groups`.

        The last batch is whole: its problems from ``problems`` on are of no use.

        Args:
            start: the first problem of the first batch, where earlier ones are done; a multiple of
                the batch.
            samples: in place of ``rollout.samples``.
        """
        config, rules, n = self._config, self._model.rules, self._config.rollout.prompts
        with jax.set_mesh(self._mesh):
            for first in self.compiles.loop(range(start, problems, n)):
                prompts = build.fetch(self._mesh, rules, self.prompts, first, n)
                key = step_key(config.seed, self._purpose, first)
                yield first, self.complete(prompts, key, sampling, samples=samples)

    def complete(
        self,
        prompts: Prompts,
        key: Key[Array, ""],
        sampling: Sampling | None = None,
        *,
        samples: int | None = None,
    ) -> Rollouts:
        """Completions of any prompts, which are tokens of this policy; see `batches`.

        Args:
            prompts: on the devices; each width is a program of its own.
            key: holds (seed, purpose, step).
        """
        rollout = self._config.rollout
        sampling = make_sampling(**rollout.sampling) if sampling is None else sampling
        samples = rollout.samples if samples is None else samples
        with jax.set_mesh(self._mesh):
            return self._sample(self._load(), prompts, key, sampling, self.tables, samples=samples)

    def place(self, rows: Any) -> Any:
        """A host batch, equal on every process, on the devices: each holds its share of rows."""
        return shard_batch(self._mesh, self._model.rules, rows)

    def logprobs(self, rollouts: Rollouts) -> Float[Array, "B T"]:
        """What this policy, at temperature 1, says about completions of any policy: the log-prob
        of each token in nats, 0 at padding."""
        with jax.set_mesh(self._mesh):
            return self._read(self._load(), rollouts)

    def embed(self, rollouts: Rollouts) -> Float[np.ndarray, "B D"]:
        """The mean hidden state of prompt and completion, of completions of any policy."""
        with jax.set_mesh(self._mesh):
            return fetch_host(self._embed(self._load(), rollouts))

    def log_ratio(self, reference: "PolicySampler", rollouts: Rollouts) -> Float[np.ndarray, " B"]:
        """log policy - log reference of each completion in nats; over own samples of temperature 1
        its mean is the KL."""
        gap = self.logprobs(rollouts) - reference.logprobs(rollouts)
        return fetch_host(masked_sum(gap, rollouts.mask, axis=-1))

    def digest(self) -> str:
        """What tells this policy's weights from others; see `parts.weights_digest`."""
        with jax.set_mesh(self._mesh):
            return weights_digest(self._load())

    def _load(self) -> Params:
        """The policy's parameters; read once."""
        if self._params is None:
            config, rules = self._config, self._model.rules
            dtype = self._model.config.param_dtype
            loaded = roles.load(config.model.init_from, self._mesh, rules, dtype=dtype)
            key = step_key(config.seed, Purpose.INIT_POLICY, 0)
            self._params = roles.fill(self._model, loaded, key, self._mesh, rules)
        return self._params

    def release(self) -> None:
        """Gives the parameters' memory back; they are read again when they are needed."""
        self._params = None

    def record(self, source: int, index: int) -> Mapping[str, Any]:
        """The record that ``Prompts.source`` and ``Prompts.record`` name."""
        return self.prompts.record(source, index)

    def decode(self, rollouts: Rollouts) -> list[list[Completion]]:
        """The completions of a batch as text, one list for each of its problems."""
        host = fetch_host(rollouts)
        k = host.group_size
        groups = []
        for i in range(len(host.prompts.tokens)):
            prompts = host.prompts
            prompt = self.text.decode(prompts.tokens[i][prompts.mask[i]].tolist())
            record = self.record(int(prompts.source[i]), int(prompts.record[i]))
            groups.append(
                [
                    Completion(
                        prompt=prompt,
                        completion=self.text.decode(host.tokens[b][host.mask[b]].tolist()),
                        ended=not bool(host.truncated[b]),
                        record=record,
                    )
                    for b in range(i * k, (i + 1) * k)
                ]
            )
        return groups
