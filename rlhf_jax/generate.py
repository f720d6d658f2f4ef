"""Completions of the prompts in a file, sampled from any policy.

    python -m rlhf_jax.generate --model=DIR --prompts=IN.jsonl --output=OUT.jsonl --samples=4

DIR is a Hugging Face folder or that of a run. A line of IN holds its prompt as ``prompt`` (text),
``tokens`` (ids) or ``messages`` (a dialogue; an answer at its end is left out), or in any fields
that ``--template`` names. The beginning-of-text token comes first where the tokenizer itself puts
it, or the run did (``--bos``, ``--nobos``); ``tokens`` are taken as they are. A line of OUT has

    prompt, prompt_tokens   the text (that of the ids where the line had none) and its ids
    completions, tokens     K texts and K lists of ids, the end-of-text token included
    logprobs                K lists in nats, at the sampling temperature (greedy: at 1) and not
                            truncated by top_k, top_p or min_p: what `rlhf_jax.score` says
    truncated               K times whether max_tokens cut the completion

and all other fields of its line of IN, in the order of IN. A sample depends on the seed, the
prompt's place in the file and the sample's number, not on the batch that it is in.
"""

import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import jax
import numpy as np

from rlhf_jax import model_folder, program, token_lines
from rlhf_jax.data.examples import Row
from rlhf_jax.data.prompts import pad_left
from rlhf_jax.data.sources import Record
from rlhf_jax.label_samples import write_lines
from rlhf_jax.mesh import ShardingRules, batch_shards, fetch_host, make_mesh, shard_batch
from rlhf_jax.model_folder import ModelFolder
from rlhf_jax.models.passes import longest_row
from rlhf_jax.models.transformer import decoder
from rlhf_jax.sampling import sampler
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.text.steps import token_tables
from rlhf_jax.token_lines import Encoder, Line
from rlhf_jax.training.keys import Purpose, step_key
from rlhf_jax.training.writer import plain
from rlhf_jax.types import Prompts, Rollouts, Sampling

_log = logging.getLogger(__name__)
_SEEDS = 2**31


def generate(
    *,
    model: Annotated[str, "Model folder: of Hugging Face, or of a run."],
    prompts: Annotated[str, "JSONL file (.gz too): prompt, tokens or messages in each line."],
    output: Annotated[str, "JSONL file to write."],
    samples: Annotated[int, "Completions of each prompt."] = 1,
    max_tokens: Annotated[int, "Tokens of a completion at most."] = 256,
    temperature: Annotated[float | int, "Divides the logits; 0 is greedy."] = 1.0,
    top_k: Annotated[int, "How many of the likeliest tokens are drawn from; 0 is all."] = 0,
    top_p: Annotated[float | int, "Mass of the likeliest tokens that are drawn from."] = 1.0,
    min_p: Annotated[float | int, "Least share of the best token's probability; 0 is off."] = 0.0,
    greedy: Annotated[bool, "The likeliest token each time; as --temperature=0."] = False,
    seed: Annotated[int, "All randomness is a function of it."] = 0,
    template: Annotated[str, "The prompt's text, from a line's fields."] = token_lines.PLAIN,
    max_prompt: Annotated[int, "Tokens of a prompt; a longer one is an error. 0: no limit."] = 0,
    tokenizer: Annotated[str, "In place of the folder's own: byte, a folder, a file."] = "",
    chat_template: Annotated[str, "Jinja file in place of the tokenizer's own."] = "",
    bos: Annotated[bool | None, "Begin texts by the beginning-of-text token, or not."] = None,
    dtype: Annotated[str, "float32, bfloat16 or float16 in place of the checkpoint's."] = "",
    batch: Annotated[int, "Prompts at a time, made a multiple of the devices."] = 16,
    overwrite: Annotated[bool, "Replace the output file if it exists."] = False,
) -> int:
    """Samples completions of every prompt of a file; returns how many prompts it had.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    token_lines.check_counts(samples=samples, max_tokens=max_tokens, batch=batch)
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"--seed={seed}; wanted 0 to {_SEEDS - 1}")
    sampling = make_sampling(0.0 if greedy else temperature, top_k, top_p, min_p)
    opened = model_folder.open_model(
        model, tokenizer=tokenizer, chat_template=chat_template, bos=bos, dtype=dtype
    )
    if not opened.config.lm_head:
        raise ValueError(f"--model={model!r} is a reward model; rlhf_jax.score is for those")
    token_lines.check_output(output, overwrite)
    encoder = Encoder(opened.text, opened.config.vocab_size, template)
    encode = functools.partial(_encode, encoder, max_prompt)
    widest = longest_row(opened.config) - max_tokens
    if widest < 1:
        raise ValueError(
            f"--max_tokens={max_tokens}, but the model has learned {opened.config.max_positions} "
            "positions; wanted fewer tokens"
        )
    count = token_lines.count_rows(prompts, encode, widest)

    mesh, rules = make_mesh({"data": -1}), ShardingRules()
    rows = token_lines.batch_rows(batch, count, batch_shards(mesh, rules))
    with jax.set_mesh(mesh):
        draw = _draw(opened, mesh, rules, sampling, samples, max_tokens, seed)
        found = token_lines.in_order(prompts, encode, draw, rows=rows, count=count,
                                     widest=widest)  # fmt: skip
        write_lines(pathlib.Path(output), map(plain, found))
    _log.info("%d x %d completions in %s", count, samples, output)
    return count


def _encode(encoder: Encoder, max_prompt: int, record: Record) -> Row:
    """A record's prompt, which is all of the row."""
    tokens = encoder.prompt(record)
    if 0 < max_prompt < len(tokens):
        raise ValueError(
            f"the prompt has {len(tokens)} tokens but --max_prompt={max_prompt}; shorten it or "
            "raise the limit"
        )
    return Row(tokens, len(tokens))


