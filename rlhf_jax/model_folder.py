"""What a model folder holds, whoever wrote it: config, tokenizer and parameters.

A model folder is one of Hugging Face (config.json with a model_type, safetensors), one of adapters
in PEFT's format, which names its base, or that of a run of ours, whose trained role is meant.
Nothing but the folder is needed to use it.
"""

import collections
import dataclasses
import pathlib
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from rlhf_jax import averages, roles, run_folder
from rlhf_jax.base_files import OwnTokenizer, own_tokenizer
from rlhf_jax.mesh import ShardingRules
from rlhf_jax.models.config import DTYPES, ModelConfig
from rlhf_jax.models.families import family_of
from rlhf_jax.models.load import check_hf, read_hf_config
from rlhf_jax.models.peft import is_adapter_folder, open_peft
from rlhf_jax.models.tensors import open_folder
from rlhf_jax.schema import closest, within
from rlhf_jax.text.hub import local_folder
from rlhf_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.training.checkpoint import check_newest
from rlhf_jax.types import Params


class ModelFolder(NamedTuple):
    """A folder that was looked at; no parameters are read yet.

    others: more folders of such models, whose weights are averaged with those of the first.
    """

    path: str
    config: ModelConfig
    text: Tokenizer
    others: tuple[str, ...] = ()


def open_model(
    folder: str,
    *,
    tokenizer: str = "",
    chat_template: str = "",
    bos: bool | None = None,
    dtype: str = "",
) -> ModelFolder:
    """Looks at a model folder before any device is touched.

    Args:
        tokenizer: in place of the folder's own: for a Hugging Face folder the one in it, for a run
            that of its config.
        chat_template: a Jinja file in place of the tokenizer's, or of the run's.
        bos: whether texts begin with the beginning-of-text token; None is what the tokenizer itself
            does, or what the run did.
        dtype: of the stored parameters and of matrix products; empty is the checkpoint's: what
            config.json names or the tensors are, for a run what model.json says.

    Raises:
        ValueError: naming the flag, for a folder without model or tokenizer, files cut short, an
            unknown type, or a tokenizer that has more tokens than the model.
    """
    if dtype and dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype!r}{closest(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    folder = local_folder(folder, f"--model={folder!r}")
    if not pathlib.Path(folder).is_dir():
        raise ValueError(f"--model={folder!r} is not a folder")
    with within(f"--model={folder!r}"):
        config = _read_config(folder, dtype)
        own = OwnTokenizer(tokenizer, tokenizer) if tokenizer else own_tokenizer(folder)
        if not own.name:
            raise ValueError("no tokenizer here, such as a tokenizer.json; name one by --tokenizer")
    named = own.name
    with within(f"--tokenizer={named!r}"):
        text = _load_tokenizer(
            named, chat_template or own.chat_template, own.bos if bos is None else bos
        )
    if text.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {named!r} has {text.vocab_size} tokens but --model={folder!r} has room "
            f"for {config.vocab_size}; set --tokenizer to the model's own"
        )
    return ModelFolder(folder, config, text)


def load_params(model: ModelFolder, mesh: Mesh, rules: ShardingRules) -> Params:
    """The parameters in the type of ``model.config``, adapters merged, sharded."""
    dtype = model.config.param_dtype
    loaded = averages.load((model.path, *model.others), mesh, rules, dtype=dtype)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), loaded)


def _read_config(folder: str, dtype: str) -> ModelConfig:
    """The config of the model in ``folder``; its files are looked at, its parameters not read."""
    if is_adapter_folder(folder):
        base, config, _ = open_peft(folder)
        check_hf(str(base))
        named = dtype or _published_dtype(base)
        return dataclasses.replace(config, param_dtype=named, compute_dtype=named)
    if roles.is_hf_folder(folder):
        check_hf(folder)
        named = dtype or _published_dtype(pathlib.Path(folder))
        return read_hf_config(folder, dict(param_dtype=named, compute_dtype=named))
    if not (pathlib.Path(folder) / "model.json").is_file():
        raise ValueError(
            "no model here: wanted a Hugging Face folder (config.json with a model_type), one of "
            "adapters (adapter_config.json) or the folder of a run (model.json)"
        )
    config = roles.loaded_config(folder)
    check_newest(folder)
    types = dict(param_dtype=dtype, compute_dtype=dtype) if dtype else {}
    return dataclasses.replace(config, **types)


def _published_dtype(folder: pathlib.Path) -> str:
    """What config.json names, under the key of transformers 5 or 4; else what most numbers are."""
    path = folder / "config.json"
    published = run_folder.read_json(path)
    named = published.get("dtype") or published.get("torch_dtype")
    if named is None:
        sizes = collections.Counter()
        for tensor in open_folder(folder, family_of(published).ignored).values():
            sizes[tensor.dtype.name] += tensor.size
        named = sizes.most_common(1)[0][0]
    if named == "float64":  # devices hold at most 32 bits
        return "float32"
    if named not in DTYPES:
        raise ValueError(
            f"{path}: dtype={named!r}; known: {', '.join(DTYPES)}; set --dtype to one of them"
        )
    return named


def _load_tokenizer(name: str, chat_template: str, bos: bool | None) -> Tokenizer:
    """A tokenizer that begins texts as it would by itself, unless ``bos`` says it."""
    text = load_tokenizer(name, chat_template=chat_template or None, bos=bos)
    if bos is None and text.expects_bos:
        return load_tokenizer(name, chat_template=chat_template or None, bos=True)
    return text
