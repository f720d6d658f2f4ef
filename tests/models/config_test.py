"""Configurations: clear errors, and named sizes with the parameter counts of their sources."""

import dataclasses

import jax
import pytest

from rlhf_jax.models.config import ModelConfig, named_size
from rlhf_jax.models.transformer import decoder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(heads=6, kv_heads=4), "model.heads=6 is not a multiple of model.kv_heads=4"),
        (dict(head_dim=15), "model.head_dim=15"),
        (dict(width=0), "model.width=0; want a positive"),
        (dict(lora_rank=-1), "model.lora_rank=-1"),
        (dict(remat="some"), "model.remat='some'; known: products, none, full, dots"),
        (dict(compute_dtype="float64"), "model.compute_dtype='float64'; known: float32"),
        (dict(lora_targets=("q",)), "model.lora_targets='q'; known: query"),
        (dict(score_heads=("value", "value")), "names a head twice"),
        (dict(logprob_chunk=0), "model.logprob_chunk=0"),
        (dict(layer_chunk=-1), "model.layer_chunk=-1"),
    ],
)
def test_bad_fields_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        named_size("tiny", **overrides)


def test_unknown_size_lists_known_ones_and_unknown_field_is_an_error():
    with pytest.raises(ValueError, match=r"model.name='huge'; known sizes: tiny, small"):
        named_size("huge")
    with pytest.raises(TypeError, match="widht"):
        named_size("tiny", widht=3)


def test_configs_are_hashable_values():
    assert named_size("tiny") == named_size("tiny") and hash(named_size("tiny"))
    assert dataclasses.replace(named_size("tiny"), layers=3) == named_size("tiny", layers=3)
    assert isinstance(named_size("small"), ModelConfig)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("8b", 8_030_261_248),  # Llama 3 8B, as published
        ("1b", 1_235_814_400),  # Llama 3.2 1B
        ("0.5b", 494_032_768),  # Qwen2.5 0.5B
        ("7b", 7_615_616_512),  # Qwen2.5 7B
        ("0.6b", 596_049_920),  # Qwen3 0.6B
        ("4b", 4_022_468_096),  # Qwen3 4B
        ("stories260k", 260_032),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, count):
    shapes = jax.eval_shape(decoder(named_size(name)).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_logits_are_kept_where_they_are_no_more_than_a_layer_keeps():
    config = named_size("tiny")
    # queries and outputs of attention, keys and values, the residual's input, up and gate
    kept = 2 * 64 + 2 * 32 + 64 + 2 * 128
    assert dataclasses.replace(config, vocab_size=kept).keep_logits
    assert not dataclasses.replace(config, vocab_size=kept + 1).keep_logits
    assert not dataclasses.replace(config, vocab_size=kept, remat="full").keep_logits
