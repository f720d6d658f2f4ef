"""What models say about texts: against the published model, and row by row without padding."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.completions import evaluate_texts
from rlhf_jax.models.config import named_size
from rlhf_jax.models.transformer import decoder
from rlhf_jax.score import Reading, readings_of, score
from rlhf_jax.types import Texts
from tests.generate_test import log_softmax
from tests.model_folders import CONFIG, TENSORS, hf_folder, read, run_of, write
from tests.models.load_test import reference_logits, write_folder

SOLUTION = "3+4=7\n\n7*2=14\n#### 14"  # three steps
TEXTS = [
    dict(tokens=[3, 1, 4, 1, 5, 9, 2, 6], id=0),
    dict(prompt="two words and", completion=" a little more of them", id=1, label=0.5),
    dict(tokens=[7], id=2),
    dict(prompt="Q", completion=SOLUTION, id=3),
    dict(prompt="Q", completion="", id=4),
    dict(prompt="Q", completion="x\n", id=5),
]
HEADS = named_size("tiny", layers=1, lm_head=False, score_heads=("outcome", "process"))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": -1})


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory, mesh):
    return run_of(tmp_path_factory.mktemp("judge"), HEADS, mesh)


def run(folder, tmp_path, rows=TEXTS, name="out", **keywords):
    texts = write(tmp_path / f"{name}_texts.jsonl", rows)
    output = tmp_path / f"{name}.jsonl"
    count = score(model=folder, input=texts, output=str(output), **keywords)
    assert count == len(rows)
    return read(output)


def whole(row):
    """A line's tokens, and where its completion begins."""
    if "completion" not in row:
        return row["tokens"], 0
    prompt = list(row["prompt"].encode())
    return prompt + list(row["completion"].encode()), len(prompt)


def alone(config, params, tokens):
    """One text without padding."""
    ids = np.array([tokens], np.int32)
    every = np.ones(ids.shape, bool)
    texts = Texts(tokens=ids, mask=every, loss_mask=every, segment=every.astype(np.int32))
    model = decoder(config, ShardingRules())
    return jax.jit(lambda tree: evaluate_texts(model, tree, {}, texts))(jax.device_get(params))


def test_log_probs_are_those_of_the_published_model(hf, tmp_path):
    found = run(hf, tmp_path, tokenizer="byte")
    assert [row["id"] for row in found] == list(range(6))
    assert found[1]["label"] == 0.5
    for given, row in zip(TEXTS, found, strict=True):
        tokens, start = whole(given)
        assert row["tokens"] == tokens[start:]
        logits = reference_logits(CONFIG, TENSORS, tokens)
        wanted = [log_softmax(logits[i - 1])[tokens[i]] for i in range(max(start, 1), len(tokens))]
        np.testing.assert_allclose(row["logprobs"], wanted, atol=1e-4)
        assert "score" not in row and "step_scores" not in row


def test_the_batch_does_not_matter(hf, tmp_path):
    one = run(hf, tmp_path, tokenizer="byte", batch=1, name="one")
    both = run(hf, tmp_path, tokenizer="byte", batch=64, name="all")
    for a, b in zip(one, both, strict=True):
        np.testing.assert_allclose(a.pop("logprobs"), b.pop("logprobs"), atol=1e-5)
        assert a == b


def test_a_reward_model_scores_the_last_token_and_the_steps(judge, tmp_path):
    folder, params = judge
    found = run(folder, tmp_path)
    for given, row in list(zip(TEXTS, found, strict=True))[2:5]:
        tokens, start = whole(given)
        said = alone(HEADS, params, tokens).scores
        np.testing.assert_allclose(row["score"], said["outcome"][0, -1], atol=1e-5)
        columns = [start + end for end in row["step_ends"]]
        np.testing.assert_allclose(row["step_scores"], said["process"][0, columns], atol=1e-5)
        assert "logprobs" not in row
    # "3+4=7\n" ends in its line break, as does the second; the last step ends with the text.
    assert found[3]["step_ends"] == [5, 13, 20]
    assert found[0]["step_ends"] == [7]
    assert found[4]["step_ends"] == [] and found[4]["step_scores"] == []
    assert found[5]["step_ends"] == [1]


