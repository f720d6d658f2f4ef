"""The benchmarks run shrunken and say what they measured; gpu.sh says what went wrong."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from benchmarks import ceilings, decode, table, update
from benchmarks.common import model_config, report, rounded
from rlhf_jax.models.config import ModelConfig

ROOT = pathlib.Path(__file__).parents[1]


def test_ceilings_are_rates_of_this_machine():
    figures = ceilings.measure(small=True)
    # Any machine of this century: 0.1 to 10,000 GB/s, 0.1 GFLOP/s to 1 PFLOP/s.
    assert 0.1 < figures["copy_gb_per_s"] < 1e4
    assert 1e-4 < figures["matmul_tflop_per_s"] < 1e3
    assert figures["matmul_dtype"] == "float32"


def test_decode_measures_whole_rows():
    figures = decode.measure(small=True)
    shape = decode.SMALL_SHAPES[0]
    rate = figures[f"rows_{shape.rows}"]
    assert rate["tokens_per_s"] > 0
    # The two figures are one measurement: rows per step time.
    assert rate["step_ms"] * rate["tokens_per_s"] == pytest.approx(1e3 * shape.rows, rel=1e-2)
    assert 0 < rate["share_of_copy_ceiling"] < 2


def test_update_measures_steps_that_were_taken():
    figures = update.measure(small=True)
    shape = update.SMALL_WORK.shape
    assert figures["tokens"] == shape.rows * (shape.prompt + shape.tokens)
    assert figures["tokens_per_s"] * figures["seconds"] == pytest.approx(figures["tokens"], 1e-2)
    assert 0 < figures["share_of_matmul_ceiling"] < 2


def test_full_shape_is_the_half_billion_model():
    config = model_config(small=False)
    model = decode.decoder(config)
    sizes = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(sizes))
    assert 0.49e9 < count < 0.5e9  # Qwen2.5-0.5B has 494 million
    assert config.compute_dtype == "bfloat16"


def test_useful_flops_by_hand():
    # 1 layer, D 2, 1 head of width 2, F 3, V 5; one row of 1 + 2 tokens, logits of 2.
    # Weights 4·2·2 + 3·2·3 = 34, on 3 tokens 102; attention 2·9 = 18; logits 2·5·2 = 20.
    config = ModelConfig(
        vocab_size=5, width=2, layers=1, heads=1, kv_heads=1, head_dim=2, mlp_width=3
    )
    assert update.useful_flops(config, decode.Shape(1, 1, 1, 2)) == 6 * (102 + 18 + 20)


def test_step_bytes_by_hand():
    # 10 weights and, for 4 rows at a mean length of 3 + 2/2, 2·1·4·1·2·4 numbers; 4 bytes each.
    config = ModelConfig(
        vocab_size=5, width=2, layers=1, heads=1, kv_heads=1, head_dim=2, mlp_width=3
    )
    params = {"w": jax.ShapeDtypeStruct((5, 2), "float32")}
    assert decode.step_bytes(params, config, decode.Shape(4, 1, 3, 2)) == 4 * (10 + 64)


def test_report_prints_one_json_line(capsys):
    line = report("name", True, {"rate": rounded(1234.567)})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed) == line
    assert line["figures"] == {"rate": 1235.0}
    assert line["versions"]["jax"] == jax.__version__


def write_parts(folder, parts):
    folder.mkdir(exist_ok=True)
    (folder / "parts.tsv").write_text("".join("\t".join(part) + "\n" for part in parts))
    line = {
        "device": "Some GPU",
        "small": False,
        "versions": {"jax": "1.2"},
        "figures": {"rows_8": {"tokens_per_s": 2500.0, "share_of_copy_ceiling": 0.25}},
    }
    (folder / "decode.out").write_text("noise\n" + json.dumps(line) + "\n")
    (folder / "tests.out").write_text(
        "....\n3 tests were skipped because RLHF_DATA=x is absent\n9 passed, 3 skipped in 2s\n"
    )


def test_table_says_what_was_measured(tmp_path):
    write_parts(tmp_path, [("decode", "ok", "12"), ("tests", "ok", "3")])
    page = table.table(tmp_path, "2001-02-03", "555.1", "abc123")
    assert "| decode | ok | 12 | rows 8: 2,500.0 tokens/s, 25.0% of the copy ceiling |" in page
    skipped = "3 tests were skipped because RLHF_DATA=x is absent"
    assert f"| tests | ok | 3 | 9 passed, 3 skipped in 2s; {skipped} |" in page
    assert "- Date: 2001-02-03\n- Device: Some GPU, driver 555.1\n- Versions: jax 1.2\n" in page
    assert "Every part ended well." in page


def test_table_says_what_failed(tmp_path):
    parts = [("decode", "failed with status 1", "1"), ("tests", "out of time after 9 s", "9")]
    write_parts(tmp_path, parts)
    page = table.table(tmp_path, "2001-02-03", "unknown", "abc123")
    assert "- **decode**: failed with status 1\n- **tests**: out of time after 9 s" in page
    assert "Every part ended well." not in page
    assert "tokens/s" not in page


def run_script(tmp_path, body, *arguments):
    """gpu.sh with a stand-in Python: `body` decides by "$*"; table.py is run for real."""
    program = tmp_path / "python"
    program.write_text(
        f'#!/usr/bin/env bash\n[[ $1 != *table.py ]] || exec {sys.executable} "$@"\n'
        f'echo "$*" >>{tmp_path}/calls\n{body}\n'
    )
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", "--python", program, "--out", "page.md", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    return done, (tmp_path / "page.md").read_text(), calls


GOOD = """
[[ $2 != benchmarks.* ]] || echo '{"device": "d", "small": true, "versions": {}, "figures": {}}'
for a in "$@"; do
  [[ $a != --workdir=* ]] || { mkdir -p "${a#*=}"; echo '{"steps": 12}' >"${a#*=}/summary.json"; }