def _draw(
    opened: ModelFolder, mesh, rules, sampling: Sampling, samples: int, max_tokens: int, seed: int
) -> Callable[[list[Line], int], list[dict[str, Any]]]:
    """Lines of one batch and their padded width -> what is written of each."""
    model = decoder(opened.config, rules)
    params = model_folder.load_params(opened, mesh, rules)
    tables = token_tables(opened.text, vocab_size=opened.config.vocab_size)
    key = step_key(seed, Purpose.EVALUATE, 0)  # rows are told apart by their place in the file

    @jax.jit
    def sample(params, prompts, key, sampling, tables):
        return sampler.generate(
            model, params, {}, prompts, key, samples=samples, sampling=sampling,
            max_tokens=max_tokens, tables=tables, version=0, mesh=mesh,
        )  # fmt: skip

    def draw(lines: list[Line], width: int) -> list[dict[str, Any]]:
        tokens, mask = pad_left([line.row.tokens for line in lines], width, opened.text.pad_id)
        record = np.array([line.index for line in lines], np.int32)
        none = np.zeros_like(record)
        prompts = Prompts(tokens=tokens, mask=mask, record=record, source=none, draw=none)
        prompts = shard_batch(mesh, rules, prompts)
        rollouts = fetch_host(sample(params, prompts, key, sampling, tables))
        return [_fields(opened, line, rollouts, i) for i, line in enumerate(lines)]

    return draw


def _fields(opened: ModelFolder, line: Line, rollouts: Rollouts, place: int) -> dict[str, Any]:
    """What is written of one prompt: its samples in the batch's rows."""
    k, decode = rollouts.group_size, opened.text.decode
    rows = range(place * k, (place + 1) * k)
    tokens = [rollouts.tokens[b][rollouts.mask[b]].tolist() for b in rows]
    return {
        "prompt": line.record.get("prompt", decode(line.row.tokens)),
        "prompt_tokens": line.row.tokens,
        "completions": [decode(ids) for ids in tokens],
        "tokens": tokens,
        "logprobs": [rollouts.logprobs[b][rollouts.mask[b]].tolist() for b in rows],
        "truncated": [bool(rollouts.truncated[b]) for b in rows],
    }


if __name__ == "__main__":
    program.run_flags(generate)
