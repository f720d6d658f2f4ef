"""Files of the study `benchmarks.reward_models`: what is learnt, what is held out, a tokenizer.

Nothing of a problem is in two parts, where a problem is what a person would call so: a debate, the
first turn of a dialogue, a question. A hash of it decides, so the order of a file does not matter.
"""

import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhf_jax.data.process_sets import SOLUTIONS
from rlhf_jax.data.reward_sets import SAMPLES
from rlhf_jax.data.sources import Record, read_jsonl
from rlhf_jax.label_samples import write_lines
from rlhf_jax.training.writer import write_json

PROCESSBENCH = ("gsm8k", "math", "olympiadbench", "omnimath")
VOCABULARY = 4096
_BEGINNING = 40  # letters by which a problem is known
_SMALL = 24  # records of either end of a part in a shrunken study


class Split(NamedTuple):
    """A set in parts: `train` as `train_reward` reads it, the others as they were published."""

    train: Sequence[Record]
    dev: Sequence[Record]
    test: Sequence[Record]
    problems: tuple[int, int, int]  # how many there are of each part


def ukp(data: pathlib.Path) -> Split:
    """The folder's own split: two debates, with both of their sides, are in the test file only."""
    return given(data / "ukp_convarg1", lambda record: record["topic"])


def hh(data: pathlib.Path) -> Split:
    """The folder's own split, by the first human turn."""
    return given(data / "hh_rlhf", lambda record: record["chosen"].split("\n\nAssistant:")[0])


def gsm8k(data: pathlib.Path) -> Split:
    """Solutions of four language models to each question; a quarter of the questions for tests."""
    records = read_jsonl(data / "gsm8k/model_solutions.jsonl.gz")
    found = split(records, lambda record: record["question"], dev=0.0, test=0.25)
    return found._replace(train=[judged(record) for record in found.train])


def prmbench(data: pathlib.Path) -> Split:
    """Right solutions, and such with mistakes put in; without the problems of ProcessBench."""
    modified, original = (
        read_jsonl(data / f"prmbench/{name}.jsonl.gz") for name in ("modified", "original")
    )
    # Right solutions have the problem as a language model wrote it down again.
    names = {plain(r["original_question"]): plain(r["question"]) for r in modified}

    def problem(record: Record) -> str:
        return names.get(plain(record["question"]), plain(record["question"]))

    seen = {plain(r["problem"]) for path in processbench(data) for r in read_jsonl(path)}
    kept = [record for record in (*modified, *original) if problem(record) not in seen]
    found = split(kept, problem, dev=0.1, test=0.2)
    return found._replace(train=labelled("prmbench", found.train))


def bigbench_mistake(data: pathlib.Path) -> Split:
    """Traces in which people marked the first mistake."""
    records = read_jsonl(data / "bigbench_mistake/traces.jsonl.gz")
    found = split(records, lambda record: record["input"], dev=0.1, test=0.2)
    return found._replace(train=labelled("bigbench_mistake", found.train))


SETS: Mapping[str, Callable[[pathlib.Path], Split]] = {
    "ukp": ukp,
    "gsm8k": gsm8k,
    "hh": hh,
    "prmbench": prmbench,
    "bigbench_mistake": bigbench_mistake,
}


def processbench(data: pathlib.Path) -> list[pathlib.Path]:
    """The files of ProcessBench, which nothing is trained on."""
    return [data / f"processbench/{name}.jsonl.gz" for name in PROCESSBENCH]


def plain(problem: str) -> str:
    """The first letters of a problem, by which it is found again in another spelling.

    Formulas and line breaks of one problem are written in several ways; commands of TeX (and a line
    break written as two signs) do not count.
    """
    words = re.sub(r"\\[a-zA-Z]+", " ", problem.lower())
    return "".join(c for c in words if c.isalpha())[:_BEGINNING]


def place_of(text: str) -> float:
    """A number from 0 to below 1 that a text always has."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def given(folder: pathlib.Path, problem: Callable[[Record], str]) -> Split:
    """The train and test files of a folder."""
    train, test = (read_jsonl(folder / f"{name}.jsonl.gz") for name in ("train", "test"))
    return Split(train, (), test, (len(set(map(problem, train))), 0, len(set(map(problem, test)))))


def split(
    records: Iterable[Record], problem: Callable[[Record], str], *, dev: float, test: float
) -> Split:
    """Shares of the problems for tests, for choosing a threshold (`dev`), and for training."""
    parts: list[list[Record]] = [[], [], []]
    problems: list[set[str]] = [set(), set(), set()]
    for record in records:
        place = place_of(problem(record))
        part = 2 if place < test else 1 if place < test + dev else 0
        parts[part].append(record)
        problems[part].add(problem(record))
    return Split(*parts, problems=tuple(map(len, problems)))


def judged(record: Record) -> Record:
    """A right or wrong solution as `train_reward` reads it, and who wrote it."""
    (one,) = SAMPLES["samples"](record)
    said = {"prompt": one.prompt, "completion": one.completions[0], "label": one.correct[0]}
    return said | {"model": record["model"]}


def labelled(form: str, records: Iterable[Record]) -> list[Record]:
    """Solutions of a published form as `train_reward` reads them."""
    return [
        {"prompt": one.prompt, "steps": list(one.steps), "labels": list(one.labels)}
        for record in records
        for one in SOLUTIONS[form](record)
    ]


def best_writer(records: Iterable[Record]) -> str:
    """The language model whose solutions are right most often."""
    right: dict[str, list[bool]] = {}
    for record in records:
        right.setdefault(record["model"], []).append(record["label"])
    return max(sorted(right), key=lambda name: sum(right[name]) / len(right[name]))


def draw(records: Sequence[Record], size: int, seed: int) -> list[Record]:
    """Some of the records, as the seed decides; the larger of two draws holds the smaller one.

    Those that have no `id` are drawn by prompt, so that all solutions of a problem stay together.
    """
    by = [record.get("id", record["prompt"]) for record in records]
    order = sorted(range(len(records)), key=lambda i: (place_of(f"{seed} {by[i]}"), i))
    return [records[i] for i in order[:size]]


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts_of(one)


def write_tokenizer(path: pathlib.Path, texts: Iterable[str]) -> None:
    """Byte-level BPE of what is trained on, made by `tokenizers`; every digit is a token."""
    made = tokenizers.Tokenizer(models.BPE())
    digits, pieces = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(path))


def prepare(data: pathlib.Path, folder: pathlib.Path, small: bool) -> None:
    """Writes NAME_train.jsonl, NAME_dev.jsonl and NAME_test.jsonl, tokenizer.json and facts.json.

    Raises:
        ValueError: the data folder, or a file in it, is absent.
    """
    if not data.is_dir():
        raise ValueError(f"--data={data} is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    facts, texts = {}, []
    for name, read in SETS.items():
        found = read(data)
        parts = found._asdict()
        facts[name] = {"problems": parts.pop("problems")}
        for part, records in parts.items():
            kept = [*records[:_SMALL], *records[-_SMALL:]] if small else records
            facts[name][part] = len(kept)
            if kept:
                write_lines(folder / f"{name}_{part}.jsonl", iter(kept))
        texts += [text for record in found.train for text in texts_of(record)]
    write_tokenizer(folder / "tokenizer.json", texts)
    write_json(folder / "facts.json", facts)
