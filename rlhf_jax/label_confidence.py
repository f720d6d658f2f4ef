"""How sure reward models are of a file's preferences: the field ``confidence`` that sources read.

    python -m rlhf_jax.label_confidence --models=RUN[,RUN...] --pairs=IN.jsonl --output=OUT.jsonl

A line of OUT has all fields of its line of IN, in the order of IN, and ``confidence``: the mean
over the models of σ(r_chosen − r_rejected), the probability that a model gives the choice. This is
data cartography (Swayamdipta et al. 2020, https://arxiv.org/abs/2009.10795, equation 1), where the
models are those of one run after each epoch: name folders of runs of one epoch, two, and so on. A
line with a ``label`` p has p c + (1 − p)(1 − c) in place of c. A source of pairs leaves out the
share ``drop_unsure`` of lowest confidence (C-TR of Singhal et al. 2023,
https://arxiv.org/abs/2310.03716, section 4).

Texts are written as in training: the prompt by ``--template`` or by the chat template over the
messages under the field ``--chat``, completions closed by the end-of-text token unless
``chosen_truncated`` or ``rejected_truncated`` says that they were cut off.
"""

import logging
import pathlib
from typing import Annotated

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax import model_folder, program, token_lines
from rlhf_jax.compile_watch import CompileWatch
from rlhf_jax.data.balance import mean_confidence
from rlhf_jax.data.examples import Row, check_prompt, first_field, flag, share
from rlhf_jax.data.forms import Form
from rlhf_jax.data.sources import JsonlSource
from rlhf_jax.evaluate_reward import heads_of, score_rows
from rlhf_jax.label_samples import write_lines
from rlhf_jax.mesh import ShardingRules, batch_shards, make_mesh
from rlhf_jax.model_folder import ModelFolder
from rlhf_jax.models.passes import longest_row
from rlhf_jax.schema import within
from rlhf_jax.score import make_reader, needs_prompt
from rlhf_jax.training.writer import plain

_log = logging.getLogger("rlhf_jax.label_confidence")  # __name__ is "__main__" when it is run


def label_confidence(
    *,
    models: Annotated[str, "Folders of reward models, with commas between them."],
    pairs: Annotated[str, "JSONL file (.gz too) of preference pairs."],
    output: Annotated[str, "JSONL file to write."],
    template: Annotated[str, "The prompt's text, from a line's fields."] = token_lines.PLAIN,
    chat: Annotated[str, "In place of a template: the field that holds messages."] = "",
    head: Annotated[str, "Which head judges texts, of a model with several."] = "",
    tokenizer: Annotated[str, "In place of the folders' own: byte, a folder, a file."] = "",
    dtype: Annotated[str, "float32, bfloat16 or float16 in place of the checkpoint's."] = "",
    batch: Annotated[int, "Texts at a time, made a multiple of the devices."] = 16,
    overwrite: Annotated[bool, "Replace the output file if it exists."] = False,
) -> int:
    """Labels every pair of a file; returns how many it had.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    token_lines.check_counts(batch=batch)
    token_lines.check_output(output, overwrite)
    folders = [one.strip() for one in models.split(",") if one.strip()]
    records = JsonlSource(pairs)
    labels = np.array([_label(records, i) for i in range(len(records))])
    asked = []
    for folder in folders:
        opened = model_folder.open_model(folder, tokenizer=tokenizer, dtype=dtype)
        name = heads_of(opened.config, head).score
        if not name:
            raise ValueError(f"--models: {folder} has no head that judges whole texts")
        form = Form(opened.text, template=None if chat else template, chat=chat or None)
        asked.append((opened, name, _rows(records, form, opened)))
    if not asked:
        raise ValueError("--models is empty; name the folder of a reward model")
    differences = [_differences(*one, batch=batch) for one in asked]
    sure = mean_confidence(np.stack(differences))
    sure = labels * sure + (1 - labels) * (1 - sure)
    lines = (plain({**records[i], "confidence": float(c)}) for i, c in enumerate(sure))
    write_lines(pathlib.Path(output), lines)
    _log.info("%d pairs in %s, mean confidence %.3f", len(records), output, sure.mean())
    return len(records)


def _label(records: JsonlSource, index: int) -> float:
    """P(chosen is better) as the line says it, 1 where it does not."""
    with within(records.place(index)):
        return share(records[index], ("label",)) if "label" in records[index] else 1.0


def _rows(records: JsonlSource, form: Form, opened: ModelFolder) -> list[Row]:
    """Both sides of every pair as they were in training, the chosen one first."""
    widest, rows = longest_row(opened.config), []
    for index in range(len(records)):
        record = records[index]
        with within(records.place(index)):
            names = (first_field(record, ("chosen",)), first_field(record, ("rejected",)))
            cut = (flag(record, "chosen_truncated"), flag(record, "rejected_truncated"))
            sides = form.halves(record, names, cut)
            if needs_prompt(opened.config):
                for side in sides:
                    check_prompt(side)
            longest = max(len(side.tokens) for side in sides)
            if longest > widest:
                raise ValueError(f"{longest} tokens, but {opened.path} has {widest} positions")
        rows += sides
    return rows


def _differences(
    opened: ModelFolder, name: str, rows: list[Row], *, batch: int
) -> Float[np.ndarray, " M"]:
    """r_chosen − r_rejected of every pair by one model."""
    mesh, rules = make_mesh({"data": -1}), ShardingRules()
    with jax.set_mesh(mesh):
        read = make_reader(opened, mesh, rules)
        size = token_lines.batch_rows(batch, len(rows), batch_shards(mesh, rules))
        said = score_rows(rows, read, size, CompileWatch())
    scores = np.array([one[name] for one in said], np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"--models: {opened.path} gives a score that is not finite")
    return scores[0::2] - scores[1::2]


if __name__ == "__main__":
    program.run_flags(label_confidence)
