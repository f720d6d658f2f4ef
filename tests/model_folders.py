"""Model folders for tests of programs that take one, and JSONL files beside them."""

import json
import pathlib

from tests.models.load_test import LLAMA, published, write_folder
from tests.roles_test import saved_run

CONFIG = {**LLAMA, "vocab_size": 260}  # room for the byte tokenizer
TENSORS = published(CONFIG)


def hf_folder(folder: pathlib.Path, **changes) -> str:
    """A Hugging Face folder without a tokenizer; `TENSORS` are its tensors."""
    return str(write_folder(folder, CONFIG | changes, TENSORS))


def run_of(folder: pathlib.Path, config, mesh, tokenizer: str = "byte"):
    """The folder of a run whose config names a tokenizer, and its parameters."""
    params = saved_run(folder, config, mesh)
    (folder / "config.json").write_text(json.dumps({"seed": 0, "data": {"tokenizer": tokenizer}}))
    return str(folder), params


def write(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str | pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
