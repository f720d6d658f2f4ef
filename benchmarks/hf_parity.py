"""Every published family beside transformers: differences, load time, memory; writes the page.

    python -m benchmarks.hf_parity

Small random models of each family in odd shapes, float32: the largest difference of logits on a
padded batch, greedy generation token for token, the largest difference of a scoring head after
export, and whether export and load give the same bits. The second table is `benchmarks.hf_load`.
"""

import argparse
import datetime
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import hf_load
from benchmarks.pages import table
from benchmarks.published_models import CONFIGS, make
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.completions import positions_of
from rlhf_jax.models.load import load_hf
from rlhf_jax.models.save import save_hf
from rlhf_jax.models.transformer import Model, decoder
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.types import Params, Prompts, TokenTables

LENGTH, NEW_TOKENS = 23, 64
SCORERS = {
    "outcome": transformers.AutoModelForSequenceClassification,
    "process": transformers.AutoModelForTokenClassification,
}


def padded(rows: int, length: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded token ids of every length, and which of them are real."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(length, 2, rows).astype(int)
    mask = np.arange(length)[None] >= length - lengths[:, None]
    return np.where(mask, rng.integers(1, vocabulary, (rows, length)), 0), mask


def hidden_of(model: Model, params: Params, tokens: np.ndarray, mask: np.ndarray) -> jax.Array:
    """The final hidden states."""
    run = jax.jit(lambda p, t, m: model.apply(p, t, positions_of(m), m, None).hidden)
    return run(params, jnp.array(tokens), jnp.array(mask))


def logits_of_both(theirs, model: Model, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """(ours, theirs) at the real tokens of a left-padded batch."""
    tokens, mask = padded(4, LENGTH, model.config.vocab_size)
    with torch.no_grad():
        wanted = theirs(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(np.array(positions_of(jnp.array(mask)))),
        ).logits.numpy()
    ours = np.array(model.logits(params, hidden_of(model, params, tokens, mask)))
    return ours[mask], wanted[mask]


def tokens_of_both(theirs, model: Model, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """(ours, theirs) of greedy generation from a left-padded batch, [3 NEW_TOKENS]."""
    size = model.config.vocab_size
    tokens, mask = padded(3, 9, size)
    index = jnp.arange(3)
    prompts = Prompts(
        tokens=jnp.array(tokens, jnp.int32), mask=jnp.array(mask), record=index, source=0 * index,
        draw=0 * index,
    )  # fmt: skip
    no = np.zeros(size, bool)
    tables = TokenTables(
        ends_text=no, ends_step=no, text_before=~no, text_after=~no, pad=np.asarray(0, np.int32)
    )

    @jax.jit
    def sample(params, prompts):
        return generate(
            model, params, {}, prompts, jax.random.key(0), samples=1,
            sampling=make_sampling(temperature=0.0), max_tokens=NEW_TOKENS, tables=tables,
            version=0,
        )  # fmt: skip

    with torch.no_grad():
        wanted = theirs.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        ).numpy()[:, tokens.shape[1] :]
    return np.array(sample(params, prompts).tokens), wanted


def score_difference(theirs_class, role: str, source: pathlib.Path, folder: pathlib.Path) -> float:
    """A model with a fresh scoring head, exported: the largest difference of its scores."""
    overrides = {"lm_head": False, "score_heads": (role,)}
    mesh = make_mesh({"data": -1})
    config, params = load_hf(
        source, mesh, ShardingRules(), overrides=overrides, key=jax.random.key(1)
    )
    save_hf(folder, params, config, role, token_ids={"pad_token_id": 0})
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (3, LENGTH))
    mask = tokens > 0
    model = decoder(config)
    ours = np.array(model.scores(params, hidden_of(model, params, tokens, mask))[role])
    with torch.no_grad():
        wanted = theirs_class.from_pretrained(folder).eval()(torch.tensor(tokens)).logits.numpy()
    wanted = wanted[..., 0] if role == "process" else wanted
    ours = ours if role == "process" else ours[:, -1:]
    return float(np.abs(ours - wanted).max())


def same_bits(source: pathlib.Path, folder: pathlib.Path) -> str:
    """Whether what is exported is loaded as the same parameters."""
    place = (make_mesh({"data": -1}), ShardingRules())
    config, params = load_hf(source, *place)
    save_hf(folder, params, config, "policy")
    again = load_hf(folder, *place)[1]
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, again)
    return "yes" if all(jax.tree.leaves(same)) else "no"


def family_row(name: str, scratch: pathlib.Path) -> list[str]:
    """One line of the table."""
    theirs = make(name)
    source = scratch / "source"
    theirs.save_pretrained(source)
    config, params = load_hf(source, make_mesh({"data": -1}), ShardingRules())
    model = decoder(config)
    ours, wanted = logits_of_both(theirs, model, params)
    sampled, chosen = tokens_of_both(theirs, model, params)
    scores = []
    for role, theirs_class in SCORERS.items():
        if transformers.CONFIG_MAPPING[CONFIGS[name].model_type] in theirs_class._model_mapping:
            scores.append(f"{score_difference(theirs_class, role, source, scratch / role):.1e}")
        else:
            scores.append("no such class")
    return [
        name,
        f"{np.abs(ours - wanted).max():.1e}",
        f"{(sampled == chosen).sum()} of {chosen.size}",
        *scores,
        same_bits(source, scratch / "again"),
    ]


def page(rows: list[list[str]], loads: dict, command: str) -> str:
    """The whole page."""
    head = ["family", "logits", f"greedy, {NEW_TOKENS} tokens", "outcome", "process", "same bits"]
    memory = loads["memory"]
    versions = f"jax {jax.__version__}, transformers {transformers.__version__}"
    return f"""# Published families beside transformers

{datetime.datetime.now(datetime.UTC).date()}, {versions}, torch {torch.__version__}. Written by

    {command}

## The same numbers

Small random models of every family in float32 and odd shapes: a head width that is not width /
heads, one key/value head, a vocabulary that nothing divides, rows longer than the sliding window,
left padding. *logits*, *outcome* and *process* are the largest differences (the last two of scoring
heads after export, loaded by transformers' own classes); *greedy* counts equal tokens; *same bits*
says whether export and load give the same parameters.

{table(head, rows)}

## Loading

A folder of {loads["gigabytes"]:.2f} GB (bfloat16, the shape of Qwen2.5-0.5B), {loads["repeats"]}
loads of either in processes of their own, turn by turn, the files in the system's cache, every
weight read once at the end. Memory is anonymous host memory at its peak above the weights
themselves, in units of the largest tensor.

{
        table(
            ["", "ours / transformers"],
            [
                ["seconds, fastest runs", f"{loads['fastest']:.2f}"],
                ["seconds, medians", f"{loads['median']:.2f}"],
                [
                    "memory (largest tensors)",
                    f"{memory['ours']:.2f} / {memory['transformers']:.2f}",
                ],
            ],
        )
    }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", type=pathlib.Path, default="docs/results/parity.md")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(family_row(name, pathlib.Path(scratch)))
            print(" ".join(rows[-1]), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        hf_load.make_folder(folder, hf_load.SHAPE["num_hidden_layers"])
        loads = hf_load.compare(folder, args.repeats)
    args.page.write_text(page(rows, loads, "python -m benchmarks.hf_parity"), encoding="utf-8")
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
