"""The floor table and the house rules, read from the sources with `ast` (nothing is imported).

Every rule is one function from a source file to complaints; the second half of this file feeds
each rule a small bad source and expects exactly that complaint, so no rule can fall asleep.
"""

import ast
import pathlib
import re
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Floor and order within the floor: an import may go to a lower floor, or to the same or a lower
# order on the same floor. None = no importing between the members of that floor. Every other
# file directly under rlhf_jax/ is a program, floor 4; every other folder is an error.
FLOORS = {
    "types": (0, 0),
    "pytree": (0, 0),
    "ops": (0, 0),
    "mesh": (1, 0),
    "text": (1, 1),
    "data": (1, 2),
    "models": (1, 3),
    "sampling": (2, None),
    "rewards": (2, None),
    "algorithms": (2, None),
    "find": (2, None),
    "training": (3, 0),
}
PROGRAM = (4, 0)

# Where each package may be imported; the standard library, jax, numpy and jaxtyping everywhere.
EVERYWHERE = {"jax", "numpy", "jaxtyping", "rlhf_jax"}
FENCES = {
    "flax": ("rlhf_jax.models",),
    "optax": ("rlhf_jax.training",),
    "ml_collections": ("configs", "floor 4"),
    "absl": ("floor 4", "rlhf_jax.training.writer", "rlhf_jax.mesh"),
    "orbax": ("rlhf_jax.training.checkpoint",),
    "tensorstore": ("rlhf_jax.training.intact",),
    "transformers": ("rlhf_jax.text", "rlhf_jax.models.load", "rlhf_jax.models.save"),
    **dict.fromkeys(("tokenizers", "jinja2"), ("rlhf_jax.text",)),
    "huggingface_hub": ("rlhf_jax.text.hub", "rlhf_jax.models.save", "rlhf_jax.card_page"),
    "safetensors": ("rlhf_jax.models.tensors", "rlhf_jax.models.save"),
    "ml_dtypes": ("rlhf_jax.models.tensors", "rlhf_jax.models.save"),
    **dict.fromkeys(("tensorflow_datasets", "grain", "array_record", "etils"), ("rlhf_jax.data",)),
    "tensorboard": ("rlhf_jax.training.writer",),
    **dict.fromkeys(("rich", "tqdm"), ("floor 4", "rlhf_jax.training.writer")),
    "matplotlib": ("floor 4",),
    "scipy": ("rlhf_jax.ops",),
    "pyarrow": ("rlhf_jax.data",),
    "math_verify": ("rlhf_jax.rewards.math_worker",),
    "langdetect": ("rlhf_jax.rewards.ifeval_checks",),
    "tensorflow": (),
}
FILE_LINES = 400
FUNCTION_LINES = 60
MAIN_LINES = 150


class Import(NamedTuple):
    target: str  # dotted: a module, or a name inside one
    line: int
    inside_function: bool


class Source(NamedTuple):
    module: str  # dotted, such as rlhf_jax.ops.returns or configs.quickstart
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def read(*folders: str) -> list[Source]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [Source(module_name(path), path.read_text()) for path in paths]


def imports(source: Source) -> list[Import]:
    """Every import with its absolute target; `from a import b` counts as a.b."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = source.module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found.extend(
                Import(f"{base}.{alias.name}", node.lineno, inside) for alias in node.names
            )
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(source.tree, False)
    return found


def shelf(module: str) -> str:
    """The name under which FLOORS lists a module: its first part below rlhf_jax."""
    return module.split(".")[1]


def within(module: str, place: str) -> bool:
    if place == "floor 4":
        return re.fullmatch(r"rlhf_jax\.\w+", module) is not None and shelf(module) not in FLOORS
    return module == place or module.startswith(place + ".")


def floor_faults(source: Source) -> list[str]:
    """Imports go downward or stay in the same package; siblings as FLOORS orders them."""
    if not source.module.startswith("rlhf_jax."):
        return []
    name = shelf(source.module)
    if name not in FLOORS and source.module.count(".") > 1:
        return [f"{source.module} has no floor: list {name} in FLOORS"]
    floor, order = FLOORS.get(name, PROGRAM)
    faults = []
    for item in imports(source):
        if not item.target.startswith("rlhf_jax.") or shelf(item.target) in (name, "__version__"):
            continue
        below, below_order = FLOORS.get(shelf(item.target), PROGRAM)
        sibling_ok = below == floor and order is not None and below_order <= order
        forbidden = name == "algorithms" and shelf(item.target) == "models"
        if forbidden or not (below < floor or sibling_ok):
            faults.append(f"{source.module}:{item.line} may not import {item.target}")
    return faults


def fence_faults(source: Source) -> list[str]:
    """Other people's packages stay behind their fences; configs hold values only."""
    values = within(source.module, "configs")
    faults = []
    for item in imports(source):
        package = item.target.split(".")[0]
        if package == "configs" or package in EVERYWHERE:
            wrong = values != (package == "configs")
        elif package in FENCES:
            wrong = not any(within(source.module, place) for place in FENCES[package])
        else:
            wrong = package not in sys.stdlib_module_names
        if wrong:
            faults.append(f"{source.module}:{item.line} may not import {package} (see FENCES)")
    return faults


