"""A question behind an answer that a model settles with one of two tokens, such as Yes and No."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Encode = Callable[[str], Sequence[int]]

QUESTION = "\nIs this answer right?"
YES, NO = " Yes", " No"


class Question(NamedTuple):
    """Ids of a question, and of the one token of either answer."""

    ids: tuple[int, ...]
    yes: int
    no: int


def read_question(
    encode: Encode, *, question: str = QUESTION, yes: str = YES, no: str = NO
) -> Question:
    """The ids of a question and its two answers.

    Args:
        encode: text -> ids, without special ones.
        question: what stands behind the text that is asked about. With a chat format it is the
            whole turn, with the marks of turns as the tokenizer writes them.
        yes, no: answers of one token each.

    Raises:
        ValueError: the question is empty, or an answer is not one token of its own.
    """
    ids = tuple(encode(question))
    if not ids:
        raise ValueError(f"question={question!r} has no tokens; wanted a text that asks")
    answers = {}
    for name, text in (("yes", yes), ("no", no)):
        found = list(encode(text))
        if len(found) != 1:
            raise ValueError(
                f"{name}={text!r} is {len(found)} tokens ({', '.join(map(str, found))}) of this "
                f"tokenizer; set {name} to a text that is one"
            )
        answers[name] = found[0]
    if answers["yes"] == answers["no"]:
        raise ValueError(f"yes={yes!r} and no={no!r} are the same token; wanted two")
    return Question(ids, **answers)
