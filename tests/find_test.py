"""Names become factories by import; whatever is unknown lists what is known."""

import sys

import pytest

from rlhf_jax.algorithms.ppo import ppo
from rlhf_jax.find import find, members


def test_finds_members_by_name():
    assert find("algorithms", "ppo") is ppo
    assert {"ppo", "grpo"} <= set(members("algorithms"))
    for name in members("algorithms"):
        assert find("algorithms", name).__name__ == name


@pytest.mark.parametrize("shelf", ["algorithms", "rewards", "models"])
def test_helpers_are_no_members(shelf):
    assert "base" not in members(shelf)
    assert members(shelf) == sorted(members(shelf))


@pytest.mark.parametrize("name", ["pppo", "base", "__init__", ""])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match=r"not on the shelf 'algorithms'.*known: .*grpo.*ppo"):
        find("algorithms", name)


def test_an_unknown_shelf_lists_the_known():
    with pytest.raises(ValueError, match="unknown shelf 'algos'; known: algorithms, rewards"):
        find("algos", "ppo")


def test_dotted_names_come_from_outside(tmp_path, monkeypatch):
    package = tmp_path / "outside_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "bar.py").write_text("def bar():\n    return 7\n")
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find("rewards", "outside_pkg.bar")() == 7
    for name in ("outside_pkg.foo", "nowhere.bar", "outside_pkg.bar.deeper"):
        with pytest.raises(ValueError, match="or give a dotted path"):
            find("rewards", name)
    # A member that cannot import what it needs is broken, not unknown.
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        find("rewards", "outside_pkg.broken")
    for name in [name for name in sys.modules if name.startswith("outside_pkg")]:
        monkeypatch.delitem(sys.modules, name)
