"""Samples of a trained policy for a range of problems, decoded: for labelling and evaluation."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlhf_jax import build, roles
from rlhf_jax.mesh import batch_shards, fetch_host
from rlhf_jax.models.transformer import decoder
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.text.steps import token_tables
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.types import Sampling


class Completion(NamedTuple):
    """One sampled completion, decoded, with the record its prompt was made from."""

    prompt: str
    completion: str
    ended: bool
    record: Mapping[str, Any]


class PolicySampler:
    """Draws ``rollout.samples`` completions of each problem of ``data`` with the policy of
    ``model.init_from``, in batches of ``rollout.prompts`` problems.

    Raises:
        ValueError: for bad input, before any device is touched.
    """

    def __init__(self, config: ConfigDict, purpose: Purpose):
        if not config.model.init_from:
            raise ValueError("model.init_from is empty; name the run or folder to sample from")
        self.text = build.tokenizer(config)
        self._config, self._purpose = config, purpose
        self._mesh, rules = build.mesh(config)
        if config.rollout.prompts % batch_shards(self._mesh, rules):
            raise ValueError(
                f"rollout.prompts={config.rollout.prompts} does not divide over the mesh's "
                f"{batch_shards(self._mesh, rules)} batch shards"
            )
        self._prompts = build.prompts(config, self.text)
        described = roles.describe(config.model, self.text.vocab_size)
        self._model = decoder(described, rules)
        self._tables = token_tables(self.text, vocab_size=described.vocab_size)
        self._params = None

        def sample(params, prompts, key, sampling, tables):
            return generate(
                self._model, params, {}, prompts, key, samples=config.rollout.samples,
                sampling=sampling, max_tokens=config.rollout.max_tokens, tables=tables,
                version=jnp.zeros((), jnp.int32), mesh=self._mesh,
            )  # fmt: skip

        self._sample = jax.jit(sample)

    def __len__(self) -> int:
        """How many problems the data has."""
        return len(self._prompts)

    def groups(self, problems: int, sampling: Sampling | None = None) -> Iterator[list[Completion]]:
        """The completions of the first ``problems`` problems, one list each.

        Args:
            sampling: in place of the config's; the program is not compiled anew.
        """
        config, rules, n = self._config, self._model.rules, self._config.rollout.prompts
        sampling = make_sampling(**config.rollout.sampling) if sampling is None else sampling
        with jax.set_mesh(self._mesh):
            if self._params is None:
                loaded = roles.load(config.model.init_from, self._mesh, rules)
                key = step_key(config.seed, Purpose.INIT_POLICY, 0)
                self._params = roles.fill(self._model, loaded, key, self._mesh, rules)
            for first in range(0, problems, n):
                prompts = build.fetch(self._mesh, rules, self._prompts, first, n)
                key = step_key(config.seed, self._purpose, first)
                rollouts = self._sample(self._params, prompts, key, sampling, self._tables)
                yield from self._decode(rollouts)[: problems - first]

    def _decode(self, rollouts) -> list[list[Completion]]:
        host = fetch_host(rollouts)
        k = host.group_size
        groups = []
        for i in range(len(host.prompts.tokens)):
            prompts = host.prompts
            prompt = self.text.decode(prompts.tokens[i][prompts.mask[i]].tolist())
            record = self._prompts.record(int(prompts.source[i]), int(prompts.record[i]))
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
