"""Memory that a step gives back is there for the next one, and goes back to the system at last."""

import os
import pathlib
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
    own = {name: text for name, text in os.environ.items() if not name.startswith("MALLOC_")}
    environ = {**own, "GLIBC_TUNABLES": "", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", _STEPS, mode]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, check=True, timeout=300
    )
    new, resident = done.stdout.split()
    return int(new), int(resident)


def _pages_are_huge() -> bool:
    """Whether the system gives out pages of megabytes, of which few are touched anyway."""
    path = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.is_file() and "[always]" in path.read_text()


@pytest.mark.skipif(host_memory._library() is None, reason="not the GNU C library")
@pytest.mark.skipif(_pages_are_huge(), reason="huge pages are always on")
def test_a_step_has_the_memory_of_the_one_before_and_a_loop_gives_it_back():
    new, resident = _pages("kept")
    usual, usual_resident = _pages("usual")
    piece = 16384 * 1024 * 4 // os.sysconf("SC_PAGE_SIZE")  # pages of one array
    assert usual > 16 * piece  # this program is one that pays for pages
    assert new < usual / 2  # now and then a step's memory is cut elsewhere
    assert resident < usual_resident + piece


class _Library:
    """Takes every option, but those in `refused`, and writes down what it was asked."""

    def __init__(self):
        self.calls, self.refused = [], ()

    def mallopt(self, option, value):
        self.calls.append((option, value))
        return int(option not in self.refused)

    def malloc_trim(self, pad):
        self.calls.append("trim")
        return 1


@pytest.fixture
def library(monkeypatch):
    """A library in the place of this process's own, on a machine without accelerators."""
    library = _Library()
    monkeypatch.setattr(host_memory, "_library", lambda: library)
    monkeypatch.setattr(host_memory, "_allocator", None)
    monkeypatch.setattr(host_memory, "_cpus_only", lambda: True)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return library


def test_without_one_heap_a_loop_is_its_items(library):
    assert list(host_memory.loop(iter("abcde"))) == list("abcde")
    assert library.calls == []


def test_a_loop_that_ends_early_sets_the_usual_options_again(library):
    host_memory.one_heap()
    for step in host_memory.loop(range(10)):
        if step == 5:
            break
    kept, usual = host_memory._KEPT.items(), host_memory._USUAL.items()
    assert library.calls == [(-8, 1), *kept, "trim", "trim", *usual, "trim"]


def test_an_allocator_that_refuses_is_left_alone(library):
    library.refused = (-8,)
    host_memory.one_heap()
    assert list(host_memory.loop("ab")) == ["a", "b"]
    assert library.calls == [(-8, 1)]


@pytest.mark.parametrize(
    ("name", "value", "calls"),
    [
        ("MALLOC_ARENA_MAX", "4", 0),
        ("MALLOC_TRIM_THRESHOLD_", "1000", 0),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000", 0),
        ("GLIBC_TUNABLES", "glibc.elision.enable=0", 1),
    ],
)
def test_the_environment_has_the_last_word(library, monkeypatch, name, value, calls):
    monkeypatch.setenv(name, value)
    host_memory.one_heap()
    assert len(library.calls) == calls


@pytest.mark.parametrize(
    ("platforms", "plugins", "libtpu", "expected"),
    [
        ("cpu", ["cuda"], True, True),
        ("cuda", [], False, False),
        ("cpu,cuda", [], False, False),
        (None, ["cuda"], False, False),
        (None, [], True, False),
        (None, [], False, True),
    ],
)
def test_machines_with_accelerators_are_left_alone(
    monkeypatch, platforms, plugins, libtpu, expected
):
    monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(
        host_memory.importlib.util, "find_spec", lambda name: name if libtpu else None
    )
    monkeypatch.setattr(type(host_memory.jax.config), "jax_platforms", platforms, raising=False)
    assert host_memory._cpus_only() is expected