def function_import_faults(source: Source) -> list[str]:
    """No import inside a function, nor by name, except in find.py."""
    if source.module == "rlhf_jax.find":
        return []
    faults = [
        f"{source.module}:{item.line} imports {item.target} inside a function"
        for item in imports(source)
        if item.inside_function
    ]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module"):
                faults.append(f"{source.module}:{node.lineno} imports by name ({called})")
    return faults


def length_faults(source: Source) -> list[str]:
    """Files under 400 lines, functions under 60; under 150 the main loops of floor 4 and the
    get_config of a config, which holds values only.

    A function is measured without its docstring: what is said about it is not the length.
    """
    faults = []
    lines = len(source.text.splitlines())
    if lines >= FILE_LINES:
        faults.append(f"{source.module} has {lines} lines, {FILE_LINES} are the limit")
    mains = {"get_config"} if within(source.module, "configs") else set()
    if within(source.module, "floor 4"):
        mains = {"main", source.module.split(".")[-1]}
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        length = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            length -= node.body[0].end_lineno - node.body[0].lineno + 1
        limit = MAIN_LINES if node.name in mains else FUNCTION_LINES
        if length >= limit:
            faults.append(
                f"{source.module}:{node.lineno} {node.name} has {length} lines, {limit} are"
                " the limit"
            )
    return faults


def future_faults(source: Source) -> list[str]:
    """String annotations would switch the executed shape checks off."""
    return [
        f"{source.module}:{item.line} turns annotations into strings"
        for item in imports(source)
        if item.target == "__future__.annotations"
    ]


def cycles(sources: list[Source]) -> list[str]:
    """Every import cycle among the given modules, as a -> b -> a."""
    known = {source.module for source in sources}

    def resolve(target):
        while target and target not in known:
            target = target.rpartition(".")[0]
        return target

    graph = {
        source.module: {resolve(item.target) for item in imports(source)} - {"", source.module}
        for source in sources
    }
    done, path, found = set(), [], []

    def visit(module):
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            path.append(module)
            for target in sorted(graph[module]):
                visit(target)
            done.add(path.pop())

    for module in sorted(graph):
        visit(module)
    return found


def undeclared(sources: list[Source], setup: str, *extras: str) -> list[str]:
    """Packages that are imported but not in setup.py's install_requires, nor in one of `extras`."""
    requirements = []
    for name in ("install_requires", *(f'"{extra}": [' for extra in extras)):
        body = setup[setup.index(name) :]
        requirements += re.findall(r'"([A-Za-z0-9_-]+)[\[>=]', body[: body.index("]")])
    declared = {name.lower().replace("-", "_") for name in requirements}
    names = {"absl": "absl_py", "orbax": "orbax_checkpoint"}
    packages = {item.target.split(".")[0] for source in sources for item in imports(source)}
    packages -= sys.stdlib_module_names | {"rlhf_jax", "configs", "benchmarks"}
    return sorted(package for package in packages if names.get(package, package) not in declared)


# The house as it is.

HOUSE = read("rlhf_jax")
VALUES = read("configs")
BENCHMARKS = read("benchmarks")


def test_the_house_was_read():
    modules = {source.module for source in HOUSE}
    assert {"rlhf_jax.types", "rlhf_jax.pytree", "rlhf_jax.ops"} <= modules


@pytest.mark.parametrize("rule", [floor_faults, fence_faults, function_import_faults])
def test_imports(rule):
    assert [fault for source in HOUSE + VALUES for fault in rule(source)] == []


def test_lengths():
    assert [f for source in HOUSE + VALUES + BENCHMARKS for f in length_faults(source)] == []


def test_annotations_are_not_strings():
    everything = HOUSE + VALUES + BENCHMARKS + read("tests")
    assert [fault for source in everything for fault in future_faults(source)] == []


def test_no_cycles():
    assert cycles(HOUSE) == []


def test_every_imported_package_is_declared():
    setup = (ROOT / "setup.py").read_text()
    assert undeclared(HOUSE + VALUES, setup) == []
    assert undeclared(BENCHMARKS, setup, "hf-parity") == []


# The rules can fail.


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("rlhf_jax.ops.returns", "import rlhf_jax.mesh"),  # upward
        ("rlhf_jax.ops.returns", "from rlhf_jax import mesh"),
        ("rlhf_jax.ops.returns", "from .. import mesh"),
        ("rlhf_jax.types", "from rlhf_jax.training.state import Models"),
        ("rlhf_jax.text.steps", "from rlhf_jax.data import prompts"),  # order within floor 1
        ("rlhf_jax.mesh", "from rlhf_jax.text import steps"),
        ("rlhf_jax.data.prompts", "from rlhf_jax.models.config import ModelConfig"),
        ("rlhf_jax.rewards.base", "from rlhf_jax.sampling import sampler"),  # between shelves
        ("rlhf_jax.sampling.sampler", "from rlhf_jax.algorithms.ppo import ppo"),
        ("rlhf_jax.algorithms.ppo", "import rlhf_jax.rewards.base as base"),
        ("rlhf_jax.rewards.base", "from rlhf_jax.find import find"),
        ("rlhf_jax.algorithms.ppo", "from rlhf_jax.models.completions import evaluate"),
        ("rlhf_jax.rewards.base", "from rlhf_jax.training import update"),
        ("rlhf_jax.training.update", "from rlhf_jax.build import build"),
        ("rlhf_jax.cupboard.box", "import jax"),  # a folder that nobody gave a floor
        ("rlhf_jax.mesh", "if True:\n    from rlhf_jax.models import config"),
    ],
)
def test_floors_can_fail(module, text):
    assert len(floor_faults(Source(module, text))) == 1


