"""Published families: the numbers of transformers, on odd shapes, padded and generated."""

import jax
import numpy as np
import pytest

from benchmarks.hf_parity import logits_of_both, tokens_of_both
from benchmarks.published_models import CONFIGS, make, save
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import FAMILIES, architecture, publish
from rlhf_jax.models.load import load_hf, read_hf_config
from rlhf_jax.models.transformer import decoder

TOLERANCE = 1e-4


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
    ours, wanted = logits_of_both(*both)
    assert np.abs(wanted).max() > 1  # numbers large enough to differ
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=TOLERANCE)


# Variants of others here: their generation differs from those by what test_logits compares, and
# that a cache continues the full pass is tested for every option in tests/conformance.
VARIANTS = {"llama 3.1", "llama, biases", "mistral, no window", "qwen2", "glm"}


@pytest.mark.parametrize(
    "both",
    [pytest.param(n, marks=[pytest.mark.slow] if n in VARIANTS else []) for n in CONFIGS],
    indirect=True,
)
def test_greedy_generation(both):
    ours, wanted = tokens_of_both(*both)
    assert ours.shape == wanted.shape == (3, 64)
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
