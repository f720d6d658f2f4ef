"""Mathematical answers: how they are found, when two are equal, and what hostile text does."""

import gc
import os
import pathlib
import signal

import numpy as np
import pytest

from rlhf_jax.rewards.math_answer import (
    LONGEST,
    equal_answers,
    final_answer,
    math_answer,
    number,
    plain,
    reference_answer,
)
from rlhf_jax.rewards.math_pool import Pool
from tests.rewards.examples import TOKENIZER, spell


@pytest.fixture(scope="module")
def pool():
    return Pool(cpu_seconds=1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} no, \boxed{ 2 }", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\{b}}", r"a\\{b}"),  # two backslashes are a line break, the brace is one
        (r"$\boxed 9$.", "9"),
        (r"\fbox{9}", "9"),
        (r"\boxed{1} then \boxed{2", None),  # not closed, and the one before does not count
        (r"\boxed{}", None),
        (r"\boxedx{3}", None),
        ("#### 1,234\nmore", "1,234"),
        ("#### 1\nno: #### 2", "2"),
        (r"\boxed{1} #### 2", "2"),
        (r"#### 2 \boxed{1}", "1"),
        ("#### ", None),
        ("the answer is 7", None),
        ("", None),
    ],
)
def test_the_last_marked_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "fallbacks", "answer"),
    [
        ("The answer is 7. Or is it?", ("phrase",), "7"),
        ("The answer is: $3.5$.", ("phrase",), "$3.5$"),
        ("the answer is **12**", ("phrase",), "12"),
        ("12 and 13.5", ("phrase",), None),
        ("12 and 13.5 apples", ("number",), "13.5"),
        ("12 and 1,300", ("phrase", "number"), "1,300"),
        ("The answer is 7, not 8", ("phrase", "number"), "7, not 8"),
        (r"The answer is 7. \boxed{8}", ("phrase",), "8"),
    ],
)
def test_fallbacks_where_nothing_is_marked(text, fallbacks, answer):
    assert final_answer(text, fallbacks=fallbacks) == answer


def test_another_marker():
    assert final_answer("A: 3\n#### 4", marker="A:") == "3"
    assert reference_answer("so it is 3\nA: 3", marker="A:") == "3"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.50", "2469/2"),
        ("-3/4", "-3/4"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"\frac34", "3/4"),
        (r"10{,}000", "10000"),
        (r"\$5", "5"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (".5.", "1/2"),
        ("0.1", "1/10"),
        ("1 1/2", "3/2"),
        ("-1 1/2", "-3/2"),
        (r"1\ 234", "1234"),
        (r"1\,234", "1234"),
        ("- 5", "-5"),
    ],
)
def test_plain_numbers_are_exact(text, value):
    assert str(number(text)) == value


@pytest.mark.parametrize(
    "text", ["", "x", "1/0", "1,23", "1e9", "1.2.3", "٧", "1 2x", "--1", "7 8", "12 34", "1 1/0"]
)
def test_what_is_no_plain_number(text):
    assert number(text) is None


def test_looks_do_not_matter():
    assert plain(r"\left( \dfrac{1}{2},\, 3 \right)") == plain(r"(\frac{1}{2},3)")
    assert plain(r"x \leq 3") == r"x\leq3"  # \leq is no \le(ft)


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{3}", "0.333333", False),  # numbers are compared exactly
        ("1234", "1,234.0", True),
        ("237.5", r"237.5\%", True),
        (r"50\%", "0.5", True),
        ("5", "-5", False),
        ("11/2", "1 1/2", False),  # which is 3/2
        ("1 1/2", "3/2", True),
        ("1 1/2", "1.5", True),
        ("78", "7 8", False),
        ("7 8", "7  8", True),
        ("12", "1 2", False),
        ("10000", "10 000", True),
        ("2 x", "2x", True),
        ("x+1", "1+x", True),
        ("x+1", "y+1", False),
        ("(x-1)(x+1)", "x^2-1", True),
        ("(1,2)", r"\left( 1, 2 \right)", True),
        ("(1,2)", "(2,1)", False),
        (r"\{1,2\}", r"\{2, 1\}", True),
        ("[0,1)", "[0,1]", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\text{Monday}", "Monday", True),
        (r"\text{Monday}", "Tuesday", False),
        ("7", r"7\text{ hours}", True),
        ("5", "x = 5", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", False),
    ],
)
def test_equality(reference, answer, equal, pool):
    assert equal_answers(reference, answer, pool) is equal


