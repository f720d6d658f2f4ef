"""What is read of a model folder before its parameters are: types, tokenizer, what is missing."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.model_folder import load_params, open_model
from rlhf_jax.models.config import named_size
from rlhf_jax.text.tokenizer import encode_start
from tests.model_folders import CONFIG, TENSORS, hf_folder, run_of
from tests.models.load_test import write_folder

RULES = ShardingRules()
TINY = named_size("tiny", layers=1)


def types(folder, **keywords):
    config = open_model(folder, tokenizer="byte", **keywords).config
    return config.param_dtype, config.compute_dtype


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_is_the_one_that_the_checkpoint_names(tmp_path, key):
    folder = hf_folder(tmp_path, **{key: "bfloat16"})
    assert types(folder) == ("bfloat16", "bfloat16")
    assert types(folder, dtype="float32") == ("float32", "float32")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.float32, "float32"), (np.float64, "float32"), (ml_dtypes.bfloat16, "bfloat16")],
)
def test_else_it_is_that_of_the_tensors(tmp_path, dtype, name):
    tensors = {key: tensor.astype(dtype) for key, tensor in TENSORS.items()}
    assert types(str(write_folder(tmp_path, CONFIG, tensors))) == (name, name)


def test_parameters_have_the_type(tmp_path):
    folder = hf_folder(tmp_path / "hf", dtype="bfloat16")
    mesh = make_mesh({"data": -1})
    run, params = run_of(tmp_path / "run", TINY, mesh)
    with jax.set_mesh(mesh):
        for path in (folder, run):
            for dtype in ("bfloat16", "float32"):
                loaded = load_params(open_model(path, tokenizer="byte", dtype=dtype), mesh, RULES)
                assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {dtype}
    np.testing.assert_array_equal(loaded["embed"]["table"], params["embed"]["table"])


def test_a_run_says_its_own_types_and_tokenizer(tmp_path):
    config = dataclasses.replace(TINY, compute_dtype="bfloat16", lora_rank=2)
    folder, _ = run_of(tmp_path, config, make_mesh({"data": -1}), "chars:ab")
    opened = open_model(folder)
    assert opened.text.vocab_size == 4
    assert opened.config == dataclasses.replace(config, lora_rank=0)  # adapters are merged
    assert open_model(folder, tokenizer="byte").text.vocab_size == 258
    half = open_model(folder, dtype="float16").config
    assert (half.param_dtype, half.compute_dtype) == ("float16", "float16")


def words(folder):
    """A tokenizer.json that puts its token 1 before a text, in a folder."""
    folder.mkdir(parents=True)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<s>": 1, "a": 2}, "a"))
    made.add_special_tokens(["</s>", "<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))


def test_a_text_begins_as_the_tokenizer_begins_it_or_as_the_run_did(tmp_path):
    def begins(folder, **keywords):
        text = open_model(str(folder), **keywords).text
        return encode_start(text, "a"), encode_start(text, "<s>a")

    with_it, without = ([1, 2], [1, 2]), ([2], [1, 2])
    hf = pathlib.Path(hf_folder(tmp_path / "hf"))
    words(tmp_path / "words")
    shutil.copyfile(tmp_path / "words" / "tokenizer.json", hf / "tokenizer.json")
    assert begins(hf) == with_it and begins(hf, bos=False) == without
    run, _ = run_of(tmp_path / "run", TINY, make_mesh({"data": -1}), str(tmp_path / "words"))
    assert begins(run) == without and begins(run, bos=True) == with_it
    (tmp_path / "words").rename(tmp_path / "run" / "base")  # the run's own copy, as it keeps it
    assert begins(run) == without


def test_bad_folders_are_named(tmp_path):
    def refused(words, folder, **keywords):
        with pytest.raises(ValueError, match=words):
            open_model(str(folder), **keywords)

    refused("--model='.*absent' is not a folder", tmp_path / "absent")
    refused("--model=.*no model here: wanted a Hugging Face folder", tmp_path)
    good = pathlib.Path(hf_folder(tmp_path / "hf"))
    refused(r"--dtype='fp32'.*known: float32, bfloat16", good, dtype="fp32")
    refused("--model=.*no tokenizer here, .*--tokenizer", good)
    refused("--tokenizer='bite': .*neither 'byte'", good, tokenizer="bite")
    refused("has 302 tokens .* room for 260", good, tokenizer=f"chars:{letters(300)}")
    refused("dtype='int8'; known", hf_folder(tmp_path / "int8", dtype="int8"), tokenizer="byte")
    (good / "model.safetensors").unlink()
    refused("lacks model.safetensors", good, tokenizer="byte")


def test_bad_runs_are_named(tmp_path):
    folder = tmp_path / "run"
    run_of(folder, TINY, make_mesh({"data": -1}), "byte")
    (folder / "config.json").write_text(json.dumps({"seed": 0}))
    with pytest.raises(ValueError, match=r"run': no tokenizer here, .* name one by --tokenizer"):
        open_model(str(folder))
    assert open_model(str(folder), tokenizer="byte").config == TINY
    (folder / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no checkpoint in"):
        open_model(str(folder), tokenizer="byte")


def letters(count):
    return "".join(chr(1000 + i) for i in range(count))
