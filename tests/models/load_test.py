"""Loading published folders: an independent numpy model of their conventions says what is right."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import save_file

from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.load import load_hf, read_hf_config
from rlhf_jax.models.tensors import open_tensors
from rlhf_jax.models.transformer import decoder

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50.0,
    "tie_word_embeddings": False,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 4}
KINDS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


def published(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors with the names and shapes of transformers' models."""
    rng = np.random.default_rng(seed)
    width, heads, kv = (
        config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    vocab, inner = config["vocab_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", width // heads)
    kind = config["model_type"]
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
        for name, count in (("q", heads), ("k", kv), ("v", kv)):
            shapes[f"{attention}.{name}_proj.weight"] = (count * head_dim, width)
            if kind == "qwen2":
                shapes[f"{attention}.{name}_proj.bias"] = (count * head_dim,)
            if kind == "qwen3" and name != "v":
                shapes[f"{attention}.{name}_norm.weight"] = (head_dim,)
        shapes[f"{attention}.o_proj.weight"] = (width, heads * head_dim)
        shapes[f"{mlp}.gate_proj.weight"] = shapes[f"{mlp}.up_proj.weight"] = (inner, width)
        shapes[f"{mlp}.down_proj.weight"] = (width, inner)
    return {
        name: (rng.normal(size=shape) * 0.4 + name.endswith("norm.weight")).astype(np.float32)
        for name, shape in shapes.items()
    }


def norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def reference_logits(config: dict, tensors: dict[str, np.ndarray], tokens) -> np.ndarray:
    """The published model in float64, one query and one head at a time."""
    t = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    theta, eps = config["rope_theta"], config["rms_norm_eps"]

    def project(x, name, count):
        y = x @ t[f"{name}_proj.weight"].T + t.get(f"{name}_proj.bias", 0.0)
        y = y.reshape(len(x), count, head_dim)
        scale = t.get(f"{name}_norm.weight")
        return y if scale is None else norm(y, scale, eps)

    def rotate(x):  # half-split, as transformers' rotate_half
        half = head_dim // 2
        angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) * 2 / head_dim)
        sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = t["model.embed_tokens.weight"][np.asarray(tokens)]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        name = f"{layer}.self_attn"
        h = norm(x, t[f"{layer}.input_layernorm.weight"], eps)
        q = rotate(project(h, f"{name}.q", heads))
        k = rotate(project(h, f"{name}.k", kv))
        v = project(h, f"{name}.v", kv)
        mixed = np.zeros((len(x), heads, head_dim))
        for here in range(len(x)):
            for head in range(heads):
                group = head // (heads // kv)
                scores = k[: here + 1, group] @ q[here, head] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                mixed[here, head] = weights @ v[: here + 1, group] / weights.sum()
        x = x + mixed.reshape(len(x), -1) @ t[f"{name}.o_proj.weight"].T
        h = norm(x, t[f"{layer}.post_attention_layernorm.weight"], eps)
        gate = h @ t[f"{layer}.mlp.gate_proj.weight"].T
        up = h @ t[f"{layer}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ t[f"{layer}.mlp.down_proj.weight"].T
    head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    return norm(x, t["model.norm.weight"], eps) @ head.T


def write_folder(folder: pathlib.Path, config: dict, tensors: dict | None = None) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(published(config) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def one_device():
    return make_mesh({}, devices=jax.devices()[:1])


def load(folder, **keywords):
    return load_hf(folder, one_device(), ShardingRules(), **keywords)


def our_logits(config, params, tokens):
    model = decoder(config)
    ids = jnp.asarray(tokens)[None]
    out = model.apply(params, ids, jnp.arange(ids.shape[1])[None], ids >= 0, None)
    return np.asarray(model.logits(params, out.hidden))[0]


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_published_model(tmp_path, kind):
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    config, params = load(write_folder(tmp_path, KINDS[kind]))
    wanted = reference_logits(KINDS[kind], published(KINDS[kind]), tokens)
    np.testing.assert_allclose(our_logits(config, params, tokens), wanted, atol=2e-5, rtol=2e-5)


def test_rope_theta_matters_and_is_read_in_every_spelling(tmp_path):
    plain = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    spellings = (
        {"rope_theta": 50.0},
        {"rope_theta": 50.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
    )
    for i, spelling in enumerate(spellings):
        folder = write_folder(tmp_path / str(i), {**plain, **spelling})
        assert read_hf_config(folder).rope_theta == 50.0
    assert read_hf_config(write_folder(tmp_path / "none", plain)).rope_theta == 10000.0
    logits = [our_logits(*load(tmp_path / name), list(range(8))) for name in ("0", "2", "none")]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 0.01


@pytest.mark.parametrize(
    ("kind", "config_class"),
    [
        ("llama", transformers.LlamaConfig),
        ("qwen2", transformers.Qwen2Config),
        ("qwen3", transformers.Qwen3Config),
    ],
)
def test_config_files_of_the_installed_transformers_are_read(tmp_path, kind, config_class):
    wanted = dict(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=3e-6,
        rope_theta=1234.0,
        tie_word_embeddings=True,
    )
    if kind == "qwen3":
        wanted["head_dim"] = 16
    config_class(**wanted).save_pretrained(tmp_path)
    got = read_hf_config(tmp_path)
    assert (got.vocab_size, got.width, got.mlp_width) == (99, 32, 48)
    assert (got.layers, got.heads, got.kv_heads) == (5, 4, 2)
    assert got.head_dim == (16 if kind == "qwen3" else 8)
    assert (got.norm_eps, got.rope_theta, got.tie_embeddings) == (3e-6, 1234.0, True)
    assert (got.qkv_bias, got.qk_norm) == (kind == "qwen2", kind == "qwen3")


CONFIG_CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "glm": transformers.GlmConfig,
    "glm4": transformers.Glm4Config,
    "gpt2": transformers.GPT2Config,
}


def test_every_family_is_compared():
    assert set(CONFIG_CLASSES) == set(FAMILIES)


@pytest.mark.parametrize("kind", CONFIG_CLASSES)
def test_defaults_are_those_of_the_installed_transformers(tmp_path, kind):
    needed = {
        "vocab_size": 9,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 8,
    }
    if kind == "gpt2":
        needed = {"vocab_size": 9, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 12}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **needed}))
    bare = read_hf_config(tmp_path)
    CONFIG_CLASSES[kind](**needed).save_pretrained(tmp_path)
    assert bare == read_hf_config(tmp_path)


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"data": 2, "tensor": 2}])
def test_born_sharded_with_the_values_of_one_device(tmp_path, axes):
    folder = write_folder(tmp_path, QWEN3)
    _, single = load(folder)
    _, sharded = load_hf(folder, make_mesh(axes), ShardingRules())
    for path, leaf in flat(sharded).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flat(single)[path]))
    name = "fsdp" if "fsdp" in axes else "tensor"
    query = sharded["layers"]["attention"]["query"]["kernel"]
    dim = {"fsdp": 1, "tensor": 2}[name]
    assert query.sharding.spec[dim] == name
    shard = query.addressable_shards[0].data.shape
    assert shard[dim] == query.shape[dim] // axes[name]


