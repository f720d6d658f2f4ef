"""A policy run at work: its state at step 0, its compiled steps, and where its data comes from."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax import averages, build, controls, implicit_start, roles
from rlhf_jax.models.lora import partition
from rlhf_jax.models.transformer import decoder
from rlhf_jax.ops.masking import fill_padding
from rlhf_jax.ops.metrics import single
from rlhf_jax.policy_plan import PolicyPlan
from rlhf_jax.reference_answers import Answers, own_writer, references
from rlhf_jax.rewards.base import lend_base
from rlhf_jax.rewards.other_tokens import translated
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.training.critic import make_critic_step
from rlhf_jax.training.experience import (
    COMPILER_OPTIONS,
    compile_evaluate,
    compile_score,
    constrain_rows,
    make_evaluate_step,
)
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.training.monitor import batch_metrics, signal_metrics
from rlhf_jax.training.one_pass import Report, fits_one_pass, make_one_pass_step
from rlhf_jax.training.selection import refill
from rlhf_jax.training.state import create_state
from rlhf_jax.training.update import compile_update, make_update_step
from rlhf_jax.types import (
    Metrics,
    Params,
    Prompts,
    Reward,
    Rollouts,
    RunState,
    Texts,
    TrainState,
)


class Steps(NamedTuple):
    """The compiled programs of one iteration; the last six are None where nobody needs them.

    monitor: what a batch says before its update; None where the update says it (`one_pass`).
    """

    generate: Callable[..., Rollouts]
    score: Callable[..., Any] | None
    evaluate: Callable[..., Any]
    monitor: Callable[..., Any] | None
    update: Callable[..., Any]
    select: Callable[..., Any] | None
    refill: Callable[..., Any] | None
    update_critic: Callable[..., Any] | None
    adapt_kl_coef: Callable[..., Any] | None
    move_reference: Callable[..., Any] | None
    update_rewards: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class PolicyRun:
    """A plan with its rewards by place ("device", "host") and its compiled steps."""

    plan: PolicyPlan
    rewards: Mapping[str, Reward]
    steps: Steps

    def frozen(self, state: RunState) -> dict[str, Params]:
        """The trees that no step donates, by role: adapters' bases and the reference."""
        models = self.plan.models
        bases = {
            role: state.reference if model is not None and model.config.lora_rank else {}
            for role, model in (("policy", models.policy), ("value", models.value))
        }
        return {**bases, "reference": state.reference}

    def sample(self, state: RunState, position: int, key: jax.Array) -> Rollouts:
        """Completions for the N prompts from ``position`` on, by the policy as it is."""
        return self.steps.generate(
            state.train.params["policy"],
            self.frozen(state)["policy"],
            self.fetch_prompts(position),
            key,
            self.plan.sampling,
            self.plan.tables,
            state.train.step,
        )

    def fetch_prompts(self, position: int) -> Prompts:
        """The N prompts from ``position`` on; each process reads only its own rows."""
        plan = self.plan
        return build.fetch(plan.mesh, plan.rules, plan.prompts, position, plan.sizes.prompts)

    def fetch_extra(self, state: RunState) -> dict[str, Texts]:
        """One batch of every auxiliary source."""
        plan, batches = self.plan, {}
        for name, source in plan.extra.items():
            n, position = plan.config.extra[name].rows, int(state.data_position[f"extra/{name}"])
            batches[name] = build.fetch(plan.mesh, plan.rules, source, position, n)
        return batches

    def advance(self, state: RunState, *, position=None, extra=False, **fields) -> RunState:
        """``state`` with fields replaced and data positions moved on."""
        positions = dict(state.data_position)
        if position is not None:
            positions["prompts"] = np.asarray(position, np.int32)
        if extra:
            for name in self.plan.extra:
                moved = int(positions[f"extra/{name}"]) + self.plan.config.extra[name].rows
                positions[f"extra/{name}"] = np.asarray(moved, np.int32)
        return dataclasses.replace(state, data_position=positions, **fields)

    def control(self, state: RunState, step: int, metrics: Metrics) -> tuple[RunState, Metrics]:
        """What the controllers make of a step of the policy, and what they say of it.

        Args:
            metrics: of this step, with the KL that was measured before its update.
        """
        found: Metrics = {}
        if self.steps.adapt_kl_coef is not None:
            kl_coef, kl = state.controllers[controls.KL_COEF], metrics["objective/kl_ref"]
            kl_coef, found = self.steps.adapt_kl_coef(kl_coef, kl)
            own = {**state.controllers, controls.KL_COEF: kl_coef}
            state = dataclasses.replace(state, controllers=own)
        if self.steps.move_reference is not None:
            made = step + 1 - self.plan.pretraining.steps  # steps of the policy
            due = made % self.plan.controls.reference.every == 0
            if due:
                policy = state.train.params["policy"]
                reference = self.steps.move_reference(state.reference, policy)
                state = dataclasses.replace(state, reference=reference)
            found = {**found, "controller/reference_moved": single(float(due))}
        return state, found


