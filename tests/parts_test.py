"""Parts of work: there whole or not at all, and a broken one is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.mesh import make_mesh
from rlhf_jax.parts import open_parts, through_parts, weights_digest


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


def test_a_digest_tells_weights_apart_and_not_meshes():
    rng = np.random.default_rng(0)
    tree = {
        "a": rng.normal(size=(4, 6)).astype(np.float32),
        "b": {
            "c": jnp.asarray(rng.normal(size=8), jnp.bfloat16),
            "d": np.ones((2, 3, 1, 2, 2), np.float32),
        },
    }
    first = weights_digest(tree)
    mesh = make_mesh({"data": 2, "tensor": 2})
    spread = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    assert weights_digest({**tree, "a": jax.device_put(tree["a"], spread)}) == first
    nudged = tree["a"].copy()
    nudged[1, 2] = np.nextafter(nudged[1, 2], np.float32(9))
    others = [
        nudged, tree["a"][::-1].copy(), tree["a"][:, ::-1].copy(), np.zeros((4, 6), np.float32),
    ]  # fmt: skip
    others = [{**tree, "a": other} for other in others] + [{"b": tree["b"], "e": tree["a"]}]
    assert len({first, *map(weights_digest, others)}) == 1 + len(others)
