"""A linear reward model that the shipped objective trains, for worlds whose features are given.

A token is a number of a row of features, so a text is a few rows. `linear_model` puts the shipped
heads on them behind the `Model` facade: what is minimised, and what is measured, is what the
programs minimise and measure; only the transformer is missing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import ScalarHead, has_bias, kernel_scale
from rlhf_jax.models.transformer import Model
from rlhf_jax.training.supervised import create_supervised_state, make_supervised_step
from rlhf_jax.types import Labelled, ModelOutput, Pairs, Texts

AT_REST, MOST_STEPS = 1e-4, 500  # a step's length as a share of that of the parameters


def own_features(tree, rows, mask):
    """The trunk of texts of one token: the features as they are."""
    del tree, mask
    return rows


def linear_model(width, heads, trunk=own_features, learnt=()):
    """Heads on ``trunk(tree, rows [M S F], mask [M S])`` [M S width], as a `Model`.

    ``tree["features"]`` [V F] is frozen, heads train (they start as `zero_heads`), and so does what
    of the trunk is `learnt`: names of matrices in the tree.
    """
    config = ModelConfig(
        vocab_size=1, width=width, layers=1, heads=1, kv_heads=1, head_dim=2, mlp_width=1,
        lm_head=False, score_heads=heads,
    )  # fmt: skip
    modules = {n: ScalarHead(kernel_scale(n, width), has_bias(n), "float32") for n in heads}

    def apply(tree, tokens, positions, mask, cache, layout=None, since=0):
        del positions
        if layout is None:
            hidden = trunk(tree, tree["features"][tokens], mask)
            return ModelOutput(hidden=hidden[:, since:], cache=cache)
        tokens, mask = one_sample_each(tokens, layout), one_sample_each(mask, layout)
        hidden = whole_groups(trunk(tree, tree["features"][tokens], mask), layout)
        return ModelOutput(hidden=hidden[:, since:], cache=cache)

    def scores(tree, hidden):
        return {n: m.apply({"params": tree["heads"][n]}, hidden) for n, m in modules.items()}

    def axes():
        of_heads = jax.tree.map(lambda leaf: (None,) * leaf.ndim, zero_heads(width, heads))
        return of_heads | dict.fromkeys(learnt, (None, None))

    def absent(*args):
        raise AssertionError(f"a linear model was asked for what it has not, with {args}")

    return Model(
        config,
        ShardingRules(),
        init=absent,
        shapes=absent,
        axes=axes,
        apply=apply,
        logits=absent,
        scores=scores,
        init_cache=absent,
        unstack=absent,
    )


def one_sample_each(rows, layout):
    """[N P+K*T] to [N*K P+T]: each sample with its group's prompt before it."""
    prompts = jnp.repeat(rows[:, : layout.prompt], layout.samples, axis=0)
    own = rows[:, layout.prompt :].reshape(len(prompts), -1)
    return jnp.concatenate([prompts, own], axis=1)


def whole_groups(hidden, layout):
    """[N*K P+T D] back to [N P+K*T D]."""
    groups = len(hidden) // layout.samples
    own = hidden[:, layout.prompt :].reshape(groups, -1, hidden.shape[-1])
    return jnp.concatenate([hidden[:: layout.samples, : layout.prompt], own], axis=1)


def zero_heads(width, heads):
    """The parameters of the heads of `linear_model`, all 0."""
    kernel, bias = {"kernel": jnp.zeros(width)}, {"bias": jnp.zeros(())}
    return {"heads": {name: kernel | (bias if has_bias(name) else {}) for name in heads}}


def texts(tokens):
    """Rows [M S] without padding; a column [M] makes texts of one token."""
    tokens = np.asarray(tokens, np.int32).reshape(len(tokens), -1)
    there = np.ones(tokens.shape, bool)
    return Texts(tokens=tokens, mask=there, loss_mask=there, segment=there.astype(np.int32))


