"""What a model says about given texts: log-probabilities of a policy, scores of a reward model.

    python -m rlhf_jax.score --model=DIR --input=IN.jsonl --output=OUT.jsonl

DIR is a Hugging Face folder or that of a run. A line of IN holds ``tokens`` (ids), or a prompt
(``prompt``, ``messages``, or the fields that ``--template`` names) and its ``completion``; the two
are encoded apart, as in training. An answer that ends ``messages`` is their completion. The
beginning-of-text token comes first where the tokenizer itself puts it, or the run did (``--bos``,
``--nobos``). No end-of-text token is added unless ``--end_of_text`` says so: the reward models
trained here read a text that ended by itself at that token. Nothing is added to ``tokens``.

A line of OUT has all fields of its line of IN, in the order of IN, and what the model's heads say:

    logprobs      policy: nats at temperature 1, for each token of the completion; with ``tokens``
                  for each from the second on
    score         outcome head: its number at the last token, before any sigmoid
    step_scores   process head: its number at the end of each step, before any sigmoid
    step_ends     where the steps end, as indices into ``tokens``. Steps are the lines with visible
                  text (`rlhf_jax.text.steps`) of the completion, or of all ``tokens``
    values        value head: what it expects before each token that has a log-probability
    expected      advantage model: what it expects of the prompt; its score is the outcome head's
                  number less this
    tokens        the completion's ids

A model with several heads writes all of these that it has. A single head of another name was
trained for texts, steps or both, and writes score and step_scores; further heads put their name
before these. ODIN's score is that of its quality head; length_score is what it drops.
"""

import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import model_folder, program, token_lines
from rlhf_jax.data.examples import Row, check_prompt, pad_rows
from rlhf_jax.data.sources import Record
from rlhf_jax.label_samples import write_lines
from rlhf_jax.mesh import ShardingRules, batch_shards, fetch_host, make_mesh, shard_batch
from rlhf_jax.model_folder import ModelFolder
from rlhf_jax.models.completions import TextOutput, evaluate_texts
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import (
    EARLY_HEADS,
    EXPECTED_HEAD,
    LENGTH_HEAD,
    OUTCOME_HEAD,
    QUALITY_HEAD,
    VALUE_HEAD,
    is_advantage,
    is_odin,
)
from rlhf_jax.models.passes import longest_row
from rlhf_jax.models.transformer import decoder
from rlhf_jax.text.steps import mark_host_step_ends, token_tables
from rlhf_jax.token_lines import Encoder, Line
from rlhf_jax.training.writer import plain

_log = logging.getLogger(__name__)


class Reading(NamedTuple):
    """A head, and under which names what it says is written; "" where it is not.

    less: the head whose number at the prompt's last token is taken off the score, if any.
    """

    head: str
    score: str
    step_scores: str
    less: str = ""


def score(
    *,
    model: Annotated[str, "Model folder: of Hugging Face, or of a run."],
    input: Annotated[str, "JSONL file (.gz too): tokens, or prompt and completion in each line."],
    output: Annotated[str, "JSONL file to write."],
    end_of_text: Annotated[bool, "Close every completion by the end-of-text token."] = False,
    template: Annotated[str, "The prompt's text, from a line's fields."] = token_lines.PLAIN,
    tokenizer: Annotated[str, "In place of the folder's own: byte, a folder, a file."] = "",
    chat_template: Annotated[str, "Jinja file in place of the tokenizer's own."] = "",
    bos: Annotated[bool | None, "Begin texts by the beginning-of-text token, or not."] = None,
    dtype: Annotated[str, "float32, bfloat16 or float16 in place of the checkpoint's."] = "",
    batch: Annotated[int, "Texts at a time, made a multiple of the devices."] = 16,
    overwrite: Annotated[bool, "Replace the output file if it exists."] = False,
) -> int:
    """Scores every text of a file; returns how many it had.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    token_lines.check_counts(batch=batch)
    opened = model_folder.open_model(
        model, tokenizer=tokenizer, chat_template=chat_template, bos=bos, dtype=dtype
    )
    token_lines.check_output(output, overwrite)
    encoder = Encoder(opened.text, opened.config.vocab_size, template)
    encode = functools.partial(_encode, encoder, opened.config, ended=end_of_text)
    widest = longest_row(opened.config)
    count = token_lines.count_rows(input, encode, widest)

    mesh, rules = make_mesh({"data": -1}), ShardingRules()
    rows = token_lines.batch_rows(batch, count, batch_shards(mesh, rules))
    with jax.set_mesh(mesh):
        read = make_reader(opened, mesh, rules)
        found = token_lines.in_order(input, encode, read, rows=rows, count=count,
                                     widest=widest)  # fmt: skip
        write_lines(pathlib.Path(output), map(plain, found))
    _log.info("%d texts in %s", count, output)
    return count


def _encode(encoder: Encoder, config: ModelConfig, record: Record, *, ended: bool) -> Row:
    """The tokens of a record; a ValueError where a model needs to know what its prompt is."""
    row = encoder.text(record, ended=ended)
    if needs_prompt(config):
        check_prompt(row)
    return row


def needs_prompt(config: ModelConfig) -> bool:
    """Whether a text without a prompt has no score: an advantage model's, see `check_prompt`."""
    return is_advantage(config.score_heads)


