"""The embedded task: multi-step arithmetic, its worked steps, and an exact judge of each step.

A question such as ``37 +8 *2`` is read from left to right, without precedence, modulo 100. Its
solution writes one operation per line and the answer in the form of GSM8K::

    37+8=45
    45*2=90
    #### 90

Demonstrations may *slip*: with a given probability a line that has a carry or borrow forgets all
of them (``37+8=35``) and the solution goes on from the wrong value. The error is systematic, so a
small reward model can see it, and steps without carry are always right.

**Labels.** A line is right if it is the next line of the one true solution and every line before
it was right. So a line behind a wrong one is wrong even where its own sum is correct: from there
the true answer is out of reach but for a repair or a coincidence. This is the hard label of
Math-Shepherd (Wang et al., 2023, https://arxiv.org/abs/2312.08935, section 3.3: can this prefix
still be completed to the right answer?) for a completer that makes no mistakes, coincidences of
the modulus aside (85*2 and 35*2 are equal modulo 100).
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator

import numpy as np

from rlhf_jax.text.steps import split_steps

# Each operator with its smallest and largest operand.
OPERANDS = {"+": (2, 9), "-": (2, 9), "*": (2, 3)}
ALPHABET = "\n #*+-0123456789="
SPLITS = ("train", "test")
TEST_SHARE = 8  # one problem in so many belongs to the test split

_LINE, _ANSWER = re.compile(r"[0-9]+[-+*][0-9]+=[0-9]+"), re.compile(r"#### [0-9]+")
_OPERATION = re.compile(r"([-+*])([0-9]+)")


@dataclasses.dataclass(frozen=True)
class Options:
    """Difficulty and size of a generated data set.

    Args:
        min_ops, max_ops: operations per problem.
        modulus: 10, 100, 1000, ...: all values are taken modulo this. With 10 no slip is visible.
        operators: a choice of ``+-*``. Operands are 2..9, factors 2..3.
        slip: probability that a demonstration forgets the carry or borrow of a line that has one.
        train, test: problems per split. No problem is in both splits, or twice in one.
        seed: another seed, other problems.
    """

    min_ops: int = 2
    max_ops: int = 4
    modulus: int = 100
    operators: str = "+-*"
    slip: float = 0.0
    train: int = 20_000
    test: int = 1_000
    seed: int = 0

    def __post_init__(self):
        wrong = {
            "min_ops": self.min_ops < 1 or self.min_ops > self.max_ops,
            "modulus": not re.fullmatch("10+", str(self.modulus)),
            "operators": not self.operators or set(self.operators) - set(OPERANDS),
            "slip": not 0.0 <= self.slip <= 1.0,
            "train": self.train < 1,
            "test": self.test < 1,
        }
        wanted = {
            "min_ops": f"at least 1 and at most max_ops={self.max_ops}",
            "modulus": "10, 100, 1000, ...",
            "operators": f"a choice of {''.join(OPERANDS)}",
            "slip": "a probability",
            "train": "1 or more",
            "test": "1 or more",
        }
        for name, bad in wrong.items():
            if bad:
                got = getattr(self, name)
                raise ValueError(f"arithmetic option {name}={got!r} must be {wanted[name]}")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A start value and operations on it, in order: ``("+", 8), ("*", 2)``."""

    start: int
    operations: tuple[tuple[str, int], ...]
    modulus: int = 100

    @property
    def question(self) -> str:
        return " ".join([str(self.start), *(f"{op}{k}" for op, k in self.operations)])

    @property
    def expression(self) -> str:
        """A Python expression of integers whose value is the answer."""
        text = str(self.start)
        for op, k in self.operations:
            text = f"({text}{op}{k})%{self.modulus}"
        return text


def true_value(value: int, op: str, k: int, modulus: int) -> int:
    """The right result of one operation."""
    return {"+": value + k, "-": value - k, "*": value * k}[op] % modulus


def slipped_value(value: int, op: str, k: int, modulus: int) -> int:
    """The result with every carry or borrow forgotten: digit by digit, modulo 10.

    Equal to `true_value` exactly where the operation has no carry or borrow.

    Example:
        >>> slipped_value(37, "+", 8, 100), slipped_value(32, "-", 8, 100)
        (35, 34)
    """
    result, scale = 0, 1
    while scale < modulus:
        digit = value // scale % 10
        other = k if op == "*" else k // scale % 10
        result += scale * true_value(digit, op, other, 10)
        scale *= 10
    return result


