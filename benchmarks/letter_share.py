"""The reward of workload B: how much of a completion one letter is."""

from collections.abc import Mapping
from typing import Any

from rlhf_jax.rewards.host import Decode, Records, host_reward
from rlhf_jax.types import Reward


def share_of(letter: str, text: str) -> float:
    """Occurrences of ``letter`` / characters; 0 of an empty text."""
    return text.count(letter) / max(1, len(text))


def letter_share(*, decode: Decode, records: Records, letter: str = "e") -> Reward:
    """outcome = `share_of` the completion; the prompt is not looked at."""

    def score(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        return share_of(letter, completion)

    return host_reward("letter_share", score, decode=decode, records=records)
