"""The reward of workload B: how much of a completion one letter is."""

from rlhf_jax.rewards.host import Decode, Records, host_reward
from rlhf_jax.types import Reward


def letter_share(*, decode: Decode, records: Records, letter: str = "e") -> Reward:
    """outcome = occurrences of ``letter`` / characters of the completion; 0 of an empty one."""

    def score(prompt: str, completion: str, record) -> float:
        return completion.count(letter) / max(1, len(completion))

    return host_reward("letter_share", score, decode=decode, records=records)
