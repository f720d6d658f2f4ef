"""Memory that a step gives back is there for the next one, and goes back to the system at last."""

import os
import subprocess
import sys

import pytest

from rlhf_jax import host_memory

# Twenty steps of a program with 200 MiB of temporary memory, in a process of its own: what else a
# process has done decides where its heap has room. Prints the pages that the last sixteen touched
# for the first time, and the resident pages after the loop.
_STEPS = """
import resource, sys
from rlhf_jax import host_memory

if sys.argv[1] == "kept":
    host_memory.one_heap()
import jax, jax.numpy as jnp

@jax.jit
def step(x):
    y = jnp.cumsum(x, axis=0)
    return jnp.sum(jnp.cumsum(y, axis=1) * jnp.flip(y))

x = jnp.ones((16384, 1024)).at[:, 0].set(2.0)
loop = host_memory.loop(range(20)) if sys.argv[1] == "kept" else range(20)
for done in loop:
    if done == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(open("/proc/self/statm").read().split()[1])
"""


def _pages(mode: str) -> tuple[int, int]:
    """New pages of the last 16 steps and resident pages after the loop, with memory kept or not."""
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environ.pop("MALLOC_ARENA_MAX", None)
    command = [sys.executable, "-c", _STEPS, mode]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, check=True, timeout=300
    )
    new, resident = done.stdout.split()
    return int(new), int(resident)


@pytest.mark.skipif(host_memory._library() is None, reason="not the GNU C library")
def test_a_step_has_the_memory_of_the_one_before_and_a_loop_gives_it_back():
    new, resident = _pages("kept")
    usual, usual_resident = _pages("usual")
    piece = 16384 * 1024 * 4 // 4096  # pages of one array
    assert usual > 16 * piece  # this program is one that pays for pages
    assert new < usual / 2  # now and then a step's memory is cut elsewhere
    assert resident < usual_resident + piece


def test_yields_what_it_is_given():
    assert list(host_memory.loop(iter("abcde"))) == list("abcde")


def test_a_loop_that_ends_early_sets_the_usual_options_again(monkeypatch):
    calls = []

    class Library:
        def mallopt(self, option, value):
            calls.append((option, value))
            return 1

        def malloc_trim(self, pad):
            calls.append("trim")
            return 1

    monkeypatch.setattr(host_memory, "_library", Library)
    for step in host_memory.loop(range(10)):
        if step == 5:
            break
    usual = list(host_memory._USUAL.items())
    assert calls == [*host_memory._KEPT.items(), "trim", "trim", *usual, "trim"]


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [
        ("cpu", ["cuda"], True),
        ("cuda", [], False),
        (None, ["cuda"], False),
        ("cpu,cuda", [], False),
    ],
)
def test_machines_with_accelerators_are_left_alone(monkeypatch, platforms, plugins, expected):
    monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(type(host_memory.jax.config), "jax_platforms", platforms, raising=False)
    assert host_memory._cpus_only() is expected


def test_the_environment_has_the_last_word(monkeypatch):
    def refuse(library, options):
        raise AssertionError(options)

    monkeypatch.setattr(host_memory, "_set", refuse)
    monkeypatch.setattr(host_memory, "_cpus_only", lambda: True)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    host_memory.one_heap()
    assert list(host_memory.loop("ab")) == ["a", "b"]
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    if host_memory._library() is not None:
        with pytest.raises(AssertionError):
            host_memory.one_heap()
