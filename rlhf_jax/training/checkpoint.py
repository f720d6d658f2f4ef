"""Checkpoints: exactly a `RunState` and the text of the run's config, through orbax.

Layout under the run's folder:

    checkpoints/<step>/state      arrays by name, one name per leaf: "train/params/policy/..."
    checkpoints/<step>/manifest   JSON: shape and dtype of every leaf, and the config's text

Leaves are saved flat, by the path to them, so that a checkpoint depends on names and not on the
Python classes of the tree. A save is asynchronous (the arrays are copied off the devices before
`save` returns) and atomic (a step's folder appears when it is complete). Restoring takes the
shardings of the target, so the mesh may differ from the one that saved.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rlhf_jax.mesh import fetch_host
from rlhf_jax.training.intact import why_broken
from rlhf_jax.types import RunState

_FOLDER = "checkpoints"
_STATE, _MANIFEST = "state", "manifest"
_NAMED = 5  # how many leaves an error names
_log = logging.getLogger(__name__)


class Manager(NamedTuple):
    """An open folder of checkpoints; `close` it."""

    orbax: ocp.CheckpointManager
    folder: pathlib.Path
    every: int


def open_manager(workdir: str | os.PathLike, *, keep: int, every: int) -> Manager:
    """Opens (or creates) the run's checkpoints, for `save` and `restore`.

    What an interrupted save left behind is removed. A step's folder that is not complete, as an
    interrupted copy leaves it, is renamed to ``incomplete-<step>``, with a warning, so that the
    newest complete step is the latest.

    Args:
        keep: how many of the newest steps stay on disk.
        every: steps between checkpoints.

    Raises:
        ValueError: if checkpoints exist but none is complete, or the path is not a folder.
    """
    if keep < 1 or every < 1:
        raise ValueError(f"checkpoint: keep={keep}, every={every}, wanted 1 or more of both")
    folder = _whole_path(workdir) / _FOLDER
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; a run keeps its checkpoints there")
    _set_incomplete_aside(folder)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        save_interval_steps=1,  # `save` decides, so that step 0 is no exception
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    return Manager(orbax=ocp.CheckpointManager(folder, options=options), folder=folder, every=every)


def _whole_path(path: str | os.PathLike) -> pathlib.Path:
    """The path from the root, without "..": it can be written to with it, but not read from."""
    return pathlib.Path(os.path.abspath(path))


def _set_incomplete_aside(folder: pathlib.Path) -> None:
    steps = [f for f in folder.iterdir() if f.name.isdigit()] if folder.is_dir() else []
    reasons = {step: _incomplete(step) for step in steps}
    broken = {step: reason for step, reason in reasons.items() if reason}
    if broken and len(broken) == len(steps):
        listed = "; ".join(f"{step}: {reason}" for step, reason in broken.items())
        raise ValueError(
            f"no complete checkpoint in {folder} ({listed}); delete the folder to start afresh"
        )
    _barrier("checkpoints listed")
    for step, reason in broken.items():
        _log.warning("checkpoint %s is not complete (%s); it is left out", step, reason)
        if jax.process_index() == 0:
            step.rename(folder / f"incomplete-{step.name}")
    _barrier("checkpoints renamed")


def _incomplete(step: pathlib.Path) -> str:
    """Why a step's folder cannot be a whole checkpoint; empty if it can."""
    wanted = (f"{_STATE}/_METADATA", f"{_MANIFEST}/metadata")
    missing = [name for name in wanted if not (step / name).is_file()]
    if missing:
        return f"lacks {', '.join(missing)}"
    try:
        json.loads((step / _MANIFEST / "metadata").read_text())
    except ValueError:
        return f"{_MANIFEST}/metadata is not JSON"
    return why_broken(step / _STATE)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _named(tree: Any) -> dict[str, Any]:
    """{path: leaf}: "train/params/policy/embed/table"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves have the same name: a key holds '/'")
    return named


def _describe(leaf: Any) -> list:
    return [list(leaf.shape), str(leaf.dtype)]


def _portable(leaf: Any) -> jax.Array | np.ndarray:
    """Numpy for what lives on this process alone while there are others: orbax lets process 0
    write numpy and takes only arrays of all processes otherwise."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable and jax.process_count() > 1):
        return leaf
    return np.asarray(leaf)