def write_solution(
    problem: Problem, slip: float = 0.0, rng: np.random.Generator | None = None
) -> str:
    """The worked solution; with `slip` > 0 (needs `rng`) a demonstration that may be wrong."""
    value, lines = problem.start, []
    for op, k in problem.operations:
        result = true_value(value, op, k, problem.modulus)
        careless = slipped_value(value, op, k, problem.modulus)
        if slip and result != careless and rng.random() < slip:
            result = careless
        lines.append(f"{value}{op}{k}={result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])


def parse_question(question: str, modulus: int = 100) -> Problem:
    """The problem of a question.

    Raises:
        ValueError: if the text is not a question of this task.
    """
    start, *operations = question.split()
    found = [_OPERATION.fullmatch(operation) for operation in operations]
    if not start.isdecimal() or not operations or None in found:
        raise ValueError(f"not an arithmetic question: {question!r}")
    return Problem(int(start), tuple((m[1], int(m[2])) for m in found), modulus)


def label_solution(
    question: str, completion: str, modulus: int = 100
) -> tuple[bool, tuple[bool, ...]]:
    """Judges a completion exactly.

    Returns:
        Whether the number behind the last ``####`` is the answer, and for each step of
        `split_steps` whether it and all before it are right (the module's rule); lines behind the
        answer are wrong.

    Example:
        >>> label_solution("37 +8 *2", "37+8=35\\n35*2=70\\n#### 70")
        (False, (False, False, False))
    """
    truth = split_steps(write_solution(parse_question(question, modulus)))
    labels, right = [], True
    for line, wanted in itertools.zip_longest(split_steps(completion), truth):
        if line is None:
            break
        right = right and line == wanted
        labels.append(right)
    answer = completion.rpartition("####")[2].partition("\n")[0].strip()
    stated = "####" in completion and re.fullmatch("-?[0-9]+", answer, re.ASCII)
    return bool(stated) and int(answer) == int(truth[-1].removeprefix("####")), tuple(labels)


def well_formed(completion: str) -> bool:
    """Whether every line but the last is an operation with a result and the last an answer.

    Example:
        >>> well_formed("37+8=35\\n#### 35"), well_formed("37+8=45")
        (True, False)
    """
    *lines, last = completion.split("\n")
    return bool(_ANSWER.fullmatch(last)) and all(map(_LINE.fullmatch, lines))


def problem_at(index: int, options: Options) -> Problem:
    """Draw number `index` of the endless stream of problems: a pure function of its arguments."""
    rng = np.random.default_rng((options.seed, index, 0))
    operations = []
    for _ in range(rng.integers(options.min_ops, options.max_ops + 1)):
        op = options.operators[rng.integers(len(options.operators))]
        low, high = OPERANDS[op]
        operations.append((op, int(rng.integers(low, high + 1))))
    return Problem(int(rng.integers(options.modulus)), tuple(operations), options.modulus)


def split_of(problem: Problem) -> str:
    """The split that a problem belongs to, by a hash of its question, whatever the options."""
    digest = hashlib.sha256(problem.question.encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def problems(split: str, options: Options) -> Iterator[tuple[int, Problem]]:
    """The distinct problems of a split with their index in the stream, as many as the options say.

    Raises:
        ValueError: for an unknown split, or options that do not allow so many problems.
    """
    if split not in SPLITS:
        raise ValueError(f"arithmetic has no split {split!r}; it has {', '.join(SPLITS)}")
    wanted = options.train if split == "train" else options.test
    seen: set[Problem] = set()
    misses = 0
    for index in itertools.count():
        if len(seen) == wanted:
            return
        problem = problem_at(index, options)
        misses += 1
        if split_of(problem) == split and problem not in seen:
            seen.add(problem)
            misses = 0
            yield index, problem
        if misses > 1000 * TEST_SHARE:
            raise ValueError(
                f"found only {len(seen)} of {wanted} different {split} problems with {options}; "
                f"ask for fewer, or raise max_ops"
            )


def record(index: int, problem: Problem, options: Options) -> dict:
    """The fields of one record.

    `answer` is the true solution; `completion` the demonstration, which may slip, with its
    `steps`, their `labels` and whether its answer `is_correct`. Slips do not depend on which
    problems there are: the same problem slips in the same way.
    """
    rng = np.random.default_rng((options.seed, index, 1))
    completion = write_solution(problem, options.slip, rng)
    correct, labels = label_solution(problem.question, completion, problem.modulus)
    answer = write_solution(problem)
    return {
        "question": problem.question,
        "answer": answer,
        "final": int(answer.rpartition(" ")[2]),
        "expression": problem.expression,
        "completion": completion,
        "is_correct": correct,
        "steps": split_steps(completion),
        "labels": list(labels),
    }
