"""Adapters of PEFT: its own library says what they are, of its files and of ours."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from benchmarks.published_models import make, save
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.load import load_hf
from rlhf_jax.models.lora import merge_lora
from rlhf_jax.models.peft import load_peft, open_peft, save_peft
from rlhf_jax.models.transformer import decoder

# Of peft, which asks transformers for a name that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SEQUENCES = transformers.AutoModelForSequenceClassification
TOKENS = np.random.default_rng(0).integers(1, 100, (2, 9))
TARGETS = {
    "llama": ["q_proj", "o_proj", "down_proj"],
    "glm4": ["v_proj", "gate_up_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
}


def mesh():
    return make_mesh({}, devices=jax.devices()[:1])


def theirs(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def ours(config, params):
    model = decoder(config)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    hidden = jax.jit(model.apply)(params, jnp.asarray(TOKENS), positions, TOKENS >= 0, None).hidden
    if config.lm_head:
        return np.asarray(model.logits(params, hidden))
    return np.asarray(model.scores(params, hidden)["outcome"])[:, -1:]


def adapted(kind, folder, task="CAUSAL_LM", **settings):
    """A model with random adapters, its base and them in folders, as PEFT's users have them."""
    outcome = {"kind": SEQUENCES, "num_labels": 1} if task == "SEQ_CLS" else {}
    base = make(kind, **outcome)
    save(base, folder / "base")
    values = dict(r=3, lora_alpha=5, target_modules=TARGETS[kind], task_type=task)
    if kind == "gpt2":
        values["fan_in_fan_out"] = True
    model = peft.get_peft_model(base, peft.LoraConfig(**values | settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapters")
    return model


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", dict(rank_pattern={"o_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 9})),
        ("llama", dict(use_rslora=True, layers_to_transform=[0, 2])),
        ("glm4", {}),
        ("gpt2", {}),
        ("llama", dict(task="SEQ_CLS")),
    ],
)
def test_adapters_of_peft_are_read(tmp_path, kind, settings):
    model = adapted(kind, tmp_path, **settings)
    config, params = load_peft(tmp_path / "adapters", mesh(), ShardingRules())
    assert config.lora_rank == 0
    np.testing.assert_allclose(ours(config, params), theirs(model), atol=1e-4)
    plain = load_hf(tmp_path / "base", mesh(), ShardingRules(), overrides=dict(lora_rank=0))
    assert np.abs(ours(*plain) - theirs(model)).max() > 0.01  # the adapters say something


@pytest.mark.parametrize(
    ("kind", "role", "targets"),
    [
        ("llama", "policy", ("query", "value", "up")),
        ("llama", "outcome", ("query", "output")),
        ("glm4", "policy", ("gate", "up", "key")),
        ("gpt2", "policy", ("query", "value", "output", "up")),
    ],
)
def test_peft_reads_what_we_write(tmp_path, kind, role, targets):
    outcome = {"kind": SEQUENCES, "num_labels": 1} if role == "outcome" else {}
    base = make(kind, **outcome)
    save(base, tmp_path / "base")
    lora = dict(lora_rank=2, lora_alpha=6.0, lora_targets=targets)
    key = jax.random.key(0)
    config, params = load_hf(tmp_path / "base", mesh(), ShardingRules(), overrides=lora, key=key)
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.2 * rng.normal(size=x.shape) * ("lora_" in str(path[-1])), params
    )
    out = tmp_path / "out"
    published = json.loads((tmp_path / "base" / "config.json").read_text())
    save_peft(out, params, config, role, base=str(tmp_path / "base"), published=published)
    model = peft.PeftModel.from_pretrained(base, out).eval()
    np.testing.assert_allclose(theirs(model), ours(config, params), atol=1e-4)

    plain, back = load_peft(out, mesh(), ShardingRules())
    merged = merge_lora(params, config)
    assert plain == dataclasses.replace(config, **{k: getattr(plain, k) for k in lora})
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)


def test_what_is_no_plain_adapter_is_refused(tmp_path):
    adapted("llama", tmp_path)
    folder = tmp_path / "adapters"
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")

    def refused(words, change, held=tensors):
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
        save_file(held, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=words):
            open_peft(folder)

    refused("use_dora=True is not supported.*merge_and_unload", {"use_dora": True})
    refused("bias='all' is not supported; wanted 'none'", {"bias": "all"})
    refused("init_lora_weights='pissa'", {"init_lora_weights": "pissa"})
    refused("peft_type='IA3'", {"peft_type": "IA3"})
    refused("'absent' is no Hugging Face folder", {"base_model_name_or_path": "absent"})
    refused("lacks base_model.model.score.weight", {"task_type": "SEQ_CLS"})
    first = next(name for name in tensors if ".lora_A." in name)
    refused("not its other half", {}, {k: v for k, v in tensors.items() if k != first})
    refused("wants", {}, tensors | {first: np.ones((3, 7), np.float32)})
    refused("no place for 1 tensors: x", {}, tensors | {"x": tensors[first]})
    refused("holds no lora_A", {}, {"x": tensors[first]})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled adapters are not read"):
        open_peft(folder)


def test_a_base_is_found_beside_its_adapters(tmp_path):
    adapted("llama", tmp_path)
    path = tmp_path / "adapters" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": "../base"}))
    shutil.move(tmp_path, moved := tmp_path.with_name("moved"))
    assert open_peft(moved / "adapters").base == moved / "adapters" / "../base"