def start(plan: PolicyPlan) -> tuple[PolicyRun, RunState]:
    """The run and its state at step 0: parameters born sharded, rewards calibrated."""
    config, mesh, rules, models = plan.config, plan.mesh, plan.rules, plan.models
    key = step_key(config.seed, Purpose.INIT_POLICY, 0)
    folder = config.model.get("init_from", "")
    dtype = models.policy.config.param_dtype
    loaded = roles.load(folder, mesh, rules, dtype=dtype) if folder else {}
    policy = roles.fill(models.policy, loaded, key, mesh, rules)
    del loaded  # a second copy of the model
    trained, base = partition(policy, models.policy.config)
    learned = _reward_params(plan, policy, base)
    params = {"policy": trained}
    if models.value is not None:
        params["value"] = _value_params(plan, policy, base, learned)
    reference = base
    if models.reference is not None and not base:
        reference = roles.fill(models.reference, policy, key, mesh, rules)
    rewards = _rewards(plan, learned)
    train = create_state(models, params, plan.optimizers, plan.algorithm, mesh)
    initial = {place: _initial(reward, mesh) for place, reward in rewards.items()}
    learning = _reward_update(rewards.get("device"), initial)
    steps = _compile(plan, rewards, train, reference)._replace(update_rewards=learning)
    run = PolicyRun(plan, rewards, steps)
    names = ["prompts", *(f"extra/{name}" for name in plan.extra)]
    state = RunState(
        train=train,
        reference=reference,
        rewards=initial,
        controllers=controls.initial(plan.controls, mesh),
        carry={},
        data_position={name: np.asarray(0, np.int32) for name in names},
    )
    del policy, params, learned, train, initial  # the state has what lives on
    return run, _calibrate(run, state)


def _reward_params(plan: PolicyPlan, policy: Params, base: Params) -> dict[str, Params]:
    """Parameters of the learned rewards by label, of those on the policy's base adapters and heads
    alone; a folder that two rewards name is read once."""
    place = (plan.mesh, plan.rules)
    dtype = plan.described["policy"].param_dtype
    load = functools.cache(lambda folders: averages.load(folders, *place, dtype=dtype))
    learned, adapters = {}, {}
    for index, (label, section) in enumerate(plan.config.rewards.items()):
        if f"reward/{label}" not in plan.described:
            continue
        model = decoder(plan.described[f"reward/{label}"], plan.rules)
        folder = section.get("init_from", "")
        key = step_key(plan.config.seed, Purpose.INIT_REWARD, index)
        if implicit_start.on_policy_base(section, plan.config.model):
            learned[label] = roles.fill_adapters(model, {}, key, *place)
        elif implicit_start.adapters_of(section, plan.config.model) is not None:
            if folder not in adapters:
                adapters[folder] = roles.load_adapters(folder, f"rewards.{label}", base, *place)
            learned[label] = roles.fill_adapters(model, adapters[folder], key, *place)
        else:
            known = load(averages.folders_of(section)) if folder else policy
            learned[label] = roles.fill(model, known, key, *place)
    return learned


