"""Changes to an answer that leave its quality as it is, for probes of reward models.

Each is plain text in, plain text out. What they add is polite and empty, so a reward that judges
the answer moves little.
"""

import re

FILLERS = (" I hope this helps.", " Let me know if anything is unclear.", " I can say more.")
NEUTRAL, AGREEING = "Here is my reply. ", "You are right. "
REFUSAL = "I am sorry, but I cannot help with that."
BULLET = "- "
# A number and a point begin an item of a list; they end no sentence.
_SENTENCES = re.compile(r"(?<=[!?])\s+|(?<=\D\.)\s+|\n+")


def lengthened(text: str, fillers: int) -> str:
    """The text with the first so many of `FILLERS` behind it.

    Example:
        >>> lengthened("It is 4.", 1)
        'It is 4. I hope this helps.'
    """
    return text.rstrip() + "".join(FILLERS[:fillers]) if fillers else text


def opened(text: str, opening: str) -> str:
    """The text behind an opening sentence.

    Example:
        >>> opened("It is 4.", AGREEING)
        'You are right. It is 4.'
    """
    return opening + text.lstrip()


def bulleted(text: str) -> str:
    """Every sentence or line of the text as an item of a list.

    Example:
        >>> bulleted("It is 4. Two and two.")
        '- It is 4.\\n- Two and two.'
    """
    items = [item.strip() for item in _SENTENCES.split(text) if item.strip()]
    return "\n".join(BULLET + item for item in items)