HOSTILE = {
    "no code": r"\boxed{__import__('os').system('touch pwned')}",
    "no files": r"\boxed{\input{/etc/passwd}}",
    "control": "\\boxed{7\x00}",
    "surrogate": "\\boxed{7\ud800}",
    "right to left": "\\boxed{7\u202e}",
    "a million digits": "#### " + "9" * 1_000_000,
    "a thousand digits": r"\boxed{" + "9" * (LONGEST - 1) + "}",
    "exponent": r"\boxed{7e999999999}",
    "unclosed": "\\boxed{" * 100_000,
    "closed": "\\boxed{" + "{" * 100_000 + "}" * 100_001,
    "zero": r"\boxed{\frac{7}{0}}",
    "deep": r"\boxed{" + "(" * 200 + "7x" + ")" * 200 + "}",
    "backslashes": r"\boxed{" + "\\" * 900 + "}",
    "commas": r"\boxed{" + "," * 900 + "}",
    "answer is": "the answer is " * 50_000,
}
COSTLY = {
    "tower": r"\boxed{9^{9^{9^{9}}}}",
    "factorial": r"\boxed{((9!)!)!}",
    "power": r"\boxed{(x+1)^{100000}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong_and_nothing_else(name, pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = final_answer(HOSTILE[name], fallbacks=("phrase", "number"))
    assert found is None or not equal_answers("7", found, pool)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COSTLY)
def test_what_costs_too_much_is_wrong_and_the_next_is_graded(name, pool):
    assert not equal_answers("x+7", final_answer(COSTLY[name]), pool)
    assert equal_answers("x+7", "7+x", pool)


@pytest.mark.parametrize(
    ("value", "answer"),
    [(7, "7"), (43.0, "43.0"), (1e21, "1" + "0" * 21), (" 7 ", "7"), (r"so \boxed{7}", "7")],
)
def test_references(value, answer):
    assert reference_answer(value) == answer


@pytest.mark.parametrize(
    "value",
    ["", "  ", "####", r"\boxed{}", r"\boxed{7", None, True, ["7"], "7\x00", "7" * (LONGEST + 1)],
)
def test_a_reference_that_cannot_be_read_is_an_error(value):
    with pytest.raises(ValueError, match="answer"):
        reference_answer(value)


def scored(completions, answer, **values):
    reward = math_answer(
        decode=TOKENIZER.decode, records=lambda source, record: {"answer": answer}, **values
    )
    rollouts = spell(["q"], completions, group=len(completions))
    return np.asarray(reward.score(reward.init(), rollouts)[0].outcome).tolist()


def test_the_reward_on_threads():
    """Library and limits work off the main thread; workers are shared by all rows."""
    completions = [r"\boxed{2\sqrt2}", r"\boxed{\sqrt 8}", r"\boxed{3}", "none", r"\boxed{9^{9^9}}"]
    assert scored(completions, r"\sqrt{8}", workers=2, cpu_seconds=1) == [1, 1, 0, 0, 0]


def test_a_record_that_cannot_be_read_is_an_error_and_no_zero():
    with pytest.raises(RuntimeError, match=r"record 0.*no answer"):
        scored(["#### 1"], "####")
    with pytest.raises(RuntimeError, match="could not be read within 1 CPU seconds"):
        scored(["#### x"], "(" * 450 + "7x" + ")" * 450, cpu_seconds=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(fallbacks=("guess",)), "fallbacks=.*known"),
        (dict(marker=""), "marker is empty"),
        (dict(cpu_seconds=0), "cpu_seconds=0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        math_answer(decode=TOKENIZER.decode, records=lambda source, record: {}, **values)


def workers() -> set[int]:
    """The processes that this one started and that run a worker's program."""
    found = set()
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_text()
                status = (folder / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            if "math_worker.py" in command and f"PPid:\t{os.getpid()}\n" in status:
                found.add(int(folder.name))
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes through /proc")
def test_a_pool_starts_what_it_needs_replaces_what_dies_and_leaves_nothing():
    before = workers()
    pool = Pool(cpu_seconds=2)
    assert workers() == before
    assert pool.equal("x+1", "1+x") and not pool.equal("x", "y")
    (first,) = workers() - before
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert pool.equal("x+1", "1+x")
    assert len(workers() - before) == 1 and first not in workers()
    del pool
    gc.collect()
    assert workers() == before
