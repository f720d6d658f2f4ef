"""What a run exports is what transformers loads, with the tokenizer it was trained with."""

import dataclasses
import json
import logging
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import tokenizers
import torch
import transformers
from ml_collections import ConfigDict

from benchmarks.published_models import make, save
from rlhf_jax import base_files, roles, run_folder
from rlhf_jax.export import export, find_subject
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.model_folder import load_params, open_model
from rlhf_jax.models.config import named_size
from rlhf_jax.models.load import load_hf
from rlhf_jax.models.lora import merge_lora, partition
from rlhf_jax.models.members import member_of
from rlhf_jax.models.tensors import open_tensors
from rlhf_jax.models.transformer import decoder
from rlhf_jax.training import checkpoint
from rlhf_jax.training.state import create_train_state
from rlhf_jax.types import RunState
from tests.models.peft_test import ours, theirs

RULES = ShardingRules()
TINY = named_size("tiny", layers=1, vocab_size=101, width=16, head_dim=4, mlp_width=24)
HEADS = dataclasses.replace(TINY, lm_head=False, score_heads=("outcome", "process"))


def mesh():
    return make_mesh({"data": -1})


def run(folder, models, *, start="", tokenizer="chars:ab", base=None):
    """A run's folder with a checkpoint of random parameters, which are returned by role.

    Args:
        base: the frozen part of all roles that have adapters.
    """
    model = dict(init_from=str(start)) if start else dict(name="tiny")
    config = ConfigDict(dict(seed=0, model=model, data=dict(tokenizer=str(tokenizer))))
    run_folder.prepare(str(folder), config, models)
    base_files.keep(pathlib.Path(folder), config)
    full, trained, frozen = {}, {}, {}
    with jax.set_mesh(mesh()):
        for number, (role, described) in enumerate(models.items()):
            key = jax.random.key(number)
            params = roles.fill(decoder(described, RULES), base or {}, key, mesh(), RULES)
            if base is None:
                params = jax.tree.map(lambda x: x + 0.01, params)
            else:  # adapters that say something
                params = jax.tree_util.tree_map_with_path(
                    lambda path, x: x + 0.02 * (path[-1].key == "lora_b"), params
                )
            trained[role], frozen[role] = partition(params, described)
            full[role] = params
        optimizers = dict.fromkeys(trained, optax.sgd(1.0))
        train = create_train_state(trained, optimizers, dict, mesh())
    state = RunState(
        train=train, reference=next(iter(frozen.values())), rewards={}, controllers={}, carry={},
        data_position={},
    )  # fmt: skip
    manager = checkpoint.open_manager(folder, keep=1, every=1)
    checkpoint.save(manager, 3, state, "{}", force=True)
    checkpoint.close(manager)
    return full


