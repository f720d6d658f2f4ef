"""One program serves all sampling values and lengths of a bucket; another bucket costs one more."""

import jax
import numpy as np
import pytest

from rlhf_jax.algorithms.grpo import grpo
from rlhf_jax.algorithms.wrappers import correction
from rlhf_jax.models.transformer import decoder
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.training.experience import (
    exact_options,
    make_evaluate_step,
    make_experience,
    on_mesh,
)
from rlhf_jax.training.monitor import batch_metrics
from rlhf_jax.training.state import Models, create_state
from rlhf_jax.training.update import compile_update, make_update_step
from rlhf_jax.types import TokenTables
from tests.training import tiny

K, PROMPTS, TOKENS, STEPS = 2, 2, 6, 20


def tables(ends):
    """The same meaning of ids for all steps but for which of them end a text."""
    none = np.zeros(tiny.VOCAB, bool)
    ends_text = none.copy()
    ends_text[list(ends)] = True
    return TokenTables(
        ends_text=ends_text,
        ends_step=none,
        text_before=~none,
        text_after=none,
        pad=np.asarray(0, np.int32),
    )


class Loop:
    """The steps of an iteration with the temperature as an argument of each, and K as a static one
    where it cannot be seen from the arrays."""

    def __init__(self):
        algorithm = correction(grpo(kl_coef=0.0), how="tis")
        self.mesh, self.algorithm = tiny.one_device(), algorithm
        model = decoder(tiny.config(layers=1), tiny.RULES)
        models = Models(policy=model, value=None, reference=None)
        optimizers = {"policy": tiny.optax.sgd(0.1)}
        with jax.set_mesh(self.mesh):
            params = {"policy": tiny.init(model, 0, self.mesh)}
            self.state = create_state(models, params, optimizers, algorithm, self.mesh)
        self.frozen = {"policy": {}, "value": {}, "reference": {}}

        def sample(params, prompts, key, sampling, table, version, samples):
            return generate(
                model, params, {}, prompts, key, samples=samples, sampling=sampling,
                max_tokens=TOKENS, tables=table, version=version,
            )  # fmt: skip

        def evaluate(params, rollouts, temperature):
            rows = rollouts.tokens.shape[0]
            step = make_evaluate_step(models, algorithm.needs, temperature=temperature, rows=rows)
            return step(params, self.frozen, rollouts)

        def update(state, frozen, given, key):
            experience, temperature = given
            step = make_update_step(
                models, algorithm, optimizers, epochs=1, minibatches=1, microbatches=1,
                temperature=temperature, group_size=experience.rollouts.group_size,
            )  # fmt: skip
            return step(state, frozen, experience, key)

        def monitor(experience, entropy, step):
            return batch_metrics(experience, entropy, step, reference=False)

        self.sample = jax.jit(sample, static_argnames="samples")
        options = exact_options(self.mesh)
        self.evaluate = jax.jit(on_mesh(evaluate, self.mesh), compiler_options=options)
        self.monitor = jax.jit(monitor)
        self.update = compile_update(update, self.state, self.mesh)

    def run(self, step, *, width=3, samples=K, update=True):
        """One iteration with values of its own; its rollouts and metrics."""
        sampling = make_sampling(
            temperature=0.5 + 0.05 * step, top_k=3 + step, top_p=0.99 - 0.01 * step
        )
        prompts = tiny.rollouts(PROMPTS, samples, prompt_length=width, seed=step).prompts
        key = jax.random.key(step)
        with jax.set_mesh(self.mesh):
            params, at = self.state.params, self.state.step
            ends = tables(range(step % 4))
            rollouts = self.sample(params["policy"], prompts, key, sampling, ends, at, samples)
            outputs = self.evaluate(params, rollouts, sampling.temperature)
            scores = tiny.scores(jax.device_get(rollouts), seed=step)
            experience = make_experience(rollouts, scores, *outputs, {})
            metrics = self.monitor(experience, outputs[0].entropy, at)
            if update:
                given = (experience, sampling.temperature)
                self.state, found = self.update(self.state, self.frozen, given, key)
                metrics |= found
        return rollouts, {name: float(m.total) for name, m in metrics.items()}

    def compiled(self):
        steps = (self.sample, self.evaluate, self.monitor, self.update)
        return [step._cache_size() for step in steps]


def test_twenty_steps_of_changing_values_compile_once_and_a_wider_bucket_once_more():
    loop, lengths, prompts = Loop(), set(), set()
    for step in range(STEPS):
        rollouts, metrics = loop.run(step)
        lengths |= set(np.asarray(rollouts.mask).sum(1).tolist())
        prompts |= set(np.asarray(rollouts.prompts.mask).sum(1).tolist())
        # The trainer divides by the temperature of this very step, as the sampler did.
        assert metrics["policy/sampler_gap"] < 1e-4
        assert metrics["update/first_logprob_gap"] == 0.0
        assert metrics["rollout/staleness"] == 0.0
        # What top-k and top-p cut off is what π_roll has and π_old has not.
        assert metrics["policy/max_log_weight"] > 1e-3
    assert loop.compiled() == [1, 1, 1, 1]
    assert len(lengths) > 3 and len(prompts) == 3
    assert int(loop.state.step) == STEPS
    loop.run(0, width=4, update=False)  # the update's compiling takes as long as all others'
    assert loop.compiled() == [2, 2, 2, 1]


@pytest.mark.slow
def test_a_new_bucket_and_a_new_k_cost_one_program_of_each_step():
    loop = Loop()
    for known, sizes in enumerate([{}, dict(width=4), dict(samples=4)], start=1):
        loop.run(0, **sizes)
        assert loop.compiled() == [known] * 4
    for sizes in [dict(samples=4), dict(width=4), {}]:  # each was met before
        loop.run(1, **sizes)
    assert loop.compiled() == [3] * 4
