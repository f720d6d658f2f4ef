"""Changes to answers: what they add, and that they keep every word."""

import re

from rlhf_jax.text.changes import AGREEING, FILLERS, bulleted, lengthened, opened


def test_closing_sentences_are_added_one_by_one():
    assert lengthened("It is 4. ", 0) == "It is 4. "
    assert lengthened("It is 4. ", 2) == "It is 4." + FILLERS[0] + FILLERS[1]


def test_an_opening_stands_before_the_text():
    assert opened("\n It is 4.", AGREEING) == AGREEING + "It is 4."


def test_items_of_a_list_keep_all_words():
    text = "Take two. Add two!\n\n1. Is it 4? Yes\n"
    assert bulleted(text) == "- Take two.\n- Add two!\n- 1. Is it 4?\n- Yes"
    assert re.findall(r"\w+", bulleted(text)) == re.findall(r"\w+", text)
    assert bulleted("one") == "- one"
