"""Answers, a question behind them and the verdict: for language models that are rewards."""

from collections.abc import Sequence

from rlhf_jax.data.draws import Flaw
from rlhf_jax.data.examples import ExampleSource, Judged, Row, pad_rows, share, warn_of_one_class
from rlhf_jax.data.forms import Form
from rlhf_jax.data.sources import Record, RecordSource
from rlhf_jax.text.question import NO, QUESTION, YES, read_question
from rlhf_jax.text.tokenizer import Tokenizer


def verdicts(
    sources: Sequence[RecordSource],
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    chat: str | None = None,
    max_length: int,
    seed: int,
    shuffle: bool = True,
    overlong: str = "error",
    completion: tuple[str, ...] = ("completion", "solution"),
    label: tuple[str, ...] = ("label", "is_correct"),
    question: str = QUESTION,
    yes: str = YES,
    no: str = NO,
) -> ExampleSource:
    """Batches of `Texts`: prompt, completion, question and the verdict, which alone trains.

    They are the tokens that the reward `generative_model` reads: the completion without its
    end-of-text, then the question's own tokens. Zhang et al. 2024, GenRM
    (https://arxiv.org/abs/2408.15240).

    Labels of ½ say nothing; they, and rows that `overlong` would have cut and so lose the verdict,
    are counted, reported and left out. Labels of one class only are reported.

    Args:
        template, max_length, seed, shuffle, overlong: see `texts`.
        chat: in place of a template, the field that holds the prompt's messages; completions are
            text or messages.
        completion, label: the first of these fields that a record has; a label above ½ is a yes.
        question, yes, no: see `read_question`; those of the reward.

    Raises:
        ValueError: see `read_question`.
    """
    form = Form(tokenizer, template=template, chat=chat)
    asked = read_question(tokenizer.encode, question=question, yes=yes, no=no)

    def encode(record: Record) -> Judged:
        said, right = form.row(record, completion, truncated=True), share(record, label)
        tokens = [*said.tokens, *asked.ids, asked.yes if right > 0.5 else asked.no]
        return Judged(Row(tokens, len(tokens) - 1), right)

    def flaw(verdict: Judged) -> Flaw | None:
        if verdict.label == 0.5:
            return Flaw("labels of 0.5", useless=True)
        if len(verdict.row.tokens) > max_length:
            return Flaw("no room for the verdict within max_length", useless=True)
        return None

    return ExampleSource(
        sources,
        encode,
        lambda verdict: len(verdict.row.tokens),
        lambda drawn: pad_rows([one.encoded.row for one in drawn], max_length, tokenizer.pad_id),
        max_length=max_length,
        seed=seed,
        shuffle=shuffle,
        overlong=overlong,
        select=warn_of_one_class,
        flaw=flaw,
    )
