"""A run's folder, the same for every program: what is written at its start and at its end.

config.json  model.json  metrics.jsonl  tensorboard/  checkpoints/  samples.jsonl  summary.json
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.load import read_object
from rlhf_jax.schema import check_call
from rlhf_jax.training.writer import write_json

# A resumed run may differ from its config.json in these: how long it runs and what it writes;
# in a pipeline each stage may.
_FREE_FIELD = re.compile(r"(stages\.[^.]+\.config\.)?(train\.steps$|log\.|checkpoint\.)")
_FACTS = ("seconds", "peak_memory_bytes", "devices", "processes", "versions", "python")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def config_text(config: ConfigDict) -> str:
    """The config as JSON text with sorted keys."""
    return json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True)


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(old: dict, new: dict) -> list[str]:
    """Fields in which two configs differ, one line each; fields that may change are left out."""
    before, after = _flatten(old), _flatten(new)
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if _FREE_FIELD.match(name) or before.get(name) == after.get(name):
            continue
        lines.append(f"{name}: {before.get(name)!r} in the folder, {after.get(name)!r} now")
    return lines


def prepare(workdir: str, config: ConfigDict, models: dict[str, ModelConfig]) -> pathlib.Path:
    """Creates the folder, or checks that it belongs to the same config.

    Raises:
        ValueError: if the folder holds a run of another config, with the differences key by key;
            if it is no folder or cannot be written.
    """
    if "://" in workdir:
        raise ValueError(
            f"workdir={workdir!r} is not a local path; mount the bucket and name the mounted folder"
        )
    folder = pathlib.Path(workdir)
    path = folder / "config.json"
    check_workdir(workdir, config)
    barrier("config compared")  # before process 0 writes what the others read
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"workdir {folder} cannot be made: {error.strerror}") from error
        write_json(path, json.loads(config_text(config)))
        write_models(folder, models)
    barrier("folder prepared")
    return folder


def write_models(folder: pathlib.Path, models: Mapping[str, ModelConfig]) -> None:
    """Writes model.json, which `read_models` reads."""
    described = {role: dataclasses.asdict(model) for role, model in models.items()}
    write_json(folder / "model.json", described)


def check_workdir(workdir: str, config: ConfigDict) -> None:
    """Raises the ValueError of `prepare`; writes nothing."""
    folder = pathlib.Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"workdir {folder} is a file; name a folder, which is made if need be")
    if (folder / "config.json").exists():
        now = json.loads(config_text(config))
        lines = differences(read_json(folder / "config.json"), now)
        if lines:
            raise ValueError(
                f"workdir {folder} holds a run of another config; use a new folder. It differs in "
                + "; ".join(lines)
            )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; see `models.load.read_object`."""
    return read_object(path)


def barrier(name: str) -> None:
    """Waits for all processes: what process 0 wrote before is there for the others after."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(fact: bool) -> bool:
    """What process 0 found; processes must not decide on their own what to run."""
    if jax.process_count() == 1:
        return fact
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(fact)))


def read_models(workdir: str) -> dict[str, ModelConfig]:
    """The model configs, by role, of the run in ``workdir``."""
    path = pathlib.Path(workdir) / "model.json"
    if not path.exists():
        raise ValueError(f"{workdir} is not a run's folder: it has no model.json")
    described = read_json(path)
    if not described:
        raise ValueError(f"{workdir} is not the folder of a run that trained: it holds no model")
    for role, fields in described.items():
        check_call(f"{path}: {role}", ModelConfig, fields)
    return {
        role: ModelConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        for role, fields in described.items()
    }


def peak_memory_bytes() -> int:
    """The most memory this process held: on devices where they tell, else resident on the host."""
    # CPU and some plug-ins have no memory statistics and return None.
    stats = [device.memory_stats() for device in jax.local_devices()]
    on_devices = sum(s.get("peak_bytes_in_use", 0) for s in stats if s)
    if on_devices:
        return on_devices
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A program's own results in its summary.json, without the closing facts."""
    return {name: value for name, value in summary.items() if name not in _FACTS}


def closing_facts(started: float) -> dict[str, object]:
    """What every summary.json says beside the program's own results."""
    return {
        "seconds": round(time.time() - started, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
    }
