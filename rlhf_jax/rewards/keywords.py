"""How many different words of a list a completion uses: a rule that text alone decides.

"Include keywords" is one of the instructions that can be checked of Zhou et al., 2023, IFEval
(https://arxiv.org/abs/2311.07911, table 1). As a score it serves as a known truth ("gold") for
experiments: label pairs with it, train a reward model on them, and see what a policy that is
paid by the model alone is really worth (Gao et al., 2022, https://arxiv.org/abs/2210.10760).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.rewards.base import Decode, Records, host_reward
from rlhf_jax.types import Reward

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")  # letters and digits, "don't" is one word


def keyword_share(text: str, words: Sequence[str], limit: int) -> float:
    """min(limit, number of different ``words`` in ``text``) / limit, from 0 to 1.

    Whole words count, in capitals or not, each once however often it comes: repeating one earns
    nothing.

    >>> keyword_share("Tim was happy. So happy! They laughed.", ["happy", "laughed", "love"], 4)
    0.5
    """
    found = {_plain(word) for word in _WORD.findall(text)}
    return min(limit, len(found & {_plain(word) for word in words})) / limit


def _plain(word: str) -> str:
    """In small letters, with the typewriter's apostrophe."""
    return word.lower().replace("’", "'")


def keywords(
    *,
    decode: Decode,
    records: Records,
    words: tuple[str, ...],
    limit: int = 1,
    timeout: float | int = 10.0,
    on_error: float | int | None = None,
    workers: int = 2,
) -> Reward:
    """outcome = `keyword_share` of the completion; the prompt is not looked at.

    Args:
        decode: token ids -> text.
        words: whole words, without regard to capitals.
        limit: so many different ones score 1.
        timeout, on_error, workers: see `host_reward`.

    Raises:
        ValueError: no words, one that is no single word, or a limit outside 1..len(words).

    Example:
        >>> reward = keywords(decode=decode, records=records, words=("happy", "love"), limit=2)
    """
    wrong = [word for word in words if not _WORD.fullmatch(word)]
    if wrong or not words:
        raise ValueError(f"keywords: words={words}, wanted single words; not one: {wrong}")
    different = len({_plain(word) for word in words})
    if not 1 <= limit <= different:
        raise ValueError(f"keywords: limit={limit}, wanted 1 to {different}, the different words")

    def score(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        return keyword_share(completion, words, limit)

    return host_reward(
        "keywords",
        score,
        decode=decode,
        records=records,
        timeout=timeout,
        on_error=on_error,
        workers=workers,
    )
