"""The pretrained stories260K as a Hugging Face folder: our model of it is llama2.c's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from benchmarks import stories260k as stories
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.load import load_hf
from rlhf_jax.models.transformer import decoder
from rlhf_jax.sampling.methods import make_sampling
from rlhf_jax.sampling.sampler import generate
from rlhf_jax.text.steps import token_tables
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.types import Prompts


@pytest.fixture(scope="module")
def source(data_dir):
    return data_dir / "tiny_models" / "stories260K"


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return stories.convert(source, tmp_path_factory.mktemp("stories"))


def norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def story_logits(model: stories.Stories, tokens: list[int]) -> np.ndarray:
    """llama2.c's forward pass, token by token, with its neighbouring rotary pairs, float64."""
    w = {name: array.astype(np.float64) for name, array in model.weights.items()}
    head_dim = model.dim // model.heads
    share = model.heads // model.kv_heads
    past_k = [[] for _ in range(model.layers)]
    past_v = [[] for _ in range(model.layers)]
    logits = []
    for position, token in enumerate(tokens):
        x = w["embedding"][token]
        for i in range(model.layers):
            h = norm(x, w["attention_norm"][i], 1e-5)
            q, k, v = w["wq"][i] @ h, w["wk"][i] @ h, w["wv"][i] @ h
            for vector in (q, k):
                for j in range(0, len(vector), 2):
                    angle = position * 10000.0 ** (-(j % head_dim) / head_dim)
                    a, b = vector[j], vector[j + 1]
                    vector[j] = a * np.cos(angle) - b * np.sin(angle)
                    vector[j + 1] = a * np.sin(angle) + b * np.cos(angle)
            past_k[i].append(k)
            past_v[i].append(v)
            mixed = np.zeros(model.dim)
            for head in range(model.heads):
                own = slice(head * head_dim, (head + 1) * head_dim)
                group = head // share
                shared = slice(group * head_dim, (group + 1) * head_dim)
                scores = np.array([past[shared] @ q[own] for past in past_k[i]])
                weights = np.exp((scores - scores.max()) / np.sqrt(head_dim))
                weights /= weights.sum()
                mixed[own] = sum(
                    p * past[shared] for p, past in zip(weights, past_v[i], strict=True)
                )
            x = x + w["wo"][i] @ mixed
            h = norm(x, w["ffn_norm"][i], 1e-5)
            gate = w["w1"][i] @ h
            x = x + w["w2"][i] @ (gate / (1 + np.exp(-gate)) * (w["w3"][i] @ h))
        logits.append(w["embedding"] @ norm(x, w["final_norm"], 1e-5))
    return np.stack(logits)


@pytest.mark.data
def test_logits_equal_llama2c(source, folder):
    backend = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    text = "Once upon a time, there was a little girl named Lily. She had a red ball."
    tokens = [stories.BOS, *backend.encode(text, add_special_tokens=False)]
    wanted = story_logits(stories.read_checkpoint(source / "stories260K.bin"), tokens)
    mesh = make_mesh({}, devices=jax.devices()[:1])
    config, params = load_hf(folder, mesh, ShardingRules())
    model = decoder(config)
    ids = jnp.asarray(tokens)[None]
    out = model.apply(params, ids, jnp.arange(len(tokens))[None], ids >= 0, None)
    logits = np.asarray(model.logits(params, out.hidden))[0]
    np.testing.assert_allclose(logits, wanted, atol=2e-4)
    # A real model: the text is likely under it, so a permutation of its weights would show.
    shifted = wanted - np.log(np.exp(wanted).sum(axis=-1, keepdims=True))
    assert np.mean([shifted[t, tokens[t + 1]] for t in range(len(tokens) - 1)]) > -1.0


@pytest.mark.data
def test_tokenizer_merges_like_llama2c(source, folder):
    pieces = stories.read_pieces(source / "tok512.bin", 512)
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    backend = transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def encode(text):  # the pair with the best score first, as llama2.c's encode()
        tokens = []
        for letter in " " + text:
            known = ids.get(letter.encode())
            tokens += [known] if known is not None else [b + 3 for b in letter.encode()]
        while True:
            joined = [
                (pieces[ids[a + b]][1], -i, ids[a + b])
                for i in range(len(tokens) - 1)
                if (a := pieces[tokens[i]][0]) + (b := pieces[tokens[i + 1]][0]) in ids
            ]
            if not joined:
                return tokens
            _, at, merged = max(joined)
            tokens[-at : -at + 2] = [merged]

    for text in (
        "Once upon a time, there was a little girl named Lily.",
        'She said, "I want to fly!" And so they did.\nThe end.',
        "zebra é ☃ xylophone",
    ):
        got = backend.encode(text, add_special_tokens=False)
        assert got == encode(text)
        assert backend.decode(got) == text


# Quoted where the weights come from; llama2.c prints the same.
BEGINNING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.mark.data
@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}])
def test_greedy_decoding_tells_the_known_story(folder, axes):
    mesh = make_mesh(axes, devices=None if axes else jax.devices()[:1])
    config, params = load_hf(folder, mesh, ShardingRules())
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (stories.BOS, (stories.EOS,))
    rows = 2
    prompts = Prompts(
        tokens=np.array([[0, 0, stories.BOS]] * rows, np.int32),
        mask=np.array([[False, False, True]] * rows),
        record=np.zeros(rows, np.int32),
        source=np.zeros(rows, np.int32),
        draw=np.zeros(rows, np.int32),
    )
    with jax.set_mesh(mesh):
        rollouts = jax.jit(
            lambda params, prompts, sampling, tables: generate(
                decoder(config),
                params,
                {},
                prompts,
                jax.random.key(0),
                samples=1,
                sampling=sampling,
                max_tokens=96,
                tables=tables,
                version=0,
                mesh=mesh,
            )
        )(params, prompts, make_sampling(temperature=0.0), token_tables(tokenizer))
    for tokens in np.asarray(rollouts.tokens):
        assert tokenizer.decode(tokens).startswith(BEGINNING)