def pairs(first, second, label):
    """Pairs of texts, with the chance that the first is better."""
    rows = len(label)
    return Pairs(
        chosen=texts(first),
        rejected=texts(second),
        label=np.asarray(label, np.float32),
        margin=np.zeros(rows, np.float32),
        votes=np.full((rows, 1), np.nan, np.float32),
        record=np.arange(rows, dtype=np.int32),
    )


def labelled(tokens, label):
    return Labelled(texts=texts(tokens), label=np.asarray(label, np.float32))


def trainer(model, start, sources, ridge, **options):
    """(features, mixture) -> params where the shipped trainer comes to rest, from `start`.

    Minimises  Σ weight · loss + ridge/2 |params|²  on all rows in every step, by L-BFGS, to which
    the ridge's gradient goes with that of the loss.

    Args:
        options: of `make_supervised_step`.
    """
    optimizer = optax.chain(
        optax.add_decayed_weights(ridge), optax.lbfgs(learning_rate=1.0, linesearch=None)
    )
    mesh = make_mesh({}, devices=jax.devices()[:1])
    step = make_supervised_step(model, sources, optimizer, **options)
    first = create_supervised_state(start, optimizer, mesh)

    @jax.jit
    def run(state, features, mixture):
        frozen = {"policy": {"features": features}}

        def one(carry):
            state, _ = carry
            after, _ = step(state, frozen, mixture, jax.random.key(0))
            change = jax.tree.map(jnp.subtract, after.params, state.params)
            return after, optax.tree.norm(change) / optax.tree.norm(after.params)

        def moving(carry):
            # At rest L-BFGS would take the rounding of gradients for curvature, and leap away.
            return (carry[1] > AT_REST) & (carry[0].step < MOST_STEPS)

        state, moved = jax.lax.while_loop(moving, one, (state, jnp.inf))
        return state.params["policy"], moved

    def train(features, mixture):
        with jax.set_mesh(mesh):
            params, moved = run(first, features, mixture)
        assert moved <= AT_REST, f"still moving by {moved} after {MOST_STEPS} steps"
        return params

    return train


def minibatches(model, start, sources, mixture_of, *, learning_rate, **options):
    """(features, batches) -> params after one step of Adam on each of the batches, from `start`.

    The rate falls to 0 as a cosine. For losses that need batches, and parameters that no loss
    moves: nothing else, such as a ridge, moves them here.

    Args:
        mixture_of: what of a batch (leaves [steps ...], one step's) is a mixture; it is traced.
        options: of `make_supervised_step`.
    """
    mesh = make_mesh({}, devices=jax.devices()[:1])

    def train(features, batches):
        steps = jax.tree.leaves(batches)[0].shape[0]
        optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
        step = make_supervised_step(model, sources, optimizer, **options)

        @jax.jit
        def run(state, features, batches):
            def one(state, batch):
                frozen = {"policy": {"features": features}}
                return step(state, frozen, mixture_of(batch), jax.random.key(0))[0], None

            return jax.lax.scan(one, state, batches)[0].params["policy"]

        with jax.set_mesh(mesh):
            state = create_supervised_state(start, optimizer, mesh)
            return jax.tree.map(np.asarray, run(state, features, batches))

    return train


def epochs(rng, count, rows, steps):
    """[steps rows]: the numbers below `count`, in another order every epoch."""
    rounds = -(-rows * steps // count)
    every = np.concatenate([rng.permutation(count) for _ in range(rounds)])
    return every[: rows * steps].reshape(steps, rows).astype(np.int32)


def scorer(model):
    """(params, features, tokens) -> {head: scores [M S]}, as the shipped evaluation says them."""

    @jax.jit
    def evaluate(params, features, rows):
        return evaluate_texts(model, params, {"features": features}, rows).scores

    def scores(params, features, tokens):
        return jax.tree.map(np.asarray, evaluate(params, features, texts(tokens)))

    return scores
