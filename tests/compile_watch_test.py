"""Programs compiled behind a loop's second iteration are counted, and only those."""

import jax
import jax.numpy as jnp

from rlhf_jax.compile_watch import CompileWatch


def fresh():
    """A program that is not compiled yet."""
    return jax.jit(lambda x: x * 2)


def test_a_warm_loop_compiles_nothing():
    watch, program = CompileWatch(), fresh()
    for _ in watch.loop(range(5)):
        program(jnp.ones(3))
    assert watch.after_warmup == 0


def test_a_new_shape_in_a_warm_loop_counts():
    watch, program = CompileWatch(), fresh()
    batches = [jnp.ones(3)] * 4 + [jnp.ones(5)]
    for batch in watch.loop(batches):
        program(batch)
    assert watch.after_warmup == 1
    for _ in watch.loop(range(2)):  # another loop has a warm-up of its own
        fresh()(batches[0])
    assert watch.after_warmup == 1


def test_a_pause_does_not_count():
    watch, batch = CompileWatch(), jnp.ones(3)
    for step in watch.loop(range(6)):
        if step == 4:
            with watch.pause():
                fresh()(batch)
        if step == 5:
            fresh()(batch)
    assert watch.after_warmup == 1