def test_floors_allow_what_they_should():
    allowed = {
        "rlhf_jax.models.transformer": "from rlhf_jax import mesh, types\nimport rlhf_jax.ops.x",
        "rlhf_jax.models.completions": "from rlhf_jax.models.config import ModelConfig",
        "rlhf_jax.data.steps": "from rlhf_jax.text.steps import mark_step_ends",
        "rlhf_jax.rewards.outcome_model": "from rlhf_jax.models import completions",
        "rlhf_jax.training.update": "from rlhf_jax.sampling.sampler import generate",
        "rlhf_jax.build": "from rlhf_jax import find, __version__\nimport rlhf_jax.evaluate",
    }
    for module, text in allowed.items():
        assert floor_faults(Source(module, text)) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("rlhf_jax.training.update", "import flax.linen as nn"),
        ("rlhf_jax.models.lora", "import optax"),
        ("rlhf_jax.training.state", "from ml_collections import ConfigDict"),
        ("rlhf_jax.training.state", "import orbax.checkpoint as ocp"),
        ("rlhf_jax.models.config", "import transformers"),
        ("rlhf_jax.training.update", "import grain"),
        ("rlhf_jax.build", "import tensorflow_datasets as tfds"),
        ("rlhf_jax.train_policy", "from tensorboard.summary import writer"),
        ("rlhf_jax.data.sources", "import tensorflow as tf"),
        ("rlhf_jax.ops.returns", "import sympy"),  # a package that nobody listed
        ("configs.quickstart", "import jax.numpy as jnp"),
        ("configs.quickstart", "from rlhf_jax.models import config"),
        ("rlhf_jax.build", "from configs import quickstart"),
    ],
)
def test_fences_can_fail(module, text):
    assert len(fence_faults(Source(module, text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "def load():\n    import json",
        "class A:\n    def b(self):\n        from json import loads",
        "import importlib\nmodule = importlib.import_module('json')",
        "module = __import__('json')",
    ],
)
def test_imports_inside_functions_can_fail(text):
    assert len(function_import_faults(Source("rlhf_jax.mesh", text))) == 1
    assert function_import_faults(Source("rlhf_jax.find", text)) == []


def test_lengths_can_fail():
    def function(name, lines, docstring=""):
        return f"def {name}():\n{docstring}" + "    x = 1\n" * (lines - 1)

    def faults(module, text):
        return length_faults(Source(module, text))

    assert faults("rlhf_jax.mesh", "x = 1\n" * 399) == []
    assert len(faults("rlhf_jax.mesh", "x = 1\n" * 400)) == 1
    assert faults("rlhf_jax.mesh", function("f", 59)) == []
    assert len(faults("rlhf_jax.mesh", function("f", 60))) == 1
    assert faults("rlhf_jax.mesh", function("f", 59, '    """One.\n\n    Three."""\n')) == []
    assert len(faults("rlhf_jax.mesh", function("main", 60))) == 1
    assert faults("rlhf_jax.train_policy", function("main", 149)) == []
    assert faults("rlhf_jax.train_policy", function("train_policy", 149)) == []
    assert len(faults("rlhf_jax.train_policy", function("main", 150))) == 1
    assert len(faults("rlhf_jax.train_policy", function("f", 60))) == 1
    assert faults("configs.quickstart", function("get_config", 149)) == []
    assert len(faults("configs.quickstart", function("get_config", 150))) == 1


def test_string_annotations_can_fail():
    text = "from __future__ import annotations"
    assert len(future_faults(Source("rlhf_jax.mesh", text))) == 1


def test_cycles_can_fail():
    ring = [
        Source("rlhf_jax.ops.a", "from rlhf_jax.ops import b"),
        Source("rlhf_jax.ops.b", "from rlhf_jax.ops.c import name"),
        Source("rlhf_jax.ops.c", "import rlhf_jax.ops.a"),
    ]
    assert cycles(ring) == ["rlhf_jax.ops.a -> rlhf_jax.ops.b -> rlhf_jax.ops.c -> rlhf_jax.ops.a"]
    assert cycles(ring[:2]) == []


def test_undeclared_can_fail():
    setup = 'install_requires=["flax>=1", "orbax-checkpoint>=1", "jax[cpu]>=1"]'
    text = "import jax, orbax.checkpoint, optax, json\nfrom flax import linen"
    assert undeclared([Source("rlhf_jax.x", text)], setup) == ["optax"]
