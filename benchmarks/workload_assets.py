"""Models and texts for workloads A to D where no folder of them is named: random weights and words.

The weights have the shape and the type of those that others are measured with, so steps cost the
same; what they say means nothing.
"""

import itertools
import json
import pathlib

import jax
import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from benchmarks.workloads import SIZES, SMALL_SIZES, Options
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.save import save_hf
from rlhf_jax.models.transformer import decoder

END = "</s>"
SHAPE = dict(vocab_size=4096, width=512, layers=8, heads=8, kv_heads=4, head_dim=64, mlp_width=1536)
SMALL_SHAPE = dict(vocab_size=64, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=24)


def make_tokenizer(vocab: int) -> tokenizers.Tokenizer:
    """A token for each word of four letters from a to h, as many as there is room for."""
    letters = itertools.product("abcdefgh", repeat=4)
    words = ["".join(each) for each in itertools.islice(letters, vocab - 1)]
    ids = {word: index for index, word in enumerate([END, *words])}
    made = tokenizers.Tokenizer(WordLevel(ids, unk_token=END))
    made.add_special_tokens([END])
    made.pre_tokenizer = WhitespaceSplit()
    return made


def make(folder: pathlib.Path, options: Options) -> None:
    """Writes ``model/``, ``reward/``, ``value/``, ``prompts.json`` and ``pairs.json``."""
    shape = SMALL_SHAPE if options.small else SHAPE
    sizes = SMALL_SIZES if options.small else SIZES
    plain = dict(rope_theta=1e6, norm_eps=1e-6, qk_norm=True)
    words = make_tokenizer(shape["vocab_size"])
    scoring = dict(lm_head=False, score_heads=("outcome",))
    for seed, (name, heads) in enumerate((("model", {}), ("reward", scoring), ("value", scoring))):
        config = ModelConfig(**shape, **plain, **heads)
        params = jax.jit(decoder(config).init)(jax.random.key(seed))
        role = "outcome" if heads else "policy"
        save_hf(folder / name, params, config, role, token_ids={"pad_token_id": 0})
        words.save(str(folder / name / "tokenizer.json"))
    random = np.random.default_rng(0)

    def text(length: int) -> dict:
        ids = random.integers(1, shape["vocab_size"], length).tolist()
        return {"text": " ".join(map(words.id_to_token, ids)), "ids": ids}

    prompts = [text(sizes["A"].prompt) for _ in range(512)]
    pairs = [{side: text(sizes["D"].prompt) for side in ("chosen", "rejected")} for _ in range(128)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "pairs.json").write_text(json.dumps(pairs))