def test_split_files_with_an_index_equal_one_file(tmp_path):
    whole = write_folder(tmp_path / "whole", LLAMA)
    split = tmp_path / "split"
    split.mkdir()
    (split / "config.json").write_text(json.dumps(LLAMA))
    tensors = published(LLAMA)
    parts = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: parts[i % 3] for i, name in enumerate(tensors)}
    for part in parts:
        save_file({n: tensors[n] for n in tensors if weight_map[n] == part}, split / part)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    one, three = (flat(load(folder)[1]) for folder in (whole, split))
    assert set(one) == set(three)
    for path in one:
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(three[path]))
    (split / parts[1]).unlink()
    with pytest.raises(ValueError, match="lacks model-00002-of-00003"):
        load(split)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_any_float_type_is_read(tmp_path, dtype):
    tensors = {name: array.astype(dtype) for name, array in published(LLAMA).items()}
    _, params = load(write_folder(tmp_path, LLAMA, tensors))
    down = params["layers"]["mlp"]["down"]["kernel"]
    assert down.dtype == jnp.float32
    wanted = tensors["model.layers.2.mlp.down_proj.weight"].astype(np.float32).T
    np.testing.assert_array_equal(np.asarray(down[2]), wanted)
    _, half = load(tmp_path, overrides={"param_dtype": "bfloat16"})
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.bfloat16.dtype}