def _value_params(
    plan: PolicyPlan, policy: Params, base: Params, learned: Mapping[str, Params]
) -> Params:
    """What trains of the value model."""
    begin = plan.config.value.init_from
    if begin == "policy":
        known = policy
    elif begin in learned:
        known = roles.rename_head(learned[begin], "value")
    elif plan.models.value.config.lora_rank:
        adapters = roles.load_adapters(begin, "value", base, plan.mesh, plan.rules)
        known = roles.rename_head(adapters, "value")
    else:
        known = roles.rename_head(roles.load(begin, plan.mesh, plan.rules), "value")
    key = step_key(plan.config.seed, Purpose.INIT_VALUE, 0)
    return roles.fill_adapters(plan.models.value, known, key, plan.mesh, plan.rules)


def _rewards(plan: PolicyPlan, learned: Mapping[str, Params]) -> dict[str, Reward]:
    """The rewards by place; learned ones hold their parameters until their state is made."""
    members = {}
    for label, section in plan.config.rewards.items():
        resources = {
            "decode": plan.tokenizer.decode,
            "encode": plan.writers.get(label, plan.tokenizer).encode,
            "records": plan.prompts.record,
            "rows": plan.sizes.rows,
            "mesh": plan.mesh,
        }
        if "relative" in section:
            resources |= _references(plan, label)
        if label in learned:
            resources["model"] = decoder(plan.described[f"reward/{label}"], plan.rules)
            resources["params"] = learned[label]
            if implicit_start.compares(section):
                asked = (resources["model"], learned[label], plan.mesh, plan.rules)
                resources |= implicit_start.resources(plan.config, label, *asked)
        made = build.reward(label, section, resources)
        if label in plan.writers:
            texts = dict(decode=plan.tokenizer.decode, records=plan.prompts.record)
            made = translated(made, plan.writers[label], **texts)
        members[label] = (made, section.weight)
    return build.combined(members)


def _references(plan: PolicyPlan, label: str) -> dict[str, Any]:
    """What asks a reward for the scores of its reference answers, in the tokens that it reads."""
    answers = Answers(
        field=plan.config.rewards[label].relative.answers,
        prompts=plan.prompts,
        writer=plan.writers.get(label) or own_writer(plan.config, plan.tokenizer, plan.tables),
        rows=plan.sizes.prompts * plan.sizes.samples,
    )
    asks = references(label, answers, plan.mesh, plan.rules)
    return {"references": asks, "num_records": answers.records}


def _initial(reward: Reward, mesh: Mesh) -> Any:
    """A reward's state at step 0; of an online one in buffers of its own, as updates donate it, and
    laid out on the mesh, as they return it."""
    state = reward.init()
    if reward.update is None:
        return state
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        own = leaf.sharding
        on_mesh = isinstance(own, NamedSharding) and own.mesh == mesh
        return jax.device_put(jnp.copy(leaf), own if on_mesh else everywhere)

    return jax.tree.map(place, state)


def _compile(
    plan: PolicyPlan, rewards: Mapping[str, Reward], train: TrainState, reference: Params
) -> Steps:
    sizes, models, algorithm = plan.sizes, plan.models, plan.algorithm
    needs = algorithm.needs

    def sample(params, frozen, prompts, key, sampling, tables, version):
        return generate(
            models.policy, params, frozen, prompts, key, samples=sizes.samples,
            sampling=sampling, max_tokens=sizes.max_tokens, tables=tables, version=version,
            mesh=plan.mesh,
        )  # fmt: skip

    def report(experience, entropy, step):
        metrics = batch_metrics(experience, entropy, step, reference=needs.reference)
        drawn = {} if select else signal_metrics(experience.scores, sizes.samples)
        return metrics | drawn

    # Groups without signal are counted as they are drawn: hardly any of them is left later.
    def select_groups(scores):
        return select(scores, sizes.samples), signal_metrics(scores, sizes.samples)

    # Scores and refilled batches lie like rollouts do, wherever they come from: else a batch
    # that was drawn once and one that was refilled would each compile the steps after them.
    def score(state, rollouts):
        scores, state = device.score(state, rollouts)
        # Whatever a reward says of padding: groups are compared by sums over all columns.
        process = fill_padding(scores.process, rollouts.mask)
        scores = dataclasses.replace(scores, process=process)
        return constrain_rows(scores, plan.rules), state

    def refill_groups(kept, kept_signal, fresh, fresh_signal):
        batch, signal = refill(kept, kept_signal, fresh, fresh_signal)
        return constrain_rows(batch, plan.rules), signal

    device, select = rewards.get("device"), algorithm.select
    return Steps(
        generate=jax.jit(sample),
        score=device and compile_score(score),
        select=jax.jit(select_groups) if select else None,
        refill=jax.jit(refill_groups) if select else None,
        adapt_kl_coef=controls.compile_kl_coef(plan.controls.kl_coef, plan.mesh),
        move_reference=controls.compile_reference(plan.controls.reference, reference),
        **_compile_learning(plan, train, report),
    )