def score_name(config: ModelConfig, name: str) -> str:
    """A name of `Reading.score`, and what is taken off that number, for readers of a report."""
    less = next((one.less for one in readings_of(config) if one.less and one.score == name), "")
    return f"{name} ({OUTCOME_HEAD} less {less})" if less else name


def readings_of(config: ModelConfig) -> list[Reading]:
    """How what the scoring heads say is named."""
    heads = [name for name in config.score_heads if name not in EARLY_HEADS]
    less = EXPECTED_HEAD if is_advantage(config.score_heads) else ""
    readings = []
    if is_odin(heads):
        heads = [name for name in heads if name not in (QUALITY_HEAD, LENGTH_HEAD)]
        readings = [Reading(QUALITY_HEAD, "score", ""), Reading(LENGTH_HEAD, "length_score", "")]
    for head in heads:
        named = "" if head in ("outcome", "process") or len(heads) == 1 else f"{head}_"
        both = head not in ("outcome", "process")
        score = f"{named}score" if both or head == "outcome" else ""
        steps = f"{named}step_scores" if head != "outcome" else ""
        readings.append(Reading(head, score, steps, less if head == "outcome" else ""))
    return readings


def make_reader(
    opened: ModelFolder, mesh, rules
) -> Callable[[list[Line], int], list[dict[str, Any]]]:
    """Lines of one batch and their padded width -> what is written of each.

    Rows for an advantage model have prompts: callers hold them to `check_prompt`, or leave
    them out.
    """
    model = decoder(opened.config, rules)
    params = model_folder.load_params(opened, mesh, rules)
    tables = token_tables(opened.text, vocab_size=opened.config.vocab_size)
    readings = readings_of(opened.config)

    @jax.jit
    def forward(params, texts):
        return evaluate_texts(model, params, {}, texts)

    def read(lines: list[Line], width: int) -> list[dict[str, Any]]:
        texts = pad_rows([line.row for line in lines], width, opened.text.pad_id)
        prompt = np.array([line.row.prompt for line in lines]).reshape(-1, 1)
        solution = texts.mask & (np.arange(width)[None] >= prompt)
        ends = mark_host_step_ends(texts.tokens, solution, tables)
        out = fetch_host(forward(params, shard_batch(mesh, rules, texts)))
        return [_fields(readings, line, out, ends, i) for i, line in enumerate(lines)]

    return read


def _fields(
    readings: list[Reading], line: Line, out: TextOutput, ends: np.ndarray, place: int
) -> dict[str, Any]:
    """What is written of one text: the row ``place`` of a batch."""
    start, end = line.row.prompt, len(line.row.tokens)
    first = max(start, 1)  # nothing comes before the first token of a text
    found: dict[str, Any] = {"tokens": line.row.tokens[start:]}
    if out.logprobs is not None:
        found["logprobs"] = out.logprobs[place, first:end].tolist()
    if VALUE_HEAD in out.scores:
        found["values"] = out.scores[VALUE_HEAD][place, first - 1 : end - 1].tolist()
    columns = np.flatnonzero(ends[place])
    for head, score, step_scores, less in readings:
        if less:
            found[less] = float(out.scores[less][place, first - 1])
        if score:
            said = out.scores[head][place, end - 1]
            # In float32, as the reward of a policy run subtracts.
            found[score] = float(said - out.scores[less][place, first - 1] if less else said)
        if step_scores:
            found[step_scores] = out.scores[head][place, columns].tolist()
            found["step_ends"] = (columns - start).tolist()
    return found


if __name__ == "__main__":
    program.run_flags(score)
