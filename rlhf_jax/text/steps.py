"""How a solution is cut into steps, on the host by text and on devices by tokens, alike.

The rule. A step is a line with visible text; blank lines belong to no step. Its end is the token
with the first line break after that text, and the last step's end is the last valid token of the
row, wherever the text stops. So

* runs of line breaks (``"\\n\\n"``, ``"\\n  \\n"``, ``"\\r\\n"``) and leading ones make no steps;
* punctuation that a vocabulary merges with the break (``".\\n"``) ends its own line;
* an end-of-text token alone after a line break is not a step of its own: it *is* the end of the
  last line, whose line break then is not one. A row that was cut off ends in the same way;
* a text without visible characters is one empty step, so that every row has an end;
* there are as many step ends as `split_steps` finds steps, and the s-th belong together.

Line breaks are ``"\\n"`` and blanks are the ASCII ones: vocabularies of bytes cut other spaces and
breaks (no-break space, U+2028) into pieces, so those count as visible text, on both sides.
A token that holds parts of two lines (o200k's ``"\\n/"``; GPT-2 and GPT-NeoX have only such with
no-break spaces, DeepSeek none) ends the first of them; were it the row's last token, or held it
whole lines, it would end several and is marked once. A vocabulary that knows no line break (T5's
SentencePiece normalises them to spaces) makes every text one step, and so does `split_steps` of
what it decodes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Array, TokenTables

BLANK = " \t\n\r\f\v"


def split_steps(text: str) -> list[str]:
    """The lines of `text` with visible characters, without surrounding blanks; at least one.

    Example:
        >>> split_steps("3+4=7\\n\\n7*2=14\\n#### 14\\n")
        ['3+4=7', '7*2=14', '#### 14']
    """
    lines = (line.strip(BLANK) for line in text.split("\n"))
    return [line for line in lines if line] or [""]


def step_table(tokenizer: Tokenizer) -> Bool[np.ndarray, " V"]:
    """Which token ids hold a line break. Special ids (dropped by decoding) hold none."""
    return np.array(["\n" in (text or "") for text in tokenizer.token_texts()], bool)


def token_tables(tokenizer: Tokenizer, vocab_size: int | None = None) -> TokenTables:
    """The tables of `tokenizer`, for models whose vocabulary is padded to `vocab_size` ids.

    Padded ids end nothing and hold no visible text, as decoding drops them.
    """
    size = tokenizer.vocab_size
    wanted = size if vocab_size is None else vocab_size
    if wanted < size:
        raise ValueError(f"vocab_size={wanted} is smaller than the tokenizer's {size} ids")
    ends_text, before, after = (np.zeros(wanted, bool) for _ in range(3))
    ends_text[list(tokenizer.eos_ids)] = True
    for token, text in enumerate(tokenizer.token_texts()):
        head, line_break, tail = (text or "").rpartition("\n")
        after[token] = bool(tail.strip(BLANK))
        before[token] = bool(head.strip(BLANK)) if line_break else after[token]
    return TokenTables(
        ends_text=ends_text,
        ends_step=np.pad(step_table(tokenizer), (0, wanted - size)),
        text_before=before,
        text_after=after,
        pad=np.asarray(tokenizer.pad_id, np.int32),
    )


def mark_step_ends(
    tokens: Int[Array, "*B T"], mask: Bool[Array, "*B T"], tables: TokenTables
) -> Bool[Array, "*B T"]:
    """Marks each step's last token by the module's rule; looks at tokens under `mask` only.

    `mask` covers the solution (not the prompt). Rows without valid tokens have no ends.
    """
    return _mark(jnp, jax.lax.cummax, tokens, mask, tables)


def mark_host_step_ends(
    tokens: Int[np.ndarray, "*B T"], mask: Bool[np.ndarray, "*B T"], tables: TokenTables
) -> Bool[np.ndarray, "*B T"]:
    """`mark_step_ends` in numpy: a process prepares its own rows without touching devices, which
    under a mesh of several processes would all have to run the same program."""
    return _mark(np, np.maximum.accumulate, tokens, mask, tables)


def _mark(xp, cummax, tokens: Array, mask: Array, tables: TokenTables) -> Array:
    """The rule, for numpy and jax.numpy."""
    breaks = xp.asarray(tables.ends_step)[tokens] & mask
    before = xp.asarray(tables.text_before)[tokens] & mask
    after = xp.asarray(tables.text_after)[tokens] & mask
    column = xp.broadcast_to(xp.arange(tokens.shape[-1], dtype=xp.int32), tokens.shape)
    axis = tokens.ndim - 1

    # A line is open behind token t if visible text came at or after the last break.
    last_text = cummax(xp.where(after, column, -1), axis=axis)
    last_break = cummax(xp.where(breaks, column, -1), axis=axis)
    opened = (last_text >= last_break) & (last_text >= 0)
    opened_before = xp.roll(opened, 1, axis=axis) & (column > 0)
    closes = breaks & (before | opened_before)

    # The last line ends with the row, so a break counts only where visible text follows.
    final_text = xp.max(xp.where(before | after, column, -1), axis=axis, keepdims=True, initial=-1)
    closes = closes & (after | (column < final_text))
    final = xp.max(xp.where(mask, column, -1), axis=axis, keepdims=True, initial=-1)
    return closes | (column == final)
