"""Published families: the numbers of transformers, on odd shapes, padded and generated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.published_models import CONFIGS, make, save
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.completions import positions_of
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import FAMILIES, architecture, publish
from rlhf_jax.models.load import load_hf, read_hf_config
from rlhf_jax.models.transformer import decoder
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.types import Prompts, TokenTables

TOLERANCE = 1e-4
NEW_TOKENS = 64


def left_padded(rows: int, length: int, vocabulary: int):
    """Token ids and which of them are real: rows of every length, the first one whole."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(length, 2, rows).astype(int)
    mask = np.arange(length)[None] >= length - lengths[:, None]
    return np.where(mask, rng.integers(1, vocabulary, (rows, length)), 0), mask


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
    """(transformers' model, our model, our parameters)."""
    theirs = make(request.param)
    folder = save(theirs, tmp_path_factory.mktemp("model"))
    mesh = make_mesh({}, devices=jax.devices()[:1])
    config, params = load_hf(folder, mesh, ShardingRules())
    return theirs, decoder(config), params


def test_every_family_is_here():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


def test_logits(both):
    theirs, model, params = both
    tokens, mask = left_padded(4, 23, model.config.vocab_size)

    @jax.jit
    def logits(params, tokens, mask):
        hidden = model.apply(params, tokens, positions_of(mask), mask, None).hidden
        return model.logits(params, hidden)

    with torch.no_grad():
        wanted = theirs(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(np.array(positions_of(jnp.array(mask)))),
        ).logits.numpy()
    ours = np.array(logits(params, tokens, mask))
    assert np.abs(wanted[mask]).max() > 1  # numbers large enough to differ
    np.testing.assert_allclose(ours[mask], wanted[mask], rtol=0, atol=TOLERANCE)


def test_greedy_generation(both):
    theirs, model, params = both
    size = model.config.vocab_size
    tokens, mask = left_padded(3, 9, size)
    prompts = Prompts(
        tokens=jnp.array(tokens, jnp.int32),
        mask=jnp.array(mask),
        record=jnp.arange(3),
        source=jnp.zeros(3, int),
        draw=jnp.zeros(3, int),
    )
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
    ours = np.array(sample(params, prompts).tokens)
    assert ours.shape == wanted.shape == (3, NEW_TOKENS)
    assert len(np.unique(ours)) > 3  # not one token again and again
    np.testing.assert_array_equal(ours, wanted)


def test_a_config_of_ours_is_published_as_one_that_gives_it_back(both):
    _, model, _ = both
    family, published = publish(model.config)
    assert architecture(ModelConfig(**family.fields(published))) == architecture(model.config)


def test_a_model_that_no_family_has_is_refused():
    config = ModelConfig(
        vocab_size=9, width=8, layers=1, heads=2, kv_heads=2, head_dim=4, mlp_width=8,
        norm="layer", qk_norm=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no published family.*'norm': 'layer'"):
        publish(config)


@pytest.mark.parametrize("name", ["glm4", "gpt2"])
def test_a_bare_decoder_is_read(tmp_path, name):
    """Files of a model without head lack the prefix of names, as GPT-2's published ones do."""
    theirs = make(name, tie_word_embeddings=True)
    theirs.base_model.save_pretrained(tmp_path / "bare")
    save(theirs, tmp_path / "whole")
    mesh = make_mesh({}, devices=jax.devices()[:1])
    bare, whole = (load_hf(tmp_path / n, mesh, ShardingRules())[1] for n in ("bare", "whole"))
    jax.tree.map(np.testing.assert_array_equal, bare, whole)
    assert read_hf_config(tmp_path / "bare").lm_head