def _compile_learning(
    plan: PolicyPlan, train: TrainState, report: Report
) -> dict[str, Callable | None]:
    """The steps from rollouts and scores to new parameters; batches that are trained on once, and
    whole, are evaluated and reported by their update."""
    models, algorithm, updates = plan.models, plan.algorithm, plan.config.updates
    parts = {name: updates[name] for name in ("epochs", "minibatches", "microbatches")}
    temperature = plan.config.rollout.sampling.get("temperature", 1.0)
    around = dict(temperature=temperature, group_size=plan.sizes.samples)
    # A critic that trains alone first wants experience that is whole.
    at_once = fits_one_pass(**parts) and not plan.pretraining.steps
    if at_once:
        update = make_one_pass_step(models, algorithm, plan.optimizers, **around, report=report)
    else:
        update = make_update_step(models, algorithm, plan.optimizers, **parts, **around)
    # With what was evaluated before: the policy of then, or the reference, which may be the policy.
    compares = not at_once or algorithm.needs.reference
    evaluate = make_evaluate_step(
        models,
        algorithm.needs,
        temperature=temperature,
        rows=plan.sizes.rows,
        trained=not at_once,
    )
    critic = None
    if plan.pretraining.steps:
        alone = plan.pretraining.algorithm
        critic = make_critic_step(models, alone, plan.optimizers, **parts, **around)
    return dict(
        evaluate=compile_evaluate(evaluate, plan.mesh),
        monitor=None if at_once else jax.jit(report),
        update=compile_update(update, train, plan.mesh, exact=compares),
        update_critic=critic and compile_update(critic, train, plan.mesh),
    )


def _reward_update(device: Reward | None, initial: Mapping[str, Any]) -> Callable | None:
    """The step of the rewards on the devices that learn beside the policy; None where none does.

    Their state is donated; the base that some are lent for a call is not.
    """
    if device is None or device.update is None:
        return None

    def update_rewards(state, base, rollouts, scores, key):
        state, found = device.update(lend_base(state, base), rollouts, scores, key)
        return lend_base(state, {}), {f"reward/{name}": mean for name, mean in found.items()}

    born = jax.tree.map(lambda leaf: leaf.sharding, initial["device"])
    return jax.jit(
        update_rewards,
        donate_argnums=0,
        out_shardings=(born, None),
        compiler_options=COMPILER_OPTIONS,
    )


def _calibrate(run: PolicyRun, state: RunState) -> RunState:
    """Freezes reference statistics of the rewards on samples of the initial policy."""
    places = [p for p, reward in run.rewards.items() if reward.calibrate is not None]
    if not places:
        return state
    key = step_key(run.plan.config.seed, Purpose.CALIBRATE, 0)
    rollouts = run.sample(state, 0, key)
    rewards = dict(state.rewards)
    for place in places:
        lent = lend_base(rewards[place], state.reference)
        rewards[place] = lend_base(run.rewards[place].calibrate(lent, rollouts), {})
    return dataclasses.replace(state, rewards=rewards)
