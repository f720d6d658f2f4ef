"""Parts of work: there whole or not at all, and a broken one is named."""

import pytest

from rlhf_jax.parts import open_parts, through_parts


def test_work_goes_on_behind_the_parts_that_are_there(tmp_path):
    parts = open_parts(tmp_path, "a")
    asked = []

    def work(ready):
        asked.append(ready)
        return iter([[{"part": number}] for number in range(ready, 3)])

    assert list(through_parts(parts, "x", work)) == [(True, [{"part": i}]) for i in range(3)]
    (parts / "x-00002.jsonl").unlink()
    found = list(through_parts(open_parts(tmp_path, "a"), "x", work))
    assert found == [(i == 2, [{"part": i}]) for i in range(3)] and asked == [0, 2]
    with pytest.raises(ValueError, match="holds work on other solutions"):
        open_parts(tmp_path, "b")


def test_a_broken_part_is_named(tmp_path):
    parts = open_parts(tmp_path, "a")
    (parts / "x-00000.jsonl").write_text('{"part": 0}\n{"pa')
    with pytest.raises(ValueError, match=r"x-00000\.jsonl is broken .*; delete it"):
        list(through_parts(parts, "x", lambda ready: iter(())))