def test_a_published_classifier_scores_the_last_token(tmp_path):
    head = np.random.default_rng(1).normal(size=(1, CONFIG["hidden_size"])).astype(np.float32)
    trunk = {name: tensor for name, tensor in TENSORS.items() if name != "lm_head.weight"}
    kind = dict(architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})
    folder = write_folder(tmp_path / "hf", CONFIG | kind, trunk | {"score.weight": head})
    found = run(str(folder), tmp_path, TEXTS[:2], tokenizer="byte")
    for given, row in zip(TEXTS, found, strict=False):
        wanted = reference_logits(CONFIG, trunk | {"lm_head.weight": head}, whole(given)[0])
        np.testing.assert_allclose(row["score"], wanted[-1, 0], atol=1e-4)
        assert "logprobs" not in row and "step_scores" not in row


def test_end_of_text_closes_completions_only(judge, tmp_path):
    folder, params = judge
    found = run(folder, tmp_path, end_of_text=True)
    tokens, _ = whole(TEXTS[3])
    said = alone(HEADS, params, [*tokens, 256]).scores
    assert found[3]["tokens"][-1] == 256 and found[0]["tokens"] == TEXTS[0]["tokens"]
    np.testing.assert_allclose(found[3]["score"], said["outcome"][0, -1], atol=1e-5)
    assert found[3]["step_ends"] == [5, 13, 21]


def test_a_model_with_several_heads_writes_all(tmp_path, mesh):
    config = dataclasses.replace(HEADS, lm_head=True, score_heads=("value", "good"))
    folder, params = run_of(tmp_path / "run", config, mesh)
    row = run(folder, tmp_path, TEXTS[3:4])[0]
    tokens, start = whole(TEXTS[3])
    said = alone(config, params, tokens)
    np.testing.assert_allclose(row["logprobs"], said.logprobs[0, start:], atol=1e-5)
    np.testing.assert_allclose(row["values"], said.scores["value"][0, start - 1 : -1], atol=1e-5)
    np.testing.assert_allclose(row["score"], said.scores["good"][0, -1], atol=1e-5)
    assert len(row["step_scores"]) == 3


@pytest.mark.parametrize(
    ("heads", "readings"),
    [
        ((), []),
        (("value",), []),
        (("process", "outcome"), [("process", "", "step_scores"), ("outcome", "score", "")]),
        (("good",), [("good", "score", "step_scores")]),
        (("outcome", "b"), [("outcome", "score", ""), ("b", "b_score", "b_step_scores")]),
        (("expected", "outcome"), [("outcome", "score", "", "expected")]),
        (("length", "quality"), [("quality", "score", ""), ("length", "length_score", "")]),
    ],
)
def test_names_of_what_heads_say(heads, readings):
    config = dataclasses.replace(HEADS, score_heads=heads)
    assert readings_of(config) == [Reading(*names) for names in readings]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (dict(text="a"), "line 1: no field tokens or messages or prompt; the record has text"),
        (dict(prompt="a"), "line 1: no field completion beside the prompt, nor tokens"),
        (dict(completion="a"), "line 1: no field tokens or messages or prompt"),
        (dict(prompt="", completion="a"), "line 1: the prompt is empty"),
        (dict(prompt="a", completion=3), "line 1: field 'completion' holds int"),
        (dict(tokens=[1], completion="a"), "line 1: the record has tokens and completion"),
        (dict(tokens=[1, 300]), "line 1: field 'tokens' holds 300 at index 1"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(hf, tmp_path, row, words):
    with pytest.raises(ValueError, match=words):
        run(hf, tmp_path, [row], tokenizer="byte")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_is_replaced_only_if_asked(hf, tmp_path):
    run(hf, tmp_path, TEXTS[:1], tokenizer="byte")
    with pytest.raises(ValueError, match="--overwrite"):
        run(hf, tmp_path, TEXTS[:1], tokenizer="byte")
    found = run(hf, tmp_path, TEXTS[:1], tokenizer="byte", overwrite=True)
    assert len(found) == 1 and not list(tmp_path.glob("*.tmp"))


def test_bfloat16_is_close_to_float32(hf, tmp_path):
    exact = run(hf, tmp_path, tokenizer="byte", name="exact")
    rough = run(hf, tmp_path, tokenizer="byte", dtype="bfloat16", name="rough")
    a, b = (np.concatenate([row["logprobs"] for row in rows]) for rows in (exact, rough))
    assert 0 < np.abs(a - b).max() < 0.5 and np.abs(a - b).mean() < 0.05
    assert jax.device_count() == 4  # rows were split
