"""What is written is what transformers loads, and what we read back, bit for bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util

from benchmarks.published_models import CONFIGS
from rlhf_jax.mesh import ShardingRules, make_mesh, shardings_for
from rlhf_jax.models.config import named_size
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.load import load_hf, read_hf_config
from rlhf_jax.models.save import class_of, save_hf
from rlhf_jax.models.tensors import open_folder, open_tensors
from rlhf_jax.models.transformer import decoder

PAD = {"pad_token_id": 0}
AUTO = {
    "policy": transformers.AutoModelForCausalLM,
    "outcome": transformers.AutoModelForSequenceClassification,
    "process": transformers.AutoModelForTokenClassification,
    "value": transformers.AutoModel,
}
# All that differs between families is in their policies; these have names of their own for heads.
SCORED = ("llama", "gemma3", "glm4", "gpt2")
TOKENS = np.random.default_rng(0).integers(1, 101, (2, 7))


@pytest.mark.parametrize("role", AUTO)
@pytest.mark.parametrize("kind", FAMILIES)
def test_classes_are_those_of_transformers(kind, role):
    family = FAMILIES[kind]()
    wanted = AUTO[role]._model_mapping.get(transformers.CONFIG_MAPPING[kind], None)
    if role == "value" or role in family.classes:
        assert class_of(family, kind, role) == wanted.__name__
        return
    assert wanted is None
    with pytest.raises(ValueError, match=f"no class for a model of type '{kind}' that is a {role}"):
        class_of(family, kind, role)


def one_device():
    return make_mesh({}, devices=jax.devices()[:1])


def random_params(config, seed=0):
    """Parameters of which none is 0 or 1, so that none is taken for another."""
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


def config_of(kind, tmp_path, **changes):
    CONFIGS[kind].save_pretrained(tmp_path / "base")
    return read_hf_config(tmp_path / "base", changes)


def of_role(role):
    return dict(lm_head=role == "policy", score_heads=() if role == "policy" else (role,))


def ours(config, params, tokens):
    model = decoder(config)
    ids = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = jax.jit(model.apply)(params, ids, positions, ids >= 0, None).hidden
    return model.logits(params, hidden) if config.lm_head else model.scores(params, hidden)


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_equal(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other[path]), err_msg=path)


def theirs(folder, role, dtype=torch.float32):
    """The model as transformers loads it; nothing missing, nothing left over."""
    model, told = AUTO[role].from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert (
        type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    )
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "role"),
    [(kind, "policy") for kind in CONFIGS]
    + [(kind, role) for kind in SCORED for role in ("outcome", "process", "value")],
)
def test_transformers_and_we_read_what_is_written(tmp_path, kind, role):
    config = config_of(kind, tmp_path, **of_role(role))
    params = random_params(config)
    folder = tmp_path / "out"
    if (kind, role) == ("gemma3", "process"):
        with pytest.raises(ValueError, match="no class for a model of type 'gemma3_text'"):
            save_hf(folder, params, config, role, token_ids=PAD)
        return
    save_hf(folder, params, config, role, token_ids=PAD)
    got, back = load_hf(folder, one_device(), ShardingRules())
    assert got == config
    assert_equal(back, params)
    model = theirs(folder, role)
    mine = ours(config, params, TOKENS)
    with torch.no_grad():
        out = model(torch.from_numpy(TOKENS))
    if role == "policy":
        np.testing.assert_allclose(np.asarray(mine), out.logits.numpy(), atol=1e-4)
    elif role == "outcome":
        scores = np.asarray(mine["outcome"])[:, -1:]
        np.testing.assert_allclose(scores, out.logits.numpy(), atol=1e-4)
    elif role == "process":
        scores = np.asarray(mine["process"])[..., None]
        np.testing.assert_allclose(scores, out.logits.numpy(), atol=1e-4)
    else:
        head = open_tensors(folder / "value_head.safetensors")
        values = out.last_hidden_state.numpy() @ head["value.weight"].T + head["value.bias"]
        np.testing.assert_allclose(np.asarray(mine["value"])[..., None], values, atol=1e-4)


def test_tensors_are_those_that_transformers_wrote(tmp_path):
    """Fused ones put together, kernels turned back: the same files in and out."""
    for kind in ("glm4", "gpt2"):
        torch.manual_seed(0)
        there = tmp_path / kind / "theirs"
        AUTO["policy"].from_config(CONFIGS[kind]).save_pretrained(there)
        config, params = load_hf(there, one_device(), ShardingRules())
        base = json.loads((there / "config.json").read_text())
        save_hf(tmp_path / kind / "ours", params, config, "policy", base=base)
        wanted, got = open_folder(there), open_folder(tmp_path / kind / "ours")
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            np.testing.assert_array_equal(got[name], tensor, err_msg=name)
        assert json.loads((tmp_path / kind / "ours" / "config.json").read_text()) == base


LLAMA = named_size("tiny", layers=2, vocab_size=20, width=16, head_dim=4, mlp_width=24)


def test_files_are_split_as_asked_and_hold_no_more(tmp_path):
    params = random_params(LLAMA)
    save_hf(tmp_path / "whole", params, LLAMA, "policy")
    save_hf(tmp_path / "split", params, LLAMA, "policy", max_shard_size=4000)
    files = sorted(path.name for path in (tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    one, other = open_folder(tmp_path / "whole"), open_folder(tmp_path / "split")
    assert index["weight_map"].keys() == one.keys() == other.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    for file in files:
        held = open_tensors(tmp_path / "split" / file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 4000
    theirs(tmp_path / "split", "policy")


def test_sharded_parameters_are_gathered(tmp_path):
    params, mesh = random_params(LLAMA), make_mesh({"fsdp": 2, "tensor": 2})
    shardings = shardings_for(decoder(LLAMA).axes(), params, mesh, ShardingRules())
    save_hf(tmp_path / "one", params, LLAMA, "policy")
    save_hf(tmp_path / "four", jax.device_put(params, shardings), LLAMA, "policy")
    name = "model.safetensors"
    assert (tmp_path / "four" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["", "float32", "float16"])
def test_the_type_is_kept_or_the_one_asked_for(tmp_path, dtype):
    config = dataclasses.replace(LLAMA, param_dtype="bfloat16")
    params = random_params(config)
    save_hf(tmp_path / "out", params, config, "policy", dtype=dtype)
    name = dtype or "bfloat16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    wanted = np.asarray(params["final_norm"]["scale"]).astype(
        ml_dtypes.bfloat16 if name == "bfloat16" else name
    )
    got = open_folder(tmp_path / "out")
    assert {tensor.dtype.name for tensor in got.values()} == {name}
    np.testing.assert_array_equal(got["model.norm.weight"], wanted)


def test_values_too_large_for_a_type_are_refused(tmp_path):
    params = random_params(LLAMA)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds values up to 1e\+05.*float16"):
        save_hf(tmp_path / "out", params, LLAMA, "policy", dtype="float16")
    assert list(tmp_path.iterdir()) == []  # nothing half written


def test_the_base_config_is_kept_but_for_the_role(tmp_path):
    base = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "rms_norm_eps": LLAMA.norm_eps,
        "tie_word_embeddings": True,
        "max_position_embeddings": 77,
        "eos_token_id": [3, 4],
        "torch_dtype": "bfloat16",
    }
    config = dataclasses.replace(LLAMA, **of_role("outcome"))
    save_hf(tmp_path / "out", random_params(config), config, "outcome", base=base, token_ids=PAD)
    got = json.loads((tmp_path / "out" / "config.json").read_text())
    assert got.pop("architectures") == ["LlamaForSequenceClassification"]
    assert got.pop("id2label") == {"0": "LABEL_0"}
    assert got.pop("label2id") == {"LABEL_0": 0}
    assert got.pop("pad_token_id") == 0
    assert got.pop("dtype") == "float32"
    kept = {
        key: value for key, value in base.items() if key not in ("architectures", "torch_dtype")
    }
    assert got == kept
    other = base | {"num_hidden_layers": 3, "rms_norm_eps": 1e-3}
    with pytest.raises(ValueError, match=r"layers 3, not 2; norm_eps 0\.001, not 1e-05"):
        save_hf(tmp_path / "b", random_params(config), config, "outcome", base=other)


def test_what_cannot_be_written_is_refused(tmp_path):
    def refused(words, config, role, **keywords):
        with pytest.raises(ValueError, match=words):
            save_hf(tmp_path / "out", random_params(config), config, role, **keywords)

    reward = dataclasses.replace(LLAMA, **of_role("outcome"))
    refused("needs a pad_token_id", reward, "outcome")
    refused("no head 'process'; its heads: outcome", reward, "process")
    refused("needs an LM head", reward, "policy")
    refused("role 'critic'; known: policy, outcome", LLAMA, "critic")
    refused("dtype 'int8'; known", LLAMA, "policy", dtype="int8")
    refused("have adapters; merge them", dataclasses.replace(LLAMA, lora_rank=2), "policy")
    refused(
        "no published family has models with .*rope_interleaved",
        dataclasses.replace(LLAMA, rope_interleaved=True, qk_norm=True),
        "policy",
    )
    (tmp_path / "out").mkdir()
    save_hf(tmp_path / "out", random_params(LLAMA), LLAMA, "policy")  # it was empty
    refused("is not empty .*config.json.*name a new folder", LLAMA, "policy")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_hf(tmp_path / "file", random_params(LLAMA), LLAMA, "policy")
