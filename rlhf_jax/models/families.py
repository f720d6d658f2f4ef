"""The published families that we read and write, by the model_type of their config.json."""

import dataclasses
from types import MappingProxyType
from typing import Any

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.family import Family, Json
from rlhf_jax.models.gemma import gemma2, gemma3
from rlhf_jax.models.glm import glm, glm4
from rlhf_jax.models.gpt2 import gpt2
from rlhf_jax.models.llama import llama, mistral
from rlhf_jax.models.qwen import qwen2, qwen3

FAMILIES = MappingProxyType(
    {
        "llama": llama,
        "mistral": mistral,
        "qwen2": qwen2,
        "qwen3": qwen3,
        "gemma2": gemma2,
        "gemma3_text": gemma3,
        "glm": glm,
        "glm4": glm4,
        "gpt2": gpt2,
    }
)
# What a family decides; all other fields are ours alone and appear in no published config.
_OURS = (
    "lm_head", "score_heads", "param_dtype", "compute_dtype", "remat", "logprob_chunk",
    "layer_chunk", "lora_rank", "lora_alpha", "lora_targets", "members", "ensemble",
)  # fmt: skip


def family_of(published: Json) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: listing those that are known.
    """
    kind = published.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        hint = "; of gemma3 only the text model is supported" if kind == "gemma3" else ""
        raise ValueError(f"config.json: model_type={kind!r}; known are {known}{hint}")
    return FAMILIES[kind]()


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model that a published config decides."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _OURS}


def publish(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family whose models can be exactly this one, and its config.json.

    Raises:
        ValueError: no family has this combination of fields.
    """
    wanted = architecture(config)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for factory in FAMILIES.values():
        family = factory()
        published = family.publish(config)
        if {k: defaults[k] for k in wanted} | family.fields(published) == wanted:
            return family, published
    own = [k for k in wanted if defaults[k] is not dataclasses.MISSING]
    special = {k: wanted[k] for k in own if wanted[k] != defaults[k]}
    raise ValueError(f"no published family has models with {special}")
