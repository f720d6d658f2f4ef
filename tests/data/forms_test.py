"""Records that hold messages, in the forms of published sets: each kind of row and prompts."""

import gzip
import json
import logging

import numpy as np
import pytest

from rlhf_jax.data.forms import Form, check_form
from rlhf_jax.data.preferences import correctness, pairs
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.data.sources import open_source
from rlhf_jax.data.steps import step_labels
from rlhf_jax.data.texts import texts
from rlhf_jax.text.chat import encode_prompt, encode_turns
from rlhf_jax.text.tokenizer import ByteTokenizer, load_tokenizer
from tests.text import chats
from tests.text.chats import TALK

COMMON = dict(max_length=256, seed=0, shuffle=False)
ASKED = TALK[:4]
OTHER = [{"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return load_tokenizer(chats.folder(tmp_path_factory.mktemp("chat") / "t"))


def rows(batch, index=0):
    """Tokens of a row, and those of them that the loss is on."""
    tokens = batch.tokens[index]
    return tokens[batch.mask[index]].tolist(), tokens[batch.loss_mask[index]].tolist()


def wanted(row):
    return row.tokens, [i for i, trains in zip(row.tokens, row.trains, strict=True) if trains]


def test_prompts(text):
    records = [{"messages": ASKED}, {"messages": TALK}, {"messages": "1+1?"}]
    source = PromptSource([records], text, chat="messages", max_prompt=200, seed=0, shuffle=False)
    batch = source.batch(0, slice(None), 3)
    found = [batch.tokens[i][batch.mask[i]].tolist() for i in range(3)]
    question = [{"role": "user", "content": "1+1?"}]
    assert found == [encode_prompt(text, one) for one in (ASKED, ASKED, question)]
    assert source.record(0, 1) == records[1]


def test_texts(text):
    both = encode_turns(text, TALK)
    for chat, record, kept in (
        ("messages", {"messages": TALK}, both),
        ("prompt", {"prompt": ASKED, "completion": TALK[4:]}, encode_turns(text, TALK, first=4)),
        ("prompt", {"prompt": ASKED, "answer": "no\n"}, encode_turns(text, TALK, first=4)),
    ):
        batch = texts([[record]], text, chat=chat, **COMMON).batch(0, slice(None), 1)
        assert rows(batch) == wanted(kept)
    last = texts([[{"m": TALK}]], text, chat="m", turns="last", **COMMON).batch(0, slice(None), 1)
    assert rows(last) == wanted(encode_turns(text, TALK, first=4))
    values = COMMON | dict(max_length=45, overlong="truncate")
    cut = texts([[{"m": TALK}]], text, chat="m", **values).batch(0, slice(None), 1)
    assert rows(cut)[0] == both.tokens[:45]
    assert cut.loss_mask[0].tolist() == both.trains[:45]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "chosen": "no\n", "rejected": "yes"},
        {"prompt": ASKED, "chosen": TALK[4:], "rejected": OTHER},
        {"prompt": ASKED, "chosen": TALK, "rejected": [*ASKED, *OTHER]},
        {"chosen": TALK, "rejected": [*ASKED, *OTHER]},
    ],
)
def test_pairs(text, record):
    batch = pairs([[record]], text, chat="prompt", **COMMON).batch(0, slice(None), 1)
    assert rows(batch.chosen) == wanted(encode_turns(text, TALK, first=4))
    assert rows(batch.rejected) == wanted(encode_turns(text, [*ASKED, *OTHER], first=4))


def test_pairs_in_the_forms_that_sets_have(text):
    """UltraFeedback's prompt is text that its conversations repeat; answers may have more turns."""
    question = [{"role": "user", "content": "q"}]
    answers = [[*question, {"role": "assistant", "content": one}] for one in "ab"]
    record = {"prompt": "q", "chosen": answers[0], "rejected": answers[1]}
    batch = pairs([[record]], text, chat="prompt", **COMMON).batch(0, slice(None), 1)
    assert rows(batch.chosen) == wanted(encode_turns(text, answers[0]))
    # The same answer twice: a pair that says nothing, but a pair. And a cut-off half.
    same = {"chosen": TALK, "rejected": TALK, "rejected_truncated": True}
    batch = pairs([[same]], text, chat="prompt", **COMMON).batch(0, slice(None), 1)
    assert rows(batch.chosen) == wanted(encode_turns(text, TALK, first=4))
    assert rows(batch.rejected)[0] == rows(batch.chosen)[0][:-1]
    other = {"prompt": ASKED, "chosen": answers[0], "rejected": "b"}
    with pytest.raises(ValueError, match="the reply begins with a message of the role 'user'"):
        pairs([[other]], text, chat="prompt", **COMMON)
    with pytest.raises(ValueError, match="no field prompt, and chosen and rejected have no mess"):
        pairs([[{"chosen": "a", "rejected": "b"}]], text, chat="prompt", **COMMON)