def write_tokenizer(folder, **special):
    """A tokenizer of words in a folder of its own, as transformers writes it."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"} | special
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    made.save_pretrained(folder)
    return folder


def config_json(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_policy_of_ours(tmp_path, caplog):
    params = run(tmp_path / "run", {"policy": TINY})["policy"]
    out = tmp_path / "deep" / "out"
    with caplog.at_level(logging.WARNING):
        export(workdir=str(tmp_path / "run"), output=str(out))
    assert "tokenizer 'chars' has no files to copy" in caplog.text
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    np.testing.assert_allclose(theirs(model), ours(TINY, params), atol=1e-4)
    settings = model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (1, 0)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


def test_a_policy_that_began_as_a_published_model(tmp_path):
    start = save(make("qwen3"), tmp_path / "start")
    write_tokenizer(start)
    generation = '{"eos_token_id": [1, 2], "top_k": 20}'
    (start / "generation_config.json").write_text(generation)
    (start / "pytorch_model.bin").write_bytes(b"none of ours")
    config = roles.describe(ConfigDict(dict(init_from=str(start))), 5)
    first = run(tmp_path / "sft", {"policy": config}, start=start, tokenizer=start)["policy"]
    params = run(tmp_path / "rl", {"policy": config}, start=tmp_path / "sft", tokenizer=start)
    assert jax.tree.structure(params["policy"]) == jax.tree.structure(first)
    for path in sorted(start.iterdir()):
        path.unlink()  # the runs have what they need
    out = tmp_path / "out"
    export(workdir=str(tmp_path / "rl"), output=str(out), dtype="bfloat16")
    kept, got = config_json(tmp_path / "rl" / "base"), config_json(out)
    assert got.pop("dtype") == "bfloat16"
    kept.pop("dtype")
    assert got == kept
    assert (out / "generation_config.json").read_text() == generation
    text = transformers.AutoTokenizer.from_pretrained(out)
    assert text("a b").input_ids == [3, 4]
    assert text.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<eos>"
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params["policy"])
    np.testing.assert_allclose(theirs(model), ours(config, rounded), atol=1e-4)


@pytest.mark.parametrize("what", ["outcome", "process"])
def test_a_reward_model_with_both_heads(tmp_path, what):
    params = run(tmp_path / "run", {"reward": HEADS})["reward"]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--what is missing: the run can become outcome, process"):
        export(workdir=str(tmp_path / "run"), output=str(out))
    export(workdir=str(tmp_path / "run"), output=str(out), what=what)
    kind = {
        "outcome": transformers.AutoModelForSequenceClassification,
        "process": transformers.AutoModelForTokenClassification,
    }[what]
    model = kind.from_pretrained(out).eval()
    # Padded on the right, to see that the score is that of the last token of each text.
    tokens = np.array([[3, 2, 3, 1], [3, 1, 0, 0]])
    mask = tokens != 0
    with torch.no_grad():
        got = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).logits.numpy()
    mine = decoder(HEADS)
    positions = jnp.broadcast_to(jnp.arange(4), (2, 4))
    hidden = jax.jit(mine.apply)(params, jnp.asarray(tokens), positions, mask, None).hidden
    wanted = np.asarray(mine.scores(params, hidden)[what])
    if what == "outcome":
        np.testing.assert_allclose(got[:, 0], wanted[[0, 1], [3, 1]], atol=1e-4)
    else:
        np.testing.assert_allclose(got[..., 0][mask], wanted[mask], atol=1e-4)
    config, back = load_hf(out, mesh(), RULES)
    assert config.score_heads == (what,)
    for one, other in zip(
        jax.tree.leaves(back["heads"][what]), jax.tree.leaves(params["heads"][what]), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_head_of_another_name_becomes_a_classifier_of_tokens(tmp_path):
    config = dataclasses.replace(HEADS, score_heads=("both",))
    params = run(tmp_path / "run", {"reward": config})["reward"]
    export(workdir=str(tmp_path / "run"), output=str(tmp_path / "out"))
    tensors = open_tensors(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(tensors["score.weight"][0], params["heads"]["both"]["kernel"])
    np.testing.assert_array_equal(tensors["score.bias"], [params["heads"]["both"]["bias"]])


def test_a_value_model_with_adapters_on_the_policys_base(tmp_path):
    start = save(make("llama"), tmp_path / "start")
    section = ConfigDict(dict(init_from=str(start), lora_rank=2))
    policy = roles.describe(section, 5)
    value = dataclasses.replace(policy, lm_head=False, score_heads=("value",))
    base = load_hf(start, mesh(), RULES)[1]
    models = {"policy": policy, "value": value}
    params = run(tmp_path / "run", models, start=start, base=base)["value"]
    out = tmp_path / "out"
    export(workdir=str(tmp_path / "run"), output=str(out), what="value")
    config, back = load_hf(out, mesh(), RULES)
    assert config == dataclasses.replace(value, lora_rank=0)
    merged = merge_lora(params, value)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)
    model = transformers.AutoModel.from_pretrained(out)
    assert type(model).__name__ == "LlamaModel"
    # It can be the start of another run's critic.
    described = roles.describe(
        ConfigDict(dict(init_from=str(out))), 5, lm_head=False, score_heads=("value",)
    )
    assert described == config


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_alone_and_as_a_start(tmp_path):
    model = make("gpt2")
    start = save(model, tmp_path / "start")
    write_tokenizer(start)
    policy = roles.describe(ConfigDict(dict(init_from=str(start), lora_rank=2)), 5)
    base = load_hf(start, mesh(), RULES)[1]
    params = run(tmp_path / "run", {"policy": policy}, start=start, tokenizer=start, base=base)
    out = tmp_path / "out"
    export(workdir=str(tmp_path / "run"), output=str(out), adapters=True)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        start
    )
    assert not (out / "config.json").exists()
    adapted = peft.PeftModel.from_pretrained(model, out).eval()
    np.testing.assert_allclose(theirs(adapted), ours(policy, params["policy"]), atol=1e-4)

    again = ConfigDict(dict(init_from=str(out)))
    described = roles.describe(again, 5)
    assert described == dataclasses.replace(policy, lora_rank=0)
    roles.check_start("model", str(out))
    with jax.set_mesh(mesh()):
        loaded = roles.load(str(out), mesh(), RULES)
    np.testing.assert_allclose(ours(described, loaded), theirs(adapted), atol=1e-4)
    opened = open_model(str(out))  # as generate and score take it
    assert opened.config == described and opened.text.name == str(out)
    with jax.set_mesh(mesh()):
        jax.tree.map(np.testing.assert_array_equal, load_params(opened, mesh(), RULES), loaded)
    files = base_files.start_files(str(out))
    assert files["config.json"] == start / "config.json"
    assert files["tokenizer.json"] == out / "tokenizer.json"
    run(tmp_path / "next", {"policy": described}, start=out, tokenizer=start)
    export(workdir=str(tmp_path / "next"), output=str(tmp_path / "merged"))


def test_adapters_of_other_weights_are_not_written(tmp_path):
    start, other = (save(make("llama"), tmp_path / name) for name in ("start", "other"))
    policy = roles.describe(ConfigDict(dict(init_from=str(start), lora_rank=2)), 5)
    run(tmp_path / "run", {"policy": policy}, start=start, base=load_hf(start, mesh(), RULES)[1])
    arguments = dict(workdir=str(tmp_path / "run"), adapters=True)
    another = save(make("gpt2"), tmp_path / "gpt2")
    for base, said in ((other, "other weights than"), (another, "another architecture")):
        with pytest.raises(ValueError, match=rf"--adapters: the base {base}.*{said}"):
            export(**arguments, output=str(tmp_path / "out"), base=str(base))
    assert not (tmp_path / "out").exists()
    export(**arguments, output=str(tmp_path / "out"))


def test_adapters_are_added_before_numbers_are_rounded(tmp_path):
    """A bfloat16 run exported as float32 keeps what its float32 adapters say."""
    start = save(make("llama"), tmp_path / "start")
    section = dict(init_from=str(start), lora_rank=2, param_dtype="bfloat16")
    policy = roles.describe(ConfigDict(section), 5)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), load_hf(start, mesh(), RULES)[1])
    params = run(tmp_path / "run", {"policy": policy}, start=start, base=base)["policy"]
    export(workdir=str(tmp_path / "run"), output=str(tmp_path / "out"), dtype="float32")
    # The base is the folder's in the run's type.
    export(workdir=str(tmp_path / "run"), output=str(tmp_path / "adapters"), adapters=True)
    written = load_hf(tmp_path / "out", mesh(), RULES)[1]
    exact = merge_lora(jax.tree.map(lambda x: x.astype(jnp.float32), params), policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), written, exact)


def test_an_ensemble_member_by_member(tmp_path):
    both = dataclasses.replace(HEADS, score_heads=("outcome",), members=2, ensemble="linear")
    params = run(tmp_path / "run", {"reward": both})["reward"]
    one = dataclasses.replace(both, members=1, ensemble="none")
    seen = []
    for number in range(2):
        out = tmp_path / f"member_{number}"
        export(workdir=str(tmp_path / "run"), output=str(out), member=number)
        config, loaded = load_hf(out, mesh(), RULES)
        assert config.score_heads == ("outcome",) and not config.lm_head
        wanted = member_of(params, both, number)
        kernel = wanted["heads"]["outcome"]["kernel"]
        np.testing.assert_array_equal(loaded["heads"]["outcome"]["kernel"], kernel)
        assert jax.tree.structure(wanted) == jax.tree.structure(decoder(one).shapes())
        jax.tree.map(np.testing.assert_array_equal, loaded["layers"], wanted["layers"])
        seen.append(np.asarray(kernel))
    assert not np.array_equal(*seen)
    for member, said in ((2, "--member=2: the run is an ensemble of 2"), (-1, "wanted 0 to 1")):
        with pytest.raises(ValueError, match=said):
            export(workdir=str(tmp_path / "run"), output=str(tmp_path / "no"), member=member)


def test_the_padding_token_of_an_outcome_model_ends_no_text(tmp_path):
    start = save(make("llama"), tmp_path / "start")
    write_tokenizer(start, pad_token="<eos>")
    config = dataclasses.replace(HEADS, score_heads=("outcome",))
    run(tmp_path / "run", {"reward": config}, tokenizer=start)
    arguments = dict(workdir=str(tmp_path / "run"), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"padding token 1 also ends texts.*--pad_token_id"):
        export(**arguments)
    with pytest.raises(ValueError, match="--pad_token_id=77 is not in the tokenizer"):
        export(**arguments, pad_token_id=77)
    export(**arguments, pad_token_id=0)
    assert config_json(tmp_path / "out")["pad_token_id"] == 0
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (text.pad_token, text.eos_token) == ("<pad>", "<eos>")


def test_bad_input_is_refused_before_any_device(tmp_path):
    run(tmp_path / "run", {"policy": TINY})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")

    def refused(words, **changes):
        values = dict(workdir=str(tmp_path / "run"), output=str(tmp_path / "out")) | changes
        with pytest.raises(ValueError, match=words):
            export(**values)

    refused("--output=.*is not empty .x.; name a new folder", output=str(tmp_path / "full"))
    refused("--dtype='int8'; known: float32", dtype="int8")
    refused("--workdir=.*has no model.json", workdir=str(tmp_path / "full"))
    refused("--what='outcome': the run can become policy", what="outcome")
    refused("trained no adapters", adapters=True)
    refused("--pad_token_id=101; the model has 101 tokens", pad_token_id=101)
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path):
    """The flag of the run's folder is that of all programs."""
    command = [sys.executable, "-m", "rlhf_jax.export"]
    bad = [*command, f"--workdir={tmp_path}", f"--output={tmp_path / 'out'}"]
    ended = subprocess.run(bad, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "is not a run's folder" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_runs_can_become():
    value = dataclasses.replace(HEADS, score_heads=("value",))
    assert find_subject({"policy": TINY, "value": value}, "") == ("policy", "", "policy")
    assert find_subject({"policy": TINY, "value": value}, "value") == ("value", "value", "value")
    shared = dataclasses.replace(TINY, score_heads=("value",))
    assert find_subject({"policy": shared}, "value") == ("policy", "value", "value")
    one = dataclasses.replace(HEADS, score_heads=("outcome",))
    assert find_subject({"reward": one}, "") == ("reward", "outcome", "outcome")
    with pytest.raises(ValueError, match="can become policy"):
        find_subject({"policy": TINY, "reward/outcome": one}, "outcome")


def test_policies_do_not_start_as_reward_models(tmp_path):
    reward = make("llama", transformers.AutoModelForSequenceClassification, num_labels=1)
    start = save(reward, tmp_path / "start")
    section = ConfigDict(dict(init_from=str(start)))
    with pytest.raises(
        ValueError, match=r"no LM head.*the heads outcome; name the folder of a pol"
    ):
        roles.describe(section, 5)
    wanted = dict(lm_head=False, score_heads=("outcome",))
    assert roles.describe(section, 5, **wanted).score_heads == ("outcome",)
    roles.check_heads("rewards.x", str(start), ("outcome",))
    with pytest.raises(ValueError, match=r"rewards\.x reads head 'process', but .* \['outcome'\]"):
        roles.check_heads("rewards.x", str(start), ("process",))