def save(
    manager: Manager, step: int, run_state: RunState, config_text: str, *, force: bool = False
) -> bool:
    """Starts to save `run_state` as `step`, if one is due (`every`) or with `force`.

    The arrays may be donated as soon as this returns. A step that is already there stays.

    Returns:
        whether a save was started.

    Raises:
        OSError: if this save or the one before could not be written; see `wait`.
    """
    due = force or step % manager.every == 0
    if not due or step in manager.orbax.all_steps():
        return False
    leaves = _named(jax.tree.map(_portable, run_state))
    manifest = {
        "config": config_text,
        "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
    }
    # Arrays without elements have no data to save; orbax refuses them.
    stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
    kinds = {_STATE: ocp.args.StandardSave(stored), _MANIFEST: ocp.args.JsonSave(manifest)}
    with _writing(manager):
        return manager.orbax.save(step, args=ocp.args.Composite(**kinds), force=True)


def latest_step(manager: Manager) -> int | None:
    """The newest complete step; None if there is no checkpoint."""
    return manager.orbax.latest_step()


def restore(manager: Manager, target: RunState, *, step: int | None = None) -> RunState:
    """The saved state of `step` (default: the newest), laid out as `target` says.

    Args:
        target: a `RunState` of ``jax.ShapeDtypeStruct`` with shardings, or of arrays. Leaves that
            are numpy come back as numpy; those without a sharding, on the default device.

    Raises:
        ValueError: naming the folder, if it cannot be read or holds another tree than `target`.
    """
    wait(manager)
    step = latest_step(manager) if step is None else step
    if step is None:
        raise ValueError(f"no checkpoint in {manager.folder}")
    folder = manager.folder / str(step)
    wanted = _named(target)
    _check_same(folder, _read_manifest(manager, step)["leaves"], wanted)
    abstract = {name: _abstract(leaf) for name, leaf in wanted.items() if leaf.size}
    with _reading(_unreadable(manager, step)):
        found = manager.orbax.restore(
            step, args=ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)})
        )[_STATE]
    leaves = [_like(leaf, found[name] if leaf.size else None) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """How orbax is told to return a leaf; it returns numpy for numpy."""
    if isinstance(leaf, np.ndarray | np.generic) or leaf.sharding is None:
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _like(leaf: Any, found: jax.Array | np.ndarray | None) -> jax.Array | np.ndarray:
    """What was found (None: a leaf without elements) as the kind of array that `leaf` is."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.empty(leaf.shape, leaf.dtype) if found is None else found
    if found is None:
        return jnp.empty(leaf.shape, leaf.dtype, device=leaf.sharding)
    return jnp.asarray(found)


def restore_subtree(workdir: str | os.PathLike, path: tuple[str, ...], target: Any) -> Any:
    """A part of the newest checkpoint of another run, such as ("train", "params", "policy").

    Only the bytes of that part are read; the folder is not changed.

    Args:
        target: the part as ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
        ValueError: naming the folder, if it has no checkpoint or not this part.
    """
    step = check_newest(workdir)
    manifest = json.loads((step / _MANIFEST / "metadata").read_text())
    prefix = "/".join(path)
    wanted = {f"{prefix}/{name}": leaf for name, leaf in _named(target).items()}
    part = {name: leaf for name, leaf in manifest["leaves"].items() if name in wanted}
    _check_same(step, part, wanted)
    damaged = f"checkpoint {step} cannot be read: its data is damaged"
    with _reading(damaged), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        leaves = reader.restore(
            step / _STATE,
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
    return jax.tree.unflatten(jax.tree.structure(target), [leaves[name] for name in wanted])


def check_newest(workdir: str | os.PathLike) -> pathlib.Path:
    """The folder of the newest checkpoint of a run, whose files are all there; reads no arrays.

    Raises:
        ValueError: naming the folder, if there is no checkpoint or the newest one is not whole.
    """
    folder = _whole_path(workdir) / _FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    steps = [int(step.name) for step in found if step.name.isdigit()]
    if not steps:
        raise ValueError(f"no checkpoint in {folder}; has the run that it names ended?")
    step = folder / str(max(steps))
    reason = _incomplete(step)
    if reason:
        older = f", or move it away to use step {sorted(steps)[-2]}" if len(steps) > 1 else ""
        raise ValueError(f"checkpoint {step} is not complete: {reason}; copy it again{older}")
    return step


def saved_config(manager: Manager, step: int) -> str:
    """The config's text that was saved with `step`."""
    return _read_manifest(manager, step)["config"]


def _read_manifest(manager: Manager, step: int) -> dict[str, Any]:
    with _reading(_unreadable(manager, step)):
        args = ocp.args.Composite(**{_MANIFEST: ocp.args.JsonRestore()})
        return manager.orbax.restore(step, args=args)[_MANIFEST]


@contextlib.contextmanager
def _reading(message: str) -> Iterator[None]:
    """Turns what orbax raises for files that it cannot read into a ValueError."""
    try:
        yield
    except Exception as error:
        # Of data that it cannot decode orbax says so with an Exception of no other type.
        if type(error) is not Exception and not isinstance(error, ValueError | OSError | KeyError):
            raise
        raise ValueError(message) from error


def _unreadable(manager: Manager, step: int) -> str:
    older = [other for other in manager.orbax.all_steps() if other < step]
    then = f"resume from step {max(older)}" if older else "start afresh"
    return f"checkpoint {manager.folder / str(step)} cannot be read; move it away to {then}"


def _check_same(folder: pathlib.Path, saved: Mapping[str, list], wanted: dict[str, Any]) -> None:
    faults = [f"it lacks {name}" for name in wanted if name not in saved]
    faults += [f"it has {name}, unknown to this run" for name in saved if name not in wanted]
    faults += [
        f"{name} is {saved[name]}, wanted {_describe(leaf)}"
        for name, leaf in wanted.items()
        if name in saved and saved[name] != _describe(leaf)
    ]
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise ValueError(
            f"checkpoint {folder} is of another run: {'; '.join(faults[:_NAMED])}{more}"
        )


def wait(manager: Manager) -> None:
    """Blocks until saves in progress are on disk.

    Raises:
        OSError: with the system's error number, if a save could not be written. The checkpoints
            before it stay: orbax removes an old one only when a newer one is whole.
    """
    with _writing(manager):
        manager.orbax.wait_until_finished()


def close(manager: Manager) -> None:
    """Finishes saves in progress and closes the folder; raises as `wait` does."""
    with _writing(manager):
        manager.orbax.close()


@contextlib.contextmanager
def _writing(manager: Manager) -> Iterator[None]:
    """Names the folder, the system's reason and the last whole step where a save fails."""
    try:
        yield
    except (OSError, ValueError) as error:
        # TensorStore raises a ValueError that ends in the number of the system's error.
        told = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(told[1]) if told else error.errno if isinstance(error, OSError) else None
        if number is None:
            raise
        steps = [int(f.name) for f in manager.folder.iterdir() if f.name.isdigit()]
        whole = [step for step in steps if not _incomplete(manager.folder / str(step))]
        last = f"step {max(whole)} is the last whole one" if whole else "there is none before it"
        reason = f"a checkpoint was not written: {os.strerror(number)}; {last}"
        raise OSError(number, reason, str(manager.folder)) from error


def digest(params: Any) -> str:
    """SHA-256 of a tree's paths, shapes, dtypes and bytes, in order of the paths, in hex.

    Arrays are gathered one at a time, so it does not depend on how the mesh lays them out.
    """
    named = _named(params)
    result = hashlib.sha256()
    for name in sorted(named):
        leaf = np.asarray(fetch_host(named[name]))
        result.update(f"{name} {leaf.shape} {leaf.dtype}\n".encode())
        result.update(leaf.tobytes())
    return result.hexdigest()
