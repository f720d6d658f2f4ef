"""Compiled programs in tests that run whole programs: shared over runs, and counted."""

import contextlib

import jax
from jax.experimental.compilation_cache import compilation_cache

from rlhf_jax import policy_run

# Undoes what tests/conftest.py switches off to compile sooner, for one program.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else {}


def settings(folder):
    """Options of jax: programs are kept in `folder`, so that only the first run compiles them."""
    return {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@contextlib.contextmanager
def shared_programs(folder):
    """Within the context, this process compiles with these options.

    For `kept_programs` of tests/conftest.py, which holds in all tests. Where a folder is set
    already, by the environment say, that one is kept.
    """
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    before = {name: jax.config.values[name] for name in settings(folder)}

    def apply(options):
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # its folder is looked up once

    apply(settings(folder))
    try:
        yield
    finally:
        apply(before)


def environment(folder):
    """The same for a process of its own."""
    return {name.upper(): str(value) for name, value in settings(folder).items()}


def remember_runs(monkeypatch):
    """A list to which every policy run that starts from now on is added."""
    started = []
    begin = policy_run.start

    def remember(plan):
        run, state = begin(plan)
        started.append(run)
        return run, state

    monkeypatch.setattr(policy_run, "start", remember)
    return started


def times_compiled(run):
    """How often each step of a policy run was compiled; steps that never ran are left out."""
    steps = run.steps._asdict()
    if steps["score"] is not None:
        steps["score"] = steps["score"].compiled
    sizes = {name: step._cache_size() for name, step in steps.items() if step is not None}
    return {name: size for name, size in sizes.items() if size}
