"""llama2.c's stories260K, a real pretrained Llama of 260K weights -> a Hugging Face folder.

    python -m benchmarks.stories260k SOURCE FOLDER

SOURCE holds stories260K.bin and tok512.bin; FOLDER is what ``model.init_from`` takes.

llama2.c, https://github.com/karpathy/llama2.c, export format version 0: seven int32 (dim,
hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then float32 tensors. Its rotary
embedding turns neighbouring pairs (2j, 2j+1); Hugging Face's turns (j, j + Dh/2), so the rows of
wq and wk are reordered within each head.
"""

import argparse
import json
import pathlib
import struct
from typing import NamedTuple

import numpy as np
import tokenizers
from safetensors.numpy import save_file

BOS, EOS = 1, 2


class Stories(NamedTuple):
    """Sizes and tensors as llama2.c holds them: weights [out, in], stacked over layers."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    length: int
    weights: dict[str, np.ndarray]


def read_checkpoint(path: pathlib.Path) -> Stories:
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", raw[:28])
    assert vocab > 0, "a negative vocabulary size means a separate output matrix"
    values = np.frombuffer(raw, "<f4", offset=28)
    head_dim = dim // heads
    shapes = {
        "embedding": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_heads * head_dim, dim),
        "wv": (layers, kv_heads * head_dim, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "final_norm": (dim,),
        "freq_cos": (length, head_dim // 2),
        "freq_sin": (length, head_dim // 2),
    }
    weights, at = {}, 0
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        weights[name] = values[at : at + count].reshape(shape)
        at += count
    assert at == values.size
    return Stories(dim, hidden, layers, heads, kv_heads, vocab, length, weights)


def read_pieces(path: pathlib.Path, vocab: int) -> list[tuple[bytes, float]]:
    """The tokens' bytes and scores, in order of their ids."""
    raw, at, pieces = path.read_bytes(), 4, []
    for _ in range(vocab):
        score, size = struct.unpack("<fi", raw[at : at + 8])
        pieces.append((raw[at + 8 : at + 8 + size], score))
        at += 8 + size
    assert at == len(raw)
    return pieces


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """[heads·Dh, D] with each head's pairs (2j, 2j+1) moved to (j, j + Dh/2)."""
    out, width = rows.shape
    pairs = rows.reshape(heads, out // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(out, width)


def published_tensors(stories: Stories) -> dict[str, np.ndarray]:
    w = stories.weights
    tensors = {
        "model.embed_tokens.weight": w["embedding"],
        "model.norm.weight": w["final_norm"],
    }
    for i in range(stories.layers):
        layer = {
            "input_layernorm": w["attention_norm"][i],
            "self_attn.q_proj": half_split(w["wq"][i], stories.heads),
            "self_attn.k_proj": half_split(w["wk"][i], stories.kv_heads),
            "self_attn.v_proj": w["wv"][i],
            "self_attn.o_proj": w["wo"][i],
            "post_attention_layernorm": w["ffn_norm"][i],
            "mlp.gate_proj": w["w1"][i],
            "mlp.down_proj": w["w2"][i],
            "mlp.up_proj": w["w3"][i],
        }
        tensors |= {f"model.layers.{i}.{name}.weight": array for name, array in layer.items()}
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def published_tokenizer(pieces: list[tuple[bytes, float]]) -> tokenizers.Tokenizer:
    """The SentencePiece model as a BPE with byte fallback; a better score is an earlier merge."""
    special = {0: "<unk>", BOS: "<s>", EOS: "</s>"}
    texts = [special.get(i, p.decode().replace(" ", "▁")) for i, (p, _) in enumerate(pieces)]
    ids = {text: i for i, text in enumerate(texts)}
    assert len(ids) == len(texts)
    learnt = [i for i, text in enumerate(texts) if len(text) > 1 and not text.startswith("<")]
    learnt.sort(key=lambda i: -pieces[i][1])
    merges = []
    for i in learnt:
        halves = ((texts[i][:cut], texts[i][cut:]) for cut in range(1, len(texts[i])))
        merges += [pair for pair in halves if pair[0] in ids and pair[1] in ids]
    model = tokenizers.models.BPE(
        vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    normal, decode = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    tokenizer.decoder = decode.Sequence(
        [
            decode.Replace("▁", " "),
            decode.ByteFallback(),
            decode.Fuse(),
            decode.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([special[i] for i in sorted(special)])
    return tokenizer


def convert(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Writes stories260K.bin and tok512.bin from `source` as a Hugging Face folder."""
    stories = read_checkpoint(source / "stories260K.bin")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": stories.dim,
        "intermediate_size": stories.hidden,
        "max_position_embeddings": stories.length,
        "num_attention_heads": stories.heads,
        "num_hidden_layers": stories.layers,
        "num_key_value_heads": stories.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": stories.vocab,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(published_tensors(stories), folder / "model.safetensors")
    pieces = read_pieces(source / "tok512.bin", stories.vocab)
    published_tokenizer(pieces).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=pathlib.Path, help="holds stories260K.bin and tok512.bin")
    parser.add_argument("folder", type=pathlib.Path, help="is made; for model.init_from")
    args = parser.parse_args()
    print(convert(args.source, args.folder))


if __name__ == "__main__":
    main()
