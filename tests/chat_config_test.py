"""Chats and special tokens from a config: read by build, refused before anything is opened."""

import json

import pytest

from configs.ppo_tiny import get_config
from rlhf_jax import build, sections
from rlhf_jax.text.chat import encode_prompt, encode_turns
from tests.text import chats
from tests.text.chats import TALK


def chatting(tmp_path, **data):
    """The tiny policy config, with prompts from a file of conversations."""
    config = get_config()
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n")
    with config.unlocked():
        del config.data.template
        del config.data.options
    config.data.name = f"jsonl:{file}"
    config.data.tokenizer = chats.folder(tmp_path / "t", bos_token="<s>", adds_bos=True)
    config.data.max_prompt = 128
    with config.unlocked():
        config.data.update(data)
    return config


def test_prompts_and_sources_from_a_config(tmp_path):
    config = chatting(tmp_path, chat="messages")
    sections.check("train_policy", config)
    text = build.tokenizer(config)
    batch = build.prompts(config, text).batch(0, slice(None), 1)
    assert batch.tokens[0][batch.mask[0]].tolist() == encode_prompt(text, TALK[:4])
    section = config.data.copy_and_resolve_references()
    with section.unlocked():
        section.update(kind="texts", rows=1, turns="last", max_length=128)
    made = build.examples("sources.talks", section, text, 0).batch(0, slice(None), 1)
    row = encode_turns(text, TALK, turns="last")
    assert made.tokens[0][made.mask[0]].tolist() == row.tokens
    assert made.loss_mask[0].sum() == sum(row.trains)


def test_special_tokens_and_templates_from_a_config(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(chats.WITH_BOS)
    config = chatting(tmp_path, chat="messages", chat_template=str(file), bos=True)
    sections.check("train_policy", config)
    text = build.tokenizer(config)
    assert text.chat.origin == str(file) and text.starts == (chats.BOS,)
    batch = build.prompts(config, text).batch(0, slice(None), 1)
    assert batch.tokens[0].tolist().count(chats.BOS) == 1


def test_a_form_is_asked_for_before_anything_is_opened(tmp_path):
    for data, message in (
        ({}, "data: template is missing; .* or set chat to the field that holds messages"),
        ({"chat": "m", "template": ""}, "data: template='' and chat='m' are both set"),
        ({"chat": 3}, "data.chat=3 is int; wanted str"),
        ({"chat": "m", "bos": "yes"}, "data.bos='yes' is str; wanted bool"),
    ):
        with pytest.raises(ValueError, match=message):
            sections.check("train_policy", chatting(tmp_path, **data))
    section = chatting(tmp_path, kind="pairs", rows=1, max_length=9).data
    with pytest.raises(ValueError, match=r"sources.a: template is missing"):
        build.check_source("sources.a", section)
    with section.unlocked():
        section.update(chat="messages", turns="last")
    with pytest.raises(ValueError, match=r"sources.a.turns: no such key"):
        build.check_source("sources.a", section)  # one answer a half


def test_a_file_that_is_not_there_is_named(tmp_path):
    config = chatting(tmp_path, chat="messages", chat_template="no.jinja")
    with pytest.raises(ValueError, match=r"data.tokenizer: chat_template='no.jinja' is no file"):
        build.tokenizer(config)
    with pytest.raises(ValueError, match="data: the tokenizer 'byte' has no chat template"):
        config = chatting(tmp_path, chat="messages", tokenizer="byte")
        build.prompts(config, build.tokenizer(config))
