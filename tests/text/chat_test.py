"""Conversations as tokens: whose tokens train, where rows end, what templates are refused."""

import gzip
import json

import pytest
from transformers import AutoTokenizer

from rlhf_jax.text.chat import encode_prompt, encode_turns
from rlhf_jax.text.chat_template import ChatTemplate, read_messages, render_chat
from rlhf_jax.text.tokenizer import ByteTokenizer, load_tokenizer
from tests.text import chats
from tests.text.chats import END, START, TALK


def named(tokenizer, ids):
    """Ids as text with the special tokens' names."""
    texts = tokenizer.token_texts()
    runs, out = [], []
    for one in ids:
        if one >= len(chats.NAMES) + 251 and texts[one] is None:
            out += [tokenizer.decode(runs), chats.NAMES[one - 256]]
            runs = []
        else:
            runs.append(one)
    return "".join([*out, tokenizer.decode(runs)])


def trained(tokenizer, row):
    """The pieces that train, as text with names."""
    pieces, last = [], False
    for token, trains in zip(row.tokens, row.trains, strict=True):
        if trains and not last:
            pieces.append([])
        if trains:
            pieces[-1].append(token)
        last = trains
    return [named(tokenizer, piece) for piece in pieces]


@pytest.mark.parametrize("template", [chats.CHATML, chats.WITH_BOS, chats.BLOCKS])
def test_rows_are_what_apply_chat_template_gives(template, tmp_path):
    path = chats.folder(tmp_path / "t", template, bos_token="<s>", adds_bos=True)
    tokenizer, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert tokenizer.eos_ids == (chats.EOS, END)
    whole = theirs.apply_chat_template(TALK)["input_ids"]
    row = encode_turns(tokenizer, TALK)
    # But the line break behind the last end-of-turn: a sample would have stopped there.
    assert row.tokens + whole[-1:] == whole
    last = "no" if template == chats.WITH_BOS else "no\n"
    assert trained(tokenizer, row) == ["2<|im_end|>", f"{last}<|im_end|>"]
    assert trained(tokenizer, encode_turns(tokenizer, TALK, turns="last")) == [last + "<|im_end|>"]
    assert trained(tokenizer, encode_turns(tokenizer, TALK, first=3)) == [last + "<|im_end|>"]
    # A question at the end is left out, and a prompt is how a row begins.
    assert encode_turns(tokenizer, TALK[:4]).tokens[-1] == END
    prompt = encode_prompt(tokenizer, TALK[:4])
    asked = theirs.apply_chat_template(TALK[:4], add_generation_prompt=True)
    assert prompt == asked["input_ids"] == row.tokens[: len(prompt)]
    assert row.trains[len(prompt)] and not row.trains[len(prompt) - 1]
    assert prompt.count(chats.BOS) == (template == chats.WITH_BOS)  # never two


def test_blocks_agree_with_the_mask_of_transformers(tmp_path):
    path = chats.folder(tmp_path / "t", chats.BLOCKS)
    row = encode_turns(load_tokenizer(path), TALK)
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(
        TALK, return_assistant_tokens_mask=True
    )
    assert [int(x) for x in row.trains] == theirs["assistant_masks"][: len(row.trains)]
    assert not any(theirs["assistant_masks"][len(row.trains) :])


def test_a_block_without_its_end_of_turn_is_closed(tmp_path):
    template = chats.BLOCKS.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert template != chats.BLOCKS
    tokenizer = load_tokenizer(chats.folder(tmp_path / "t", template))
    assert trained(tokenizer, encode_turns(tokenizer, TALK)) == ["2<|im_end|>", "no\n<|im_end|>"]


def test_a_cut_off_turn_has_no_end(tmp_path):
    tokenizer = load_tokenizer(chats.folder(tmp_path / "t"))
    row = encode_turns(tokenizer, TALK, truncated=True)
    assert trained(tokenizer, row) == ["2<|im_end|>", "no\n"]


def test_templates_without_an_end_of_turn_get_end_of_text(tmp_path):
    """By hand, on bytes: any tokenizer takes a template from a file."""
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}"
        "{{ 'a:' if add_generation_prompt else '' }}"
    )
    text = load_tokenizer("byte", chat_template=str(file))
    assert text.eos_ids == (256,) and ByteTokenizer.chat is None
    row = encode_turns(text, TALK[1:3])
    assert row.tokens == [*b"u:1+1?;a:2;", 256]
    assert row.trains == [False] * 9 + [True] * 3
    assert encode_turns(text, TALK[1:3], truncated=True).tokens == [*b"u:1+1?;a:2;"]
    assert encode_prompt(text, TALK[1:2]) == [*b"u:1+1?;a:"]