def test_correctness_and_steps(text):
    record = {"prompt": ASKED, "completion": "no\n", "label": 1}
    batch = correctness([[record]], text, chat="prompt", **COMMON).batch(0, slice(None), 1)
    assert rows(batch.texts) == wanted(encode_turns(text, TALK, first=4))
    record = {"question": "1+1+1?", "steps": ["1+1=2", "2+1=4"], "labels": [1, 0]}
    batch = step_labels([[record]], text, chat="question", **COMMON).batch(0, slice(None), 1)
    ends = np.flatnonzero(batch.step_ends[0])
    assert batch.labels[0][ends].tolist() == [1.0, 0.0]
    tokens = batch.texts.tokens[0]
    assert text.decode(tokens[ends[:1]]) == "\n" and tokens[ends[1]] == chats.END
    solution = tokens[batch.texts.loss_mask[0]]
    assert text.decode(solution) == "1+1=2\n2+1=4"


def test_a_template_that_writes_lines_of_its_own_has_no_steps(tmp_path):
    template = chats.CHATML.replace(
        "m.content", "('so\\n' if m.role == 'assistant' else '') + m.content"
    )
    tokenizer = load_tokenizer(chats.folder(tmp_path / "t", template))
    record = {"question": "1?", "steps": ["1", "2"], "labels": [1, 0]}
    with pytest.raises(ValueError, match=r"2 lines but tokens mark 3 ends.*template writes lines"):
        step_labels([[record]], tokenizer, chat="question", **COMMON)


def test_what_cannot_be_read_is_named(text):
    for record, message in (
        ({"m": TALK[2:3]}, "'messages', |no field messages; the record has m"),
        ({"messages": TALK[2:3]}, "field 'messages' holds nothing but answers"),
        ({"messages": ["hi"]}, r"source 0, record 0: messages\[0\] is str"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptSource([[record]], text, chat="messages", max_prompt=99, seed=0)
    with pytest.raises(ValueError, match="tokenizer 'byte' has no chat template"):
        texts([[{"m": TALK}]], ByteTokenizer(), chat="m", **COMMON)
    with pytest.raises(ValueError, match="turns='first' is not one of all, last"):
        texts([[{"m": TALK}]], text, chat="m", turns="first", **COMMON)
    with pytest.raises(ValueError, match=r"template is missing; .* or set chat to the field"):
        check_form(None, None)
    with pytest.raises(ValueError, match="template='' and chat='m' are both set"):
        check_form("", "m")
    with pytest.raises(ValueError, match="holds list where text is wanted; for messages set chat"):
        PromptSource([[{"m": TALK}]], text, template="{m}", max_prompt=99, seed=0)


def test_the_beginning_token(tmp_path, caplog):
    """Plain templates say all there is; what the tokenizer would add is logged, or asked for."""
    path = chats.folder(tmp_path / "t", chats.WITH_BOS, bos_token="<s>", adds_bos=True)
    record = {"q": "a", "completion": "b", "m": TALK}

    def read(bos, template="{q}"):
        tokenizer = load_tokenizer(path, bos=bos)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = texts([[record]], tokenizer, template=template, **COMMON)
        prompt = Form(tokenizer, template=template, chat=None).prompt(record)
        tokens, trained = rows(made.batch(0, slice(None), 1))
        assert tokens == prompt + trained and len(trained) == 2
        return prompt[:-1], "set data.bos to true" in caplog.text

    assert read(None) == ([], True)
    assert read(False) == ([], False)
    assert read(True) == ([chats.BOS], False)
    assert read(None, "<s>{q}") == read(True, "<s>{q}") == ([chats.BOS], False)
    # A chat template is taken at its word, and one that writes the token has it once.
    for bos in (None, True):
        caplog.clear()
        made = texts([[record]], load_tokenizer(path, bos=bos), chat="m", **COMMON)
        assert rows(made.batch(0, slice(None), 1))[0].count(chats.BOS) == 1 and not caplog.text


@pytest.mark.data
def test_published_conversations_on_a_published_vocabulary(data_dir, tmp_path):
    """OpenAssistant's dialogues in Chinese on DeepSeek's vocabulary with its chat tokens."""
    with gzip.open(data_dir / "tokenizers/deepseek_r1/tokenizer.json.gz") as packed:
        (tmp_path / "tokenizer.json").write_bytes(packed.read())
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<｜User｜>' + m.content }}{% else %}"
        "{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    config |= {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    source = open_source(f"jsonl:{data_dir}/oasst_zh/sft.jsonl.gz")
    records = []
    for i in range(100):
        turns = [*source[i]["history"], [source[i]["instruction"], source[i]["output"]]]
        said = [word for turn in turns for word in turn]
        roles = ("user", "assistant")
        records.append({"m": [dict(role=roles[j % 2], content=w) for j, w in enumerate(said)]})
    made = texts([records], tokenizer, chat="m", **COMMON | dict(max_length=16384))
    several = 0
    for i, record in enumerate(records):
        tokens, trained = rows(made.batch(i, slice(None), 1))
        assert tokens[0] == tokenizer.bos_id and tokens.count(tokenizer.bos_id) == 1
        answers = [m["content"] for m in record["m"] if m["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(answers)
        assert trained.count(tokenizer.eos_ids[0]) == len(answers)
        several += len(answers) > 1
    assert several > 10
