"""Rewards on the host: rows and arrays, threads and time limits, failures that are never silent."""

import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.mesh import ShardingRules, make_mesh, shard_batch
from rlhf_jax.rewards.base import combine, host_reward
from rlhf_jax.rewards.host import run_all
from tests.processes import environment
from tests.rewards.examples import TOKENIZER, random_rollouts, spell

ROLLOUTS = spell(["p", "q"], ["one", "two", "three", "fourth"], group=2, records=[7, 9])


def judged(fn, rollouts=ROLLOUTS, records=lambda source, record: {}, **kwargs):
    reward = host_reward("judge", fn, decode=TOKENIZER.decode, records=records, **kwargs)
    return reward.score(reward.init(), rollouts)[0]


def test_prompt_completion_and_record_reach_the_function_in_row_order():
    seen = {}

    def fn(prompt, completion, record):
        time.sleep(0.02 * (6 - len(completion)))  # the first rows end last
        seen[completion] = (prompt, record["number"])
        return len(completion) + 0.25

    scores = judged(fn, records=lambda source, record: {"number": record}, workers=4)
    assert seen == {"one": ("p", 7), "two": ("p", 7), "three": ("q", 9), "fourth": ("q", 9)}
    np.testing.assert_array_equal(scores.outcome, np.float32([3.25, 3.25, 5.25, 6.25]))
    np.testing.assert_array_equal(scores.process, np.zeros(ROLLOUTS.mask.shape))
    assert list(scores.parts) == ["judge"]


def test_records_are_looked_up_once_each_on_the_calling_thread():
    asked = []

    def records(source, record):
        assert threading.current_thread() is threading.main_thread()
        asked.append((source, record))
        return {}

    judged(lambda *_: 0.0, records=records)
    assert sorted(asked) == [(0, 7), (0, 9)]


def on_three(act):
    return lambda prompt, completion, record: act() if completion == "three" else 1.0


FAULTS = {
    "raises": (lambda: [][1], "IndexError"),
    "exits": (lambda: sys.exit(3), "SystemExit"),
    "nan": (lambda: float("nan"), "nan"),
    "infinity": (lambda: float("inf"), "inf"),
    "no number": (lambda: None, "TypeError"),
    "hangs": (lambda: time.sleep(30), "no answer within 1 s"),
}


def limit(name):
    """Seconds a call may take: short where one hangs, and then still long for the others."""
    return 1 if name == "hangs" else 30


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_call_is_an_error_that_names_source_and_record(name):
    act, message = FAULTS[name]
    with pytest.raises(RuntimeError, match=r"'judge' failed on source 0, record 9") as caught:
        judged(on_three(act), timeout=limit(name))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", FAULTS)
def test_with_on_error_failures_score_that_value_and_are_counted(name):
    act, _ = FAULTS[name]
    scores = judged(on_three(act), timeout=limit(name), on_error=-0.5, workers=1)
    np.testing.assert_array_equal(scores.outcome, [1.0, 1.0, -0.5, 1.0])
    np.testing.assert_array_equal(scores.parts["judge/failures"], [0.0, 0.0, 1.0, 0.0])


def test_failures_are_named_by_label_in_a_combination():
    one = host_reward(
        "judge",
        on_three(lambda: 1 / 0),
        decode=TOKENIZER.decode,
        records=lambda source, record: {},
        on_error=0,
    )
    reward = combine({"check": (one, 3.0)})
    scores, _ = reward.score(reward.init(), ROLLOUTS)
    assert sorted(scores.parts) == ["check", "check/failures"]
    np.testing.assert_array_equal(scores.outcome, [3.0, 3.0, 0.0, 3.0])


def test_the_time_limit_counts_from_a_calls_own_start_and_hung_threads_are_replaced():
    gate = threading.Event()

    def call(index):
        if index in (0, 1):
            gate.wait(60)
        time.sleep(0.25)  # twelve of these on two threads outlast the limit in the queue
        return float(index)

    calls = [lambda index=index: call(index) for index in range(12)]
    begun = time.monotonic()
    results = dict(run_all(calls, timeout=1, workers=2))
    gate.set()
    assert time.monotonic() - begun < 50  # it did not wait for the two
    assert [index for index in results if isinstance(results[index], TimeoutError)] == [0, 1]
    assert [results[index] for index in range(2, 12)] == [float(i) for i in range(2, 12)]


def test_after_an_error_calls_that_have_not_started_are_dropped():
    started, gate = [], threading.Event()

    def call(index):
        started.append(index)
        if index == 0:
            raise OSError("down")
        gate.wait(60)  # so that none ends before the iterator is closed
        return 0.0

    results = run_all([lambda i=i: call(i) for i in range(200)], timeout=60, workers=1)
    index, error = next(results)
    assert index == 0 and isinstance(error, OSError)
    results.close()
    gate.set()
    time.sleep(0.1)  # for calls that should have been dropped
    assert len(started) <= 2


def test_scores_have_the_sharding_of_the_rollouts():
    mesh = make_mesh({"data": 2, "fsdp": 2})
    local = random_rollouts(0, prompts=8)
    rollouts = shard_batch(mesh, ShardingRules(), local)

    def fn(prompt, completion, record):
        return len(completion) / 3

    scores, plain = judged(fn, rollouts), judged(fn, local)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    assert scores.outcome.sharding.is_equivalent_to(rows, 1)
    assert scores.process.sharding.is_equivalent_to(rollouts.logprobs.sharding, 2)
    np.testing.assert_array_equal(scores.outcome, plain.outcome)
    assert float(jnp.sum(scores.outcome)) > 0


def test_prompts_that_are_not_split_are_found_too():
    mesh = make_mesh({"data": 4})
    local = random_rollouts(1, prompts=2, group=4)  # 2 prompts on 4 shards: replicated
    replicated = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.tree.map(lambda x: jax.device_put(x, rows if len(x) == 8 else replicated), local)
    tokens, mask = local.prompts.tokens, local.prompts.mask
    expected = [TOKENIZER.decode(tokens[i][mask[i]].tolist()) for i in range(2)]
    seen = set()
    judged(lambda prompt, *_: seen.add(prompt) or 0.0, placed)
    assert seen == set(expected)


PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from rlhf_jax.mesh import ShardingRules, fetch_host, make_mesh, shard_batch
from rlhf_jax.rewards.base import host_reward
from tests.rewards.examples import TOKENIZER, spell

words = ["a", "bb", "ccc", "dddd"]
rollouts = shard_batch(make_mesh({"data": 2}), ShardingRules(), spell(words, words))
seen = []
reward = host_reward(
    "size",
    lambda prompt, completion, record: seen.append((prompt, completion)) or float(len(completion)),
    decode=TOKENIZER.decode,
    records=lambda source, record: {},
    workers=1,
)
scores, _ = reward.score({}, rollouts)
print(sorted(seen), fetch_host(scores.outcome).tolist(), flush=True)
"""


def test_each_of_two_processes_judges_its_own_rows_only():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number)],
            env=environment(XLA_FLAGS=""),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = []
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        outputs.append(out.strip().splitlines()[-1])
    assert outputs == [
        "[('a', 'a'), ('bb', 'bb')] [1.0, 2.0, 3.0, 4.0]",
        "[('ccc', 'ccc'), ('dddd', 'dddd')] [1.0, 2.0, 3.0, 4.0]",
    ]
