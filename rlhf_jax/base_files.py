"""The small files of the model that a run began as, kept in its folder: an export needs them.

DIR/base/ holds the config.json and generation_config.json of the Hugging Face folder that the run
started from, directly or through other runs, and the files of the tokenizer that it used. They are
copied once, at the start, so that the run can be exported when the folder they came from is gone.
"""

import os
import pathlib
import shutil

import jax
from ml_collections import ConfigDict

from rlhf_jax import roles
from rlhf_jax.text.hub import local_folder
from rlhf_jax.models.peft import base_folder, is_adapter_folder

FOLDER = "base"
CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json",
    "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", TEMPLATE,
    "chat_template.json",
)  # fmt: skip
# One of these makes a tokenizer; the others say more about it.
_ENOUGH = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


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
    if path.is_dir():
        own = {k: v for k, v in _found(path).items() if k in TOKENIZER}
    elif path.is_file():
        own = {"tokenizer.json": path}
    elif name == "byte" or name.startswith("chars:"):
        own = {}
    else:
        return {}  # of the hub: the start, if there is one, is the same model
    for other in set(TOKENIZER) & set(start):
        del start[other]
    return own


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether `folder` holds a tokenizer that transformers loads."""
    return any((folder / name).is_file() for name in _ENOUGH)


def _found(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    names = (CONFIG, GENERATION, *TOKENIZER)
    return {name: folder / name for name in names if (folder / name).is_file()}