def test_names_of_special_tokens_in_a_message_are_tokens(tmp_path):
    """As `apply_chat_template` reads them: a message can end its own turn."""
    path = chats.folder(tmp_path / "t")
    said = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c</s>d"}]
    row = encode_turns(load_tokenizer(path), said)
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(said)["input_ids"]
    assert row.tokens == theirs[:-1]
    assert row.tokens.count(END) == 3 and row.tokens.count(chats.EOS) == 1
    assert sum(row.trains) == 4 and all(row.trains[-4:])


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (chats.FORGETS, "all", "writes assistant turn 2 differently once others follow.*turns"),
        (chats.THINKS, "last", r"turn 4 behind its generation prompt '.*<think>'.*generation %}"),
        ("{{ messages | length }}" + chats.CHATML, "all", "what stands before turn 2 differently"),
        (chats.BLOCKS.replace("m.role == 'assistant'", "loop.last"), "all", "1 .* 2 assistant"),
        ("{{ raise_exception('roles must alternate') }}", "all", "refuses.*must alternate"),
        ("{% for m in messages %}", "all", "the chat template of .*, line 1: "),
    ],
)
def test_templates_that_hide_what_trains_are_refused(template, turns, message, tmp_path):
    tokenizer = load_tokenizer(chats.folder(tmp_path / "t", template))
    talk = TALK if template == chats.THINKS else chats.THOUGHT
    with pytest.raises(ValueError, match=message):
        encode_turns(tokenizer, talk, turns=turns)


def test_the_way_out_of_forgetful_templates(tmp_path):
    tokenizer = load_tokenizer(chats.folder(tmp_path / "t", chats.FORGETS))
    row = encode_turns(tokenizer, chats.THOUGHT, turns="last")
    assert trained(tokenizer, row) == ["<think>so</think>no\n<|im_end|>"]
    assert named(tokenizer, row.tokens).count("<think>") == 1


def test_who_has_nothing_to_train_is_told(tmp_path):
    tokenizer = load_tokenizer(chats.folder(tmp_path / "t"))
    with pytest.raises(ValueError, match='no message of the role "assistant"'):
        encode_turns(tokenizer, TALK[:2])
    with pytest.raises(ValueError, match="begins with an assistant turn"):
        encode_turns(tokenizer, TALK[2:])
    assert trained(tokenizer, encode_turns(tokenizer, TALK[2:], turns="last"))
    bare = load_tokenizer(chats.folder(tmp_path / "u", None))
    assert bare.eos_ids == (chats.EOS,)
    with pytest.raises(ValueError, match=r"'.*/u' has no chat template.*set data.chat_template"):
        encode_turns(bare, TALK)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "field 'm' holds int; wanted a list of messages"),
        ([], "field 'm' holds no message"),
        (["hi"], r"m\[0\] is str; wanted a message"),
        ([{"content": "hi"}], r"m\[0\].role holds nothing where text"),
        ([TALK[0], {"role": "user", "content": None}], r"m\[1\].content holds nothing"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"m\[0\].content holds list"),
    ],
)
def test_bad_messages_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        read_messages(value, "m")


def test_messages_in_other_forms():
    assert read_messages("hi", "m") == [{"role": "user", "content": "hi"}]
    columns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    rows = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_messages(columns, "m") == rows
    called = {"role": "assistant", "content": None, "tool_calls": []}
    assert read_messages([called], "m") == [{"role": "assistant", "tool_calls": []}]
    chat = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"}, "x")
    assert render_chat(chat, rows) == "<s>a"


@pytest.mark.data
def test_an_answer_that_would_merge_with_its_prompt_is_encoded_apart(data_dir, tmp_path):
    """GPT-2 has a token of two line breaks; the sampler has the first one in its prompt."""
    with gzip.open(data_dir / "tokenizers/gpt2/tokenizer.json.gz") as packed:
        (tmp_path / "tokenizer.json").write_bytes(packed.read())
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": chats.CHATML}
    config["extra_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos_ids == (50256, tokenizer.encode("<|im_end|>")[0])
    talk = [*TALK[:4], {"role": "assistant", "content": "\nyes"}, *TALK[3:]]
    row = encode_turns(tokenizer, talk)
    for end in (2, 4, 6):
        prompt = encode_prompt(tokenizer, talk[:end])
        assert row.tokens[: len(prompt)] == prompt and row.trains[len(prompt)]
    pieces = [i for i, trains in zip(row.tokens, row.trains, strict=True) if trains]
    assert tokenizer.decode(pieces) == "2\nyesno\n"
    assert START not in pieces
