"""One reward model from several runs: the mean of their weights, taken where they are loaded.

Where a config names a reward model by ``init_from`` it may name more folders by ``average``. Runs
from one pretrained trunk that differ in data order, seed or settings then count as one model at the
price of one, which errs less where labels are noisy (WARM: Ramé et al. 2024,
https://arxiv.org/abs/2401.12187, section 3). Adapters are merged before: the mean of two products
is no product of means.
"""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import roles
from rlhf_jax.mesh import ShardingRules
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import architecture
from rlhf_jax.models.members import average
from rlhf_jax.schema import within
from rlhf_jax.text.hub import local_folder
from rlhf_jax.types import Params


def folders_of(section: ConfigDict) -> tuple[str, ...]:
    """The folders whose mean a section names; () where it names none."""
    first = section.get("init_from", "")
    return (first, *section.get("average", ())) if first else ()


def check_average(path: str, section: ConfigDict) -> None:
    """Looks whether the models that a section names can be averaged; reads no parameters.

    Raises:
        ValueError: naming the folder, and in what it differs from the first one.
    """
    others = tuple(section.get("average", ()))
    first = section.get("init_from", "")
    if not others:
        return
    if not first:
        raise ValueError(f"{path}.average={others}, but {path}.init_from is empty; name the first")
    if len({local_folder(one) for one in (first, *others)}) <= len(others):
        raise ValueError(f"{path}.average={others} with init_from={first!r}: a folder twice")
    wanted = _model(f"{path}.init_from", first)
    for folder in others:
        found = _model(f"{path}.average", folder)
        for name in wanted:
            if found[name] != wanted[name]:
                raise ValueError(
                    f"{path}.average: {folder} has {name}={found[name]}, {first} has "
                    f"{wanted[name]}; wanted runs of one trunk and the same heads"
                )


def check(path: str, section: ConfigDict) -> None:
    """`check_average`, then `check_starts`."""
    check_average(path, section)
    check_starts(path, section)


def check_starts(path: str, section: ConfigDict) -> None:
    """Looks whether the parameters of the further folders can be read; reads none."""
    for folder in section.get("average", ()):
        with within(f"{path}.average"):
            roles.check_start(path, folder)


def _model(path: str, folder: str) -> dict[str, object]:
    """What must be the same of models that are averaged."""
    with within(f"{path}: {folder}"):
        described: ModelConfig = roles.described_in(folder)
    if described.members > 1:
        raise ValueError(
            f"{path}: {folder} is an ensemble of {described.members} models; wanted single ones"
        )
    return architecture(described) | {"score_heads": tuple(sorted(described.score_heads))}


def load(folders: Sequence[str], mesh: Mesh, rules: ShardingRules, *, dtype: str = "") -> Params:
    """The parameters of a folder, adapters merged, or the mean of those of several; see
    `roles.load`. All of them are held until the mean is taken.

    Raises:
        ValueError: trees that do not match, naming the folders.
    """
    loaded = [roles.load(folder, mesh, rules, dtype=dtype) for folder in folders]
    if len(loaded) == 1:
        return loaded[0]
    trees = {str(jax.tree.structure(params)) for params in loaded}
    with within(f"average of {', '.join(folders)}"):
        if len(trees) > 1:
            raise ValueError("the models have different parameters; wanted runs of one trunk")
        return average(loaded)