done
"""


def test_script_runs_every_part(tmp_path):
    done, page, calls = run_script(tmp_path, GOOD, "--small")
    assert done.returncode == 0, done.stderr
    assert calls[:3] == [
        f"-m benchmarks.{name} --small" for name in ("ceilings", "decode", "update")
    ]
    assert calls[3].startswith("-m rlhf_jax.train_policy --config=configs/ppo_tiny.py")
    assert calls[4].startswith("-m pytest")
    assert "| ppo_tiny | ok | 0 | steps 12 |" in page
    assert "- Device: d, shrunken shapes, driver" in page
    assert "Every part ended well." in page


def test_script_fails_at_its_end_when_a_part_fails(tmp_path):
    body = "[[ $2 != benchmarks.decode ]] || { echo broken >&2; exit 3; }\n" + GOOD
    done, page, calls = run_script(tmp_path, body)
    assert done.returncode == 1
    assert "broken" in done.stderr
    assert len(calls) == 5
    assert "- **decode**: failed with status 3" in page
    assert "| update | ok |" in page


def test_script_names_what_ran_out_of_time(tmp_path):
    body = "[[ $2 != benchmarks.update ]] || sleep 60\n" + GOOD
    done, page, calls = run_script(tmp_path, body, "--seconds", "2")
    assert done.returncode == 1
    assert "| ceilings | ok |" in page
    assert "- **update**: out of time after" in page
    assert "- **ppo_tiny**: not started: out of time" in page
    assert "- **tests**: not started: out of time" in page
    assert len(calls) == 3


def test_script_says_when_not_even_the_set_up_works(tmp_path):
    environment = {"PYTHON": "/bin/false", "RLHF_VENV": "env", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", "--small", "--out", "page.md"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "PYTHON=/bin/false does not run" in done.stderr
    page = (tmp_path / "page.md").read_text()
    assert "- **setup**: failed with status 1" in page
    assert "unknown: no benchmark ran to its end" in page


@pytest.mark.slow
def test_script_runs_shrunken_for_real(tmp_path):
    page = tmp_path / "page.md"
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", "--small", "--python", sys.executable, "--out", page],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for part in ("ceilings", "decode", "update", "ppo_tiny", "tests"):
        assert f"| {part} | ok |" in page.read_text()