def test_unaligned_bytes_are_read(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    header = {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    text = json.dumps(header).encode()
    text += b" " * ((1 - len(text)) % 4)  # 8 + length is odd
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
    assert (8 + len(text)) % 4 == 1
    np.testing.assert_array_equal(np.ascontiguousarray(open_tensors(path)["x"]), values)


def test_heads_and_adapters_are_drawn_from_the_key(tmp_path):
    folder = write_folder(tmp_path, QWEN2)
    overrides = {"score_heads": ("value",), "lora_rank": 2}
    with pytest.raises(ValueError, match="pass `key`"):
        load(folder, overrides=overrides)
    key = jax.random.key(7)
    config, params = load(folder, overrides=overrides, key=key)
    drawn = flat(jax.jit(decoder(config).init)(key))
    got, plain = flat(params), flat(load(folder)[1])
    assert set(got) == set(drawn)
    fresh = set(got) - set(plain)
    assert "heads/value/kernel" in fresh
    assert "layers/mlp/down/lora_a" in fresh
    for path in got:
        wanted = drawn[path] if path in fresh else plain[path]
        np.testing.assert_allclose(np.asarray(got[path]), np.asarray(wanted), rtol=1e-6)


def test_models_without_an_lm_head_leave_the_published_one(tmp_path):
    config, params = load(write_folder(tmp_path, LLAMA), overrides={"lm_head": False})
    assert not config.lm_head
    assert "unembed" not in params


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, r"model_type='mamba'; known are llama, mistral, qwen2"),
        ({"model_type": None}, "known are"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"model_type": "gemma3"}, "only the text model"),
        ({"hidden_act": "relu"}, "hidden_act='relu'.*silu"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq.*plain weights"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3.*lacks low_freq_factor"),
        ({"rope_scaling": {"type": "linear"}}, "linear.*lacks factor"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "yarn.*default, linear"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differs by kind of layer"),
        (
            {"architectures": ["LlamaForTokenClassification"], "id2label": {"0": "a", "1": "b"}},
            "2 labels; wanted 1",
        ),
    ],
)
def test_configs_we_cannot_honour_are_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        load(write_folder(tmp_path, {**LLAMA, **change}, published(LLAMA)))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            without(published(LLAMA), "model.layers.1.mlp.up_proj.weight"),
            r"lack 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (without(published(LLAMA), "lm_head.weight"), r"lm_head\.weight"),
        (
            published(LLAMA) | {"model.norm.weight": np.ones(3, np.float32)},
            r"model\.norm\.weight is \(3,\).*\(16,\)",
        ),
        (
            published(LLAMA) | {"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)},
            r"no place for 1 tensors: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (published(LLAMA) | {"model.norm.weight": np.ones(16, np.int32)}, "norm.weight is I32"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, tensors, words):
    with pytest.raises(ValueError, match=words):
        load(write_folder(tmp_path, LLAMA, tensors))


def test_broken_folders_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="Hugging Face model folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"lacks model\.safetensors.*pytorch_model\.bin"):
        load(tmp_path)
    path = write_folder(tmp_path, LLAMA) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cut short"):
        load(tmp_path)
