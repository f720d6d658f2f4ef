"""Templates over records, and dialogues cut into prompt and replies."""

import gzip
import json

import pytest

from rlhf_jax.text.template import ASSISTANT, render, split_dialogue


def test_render():
    assert render("Q: {question}\n{{}}", {"question": "{a} 1+1?", "x": 2}) == "Q: {a} 1+1?\n{}"
    assert render("", {"question": "1"}) == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt}", "names field 'prompt', the record has question, answer"),
        ("{", "write {{ for a brace"),
        ("{}", "write {{ for a brace"),
    ],
)
def test_bad_templates_say_what_is_wrong(template, message):
    with pytest.raises(ValueError, match="template") as error:
        render(template, {"question": "q", "answer": "a"})
    assert message in str(error.value)


def test_only_text_and_numbers_are_written():
    record = {"n": 3, "x": 0.5, "messages": [{"content": "hi"}], "none": None}
    assert render("{n} {x} {messages[0][content]}", record) == "3 0.5 hi"
    assert render("{messages!r}", record) == "[{'content': 'hi'}]"
    for name, kind in (("messages", "list"), ("messages[0]", "dict"), ("none", "NoneType")):
        with pytest.raises(ValueError, match="where text is wanted") as error:
            render(f"{{{name}}}", record)
        assert f"field '{name}' holds {kind}" in str(error.value)


def test_dialogue_by_hand():
    start = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: and?\n\nAssistant:"
    parts = (start, " good one", " good two\n\nHuman: ok")
    assert split_dialogue(start + parts[1], start + parts[2]) == parts
    # A turn that only one of them has is part of its reply.
    longer = " no\n\nHuman: why\n\nAssistant: so"
    assert split_dialogue(start + longer, start + " yes") == (start, longer, " yes")
    with pytest.raises(ValueError, match="no common"):
        split_dialogue("Human: a", "Human: a")


@pytest.mark.data
def test_every_dialogue_of_hh_rlhf(data_dir):
    with gzip.open(data_dir / "hh_rlhf/train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 2305
    single = 0
    for row in rows:
        prompt, chosen, rejected = split_dialogue(row["chosen"], row["rejected"])
        assert prompt + chosen == row["chosen"] and prompt + rejected == row["rejected"]
        assert prompt.startswith("\n\nHuman:") and prompt.endswith(ASSISTANT)
        single += ASSISTANT not in chosen + rejected
    assert single > 0.95 * len(rows)  # a few share all turns but have one more
