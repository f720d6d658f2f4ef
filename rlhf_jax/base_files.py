"""The small files of the model that a run began as, kept in its folder: an export needs them.

DIR/base/ holds the config.json and generation_config.json of the Hugging Face folder that the run
started from, directly or through other runs, and the files of the tokenizer that it used. They are
copied once, at the start, so that the run can be exported when the folder they came from is gone.
"""

import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from rlhf_jax import roles, run_folder
from rlhf_jax.models.peft import base_folder, is_adapter_folder
from rlhf_jax.text.hub import local_folder

FOLDER = "base"
CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json",
    "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", TEMPLATE,
    "chat_template.json",
)  # fmt: skip
# One of these makes a tokenizer; the others say more about it.
_ENOUGH = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class OwnTokenizer(NamedTuple):
    """The tokenizer that belongs to a model folder.

    name: what loads it; "" where the folder has none.
    said: what the run's config called it; for a folder of Hugging Face the name once more.
    chat_template: a Jinja file in place of the tokenizer's own; "" for that.
    bos: whether texts begin with the beginning-of-text token; None is what the tokenizer does.
    """

    name: str
    said: str
    chat_template: str = ""
    bos: bool | None = None


def keep(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Copies what a run's start and its tokenizer consist of, unless that was done before.

    Process 0 writes; the folder is there whole or not at all.
    """
    kept = workdir / FOLDER
    if jax.process_index() != 0 or kept.exists():
        return
    files = start_files(config.model.get("init_from", ""))
    files |= tokenizer_files(config.data.get("tokenizer", ""), files)
    template = config.data.get("chat_template")
    if template:
        files.pop("chat_template.json", None)
        files[TEMPLATE] = pathlib.Path(template)
    if not files:
        return
    draft = workdir / f"{FOLDER}.tmp"
    shutil.rmtree(draft, ignore_errors=True)  # what a killed process left
    draft.mkdir()
    for name, path in files.items():
        shutil.copyfile(path, draft / name)
    os.replace(draft, kept)


def start_files(folder: str) -> dict[str, pathlib.Path]:
    """config.json, generation_config.json and tokenizer files behind a start, by name.

    They lie in a Hugging Face folder itself and under base/ of a run.
    """
    if not folder:
        return {}
    path = pathlib.Path(local_folder(folder))
    if is_adapter_folder(path):
        return _found(base_folder(path)) | _found(path)
    return _found(path if roles.is_hf_folder(str(path)) else path / FOLDER)


def tokenizer_files(name: str, start: dict[str, pathlib.Path]) -> dict[str, pathlib.Path]:
    """The files of the tokenizer that a config names, in place of those of the start.

    `start` loses its tokenizer files where the tokenizer is another one.
    """
    path = pathlib.Path(name or "-")
    if path.is_file():
        own = {"tokenizer.json": path}
    elif not name or name == "byte" or name.startswith("chars:"):
        own = {}
    else:
        path = pathlib.Path(local_folder(name, weights=False))
        own = {k: v for k, v in _found(path).items() if k in TOKENIZER}
    for other in set(TOKENIZER) & set(start):
        del start[other]
    return own


def own_tokenizer(folder: str) -> OwnTokenizer:
    """The tokenizer of a model folder: of Hugging Face, of adapters, or of a run.

    A run's own copy comes first: what it was copied from may be gone, or another by now.
    """
    path = pathlib.Path(local_folder(folder))
    if is_adapter_folder(path) and not has_tokenizer(path):
        path = base_folder(path)
    if is_adapter_folder(path) or roles.is_hf_folder(str(path)):
        name = str(path) if has_tokenizer(path) else ""
        return OwnTokenizer(name, name)
    data, kept = run_config(path).get("data", {}), path / FOLDER
    said, chat = data.get("tokenizer") or "", data.get("chat_template") or ""
    if chat and (kept / TEMPLATE).is_file():
        chat = str(kept / TEMPLATE)
    # What a run did not ask for it did without.
    name = str(kept) if has_tokenizer(kept) else said
    return OwnTokenizer(name, said, chat, bool(data.get("bos")))


def run_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """The config that the run in ``folder`` was started with; empty where there is none."""
    path = pathlib.Path(folder) / CONFIG
    return run_folder.read_json(path) if path.is_file() else {}


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether `folder` holds a tokenizer that transformers loads."""
    return any((folder / name).is_file() for name in _ENOUGH)


def _found(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    names = (CONFIG, GENERATION, *TOKENIZER)
    return {name: folder / name for name in names if (folder / name).is_file()}
