"""The arithmetic task through TFDS: ArrayRecord without TensorFlow, cached by its options."""

import pathlib
import subprocess
import sys
import threading

import pytest

from rlhf_jax.data import arithmetic
from rlhf_jax.data.arithmetic import Options
from rlhf_jax.data.builders.arithmetic import config_name, prepare
from rlhf_jax.data.sources import open_source

OPTIONS = dict(min_ops=2, max_ops=3, slip=0.5, train=60, test=20)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_records_come_back_as_generated(split, cache):
    source = open_source("arithmetic", split, data_dir=cache, options=OPTIONS)
    options = Options(**OPTIONS)
    wanted = [arithmetic.record(i, p, options) for i, p in arithmetic.problems(split, options)]
    assert [source[i] for i in range(len(source))] == wanted
    first = source[0]
    assert {type(first[name]) for name in ("question", "final", "is_correct")} == {str, int, bool}
    assert all(type(label) is bool for label in first["labels"])


def test_files_are_written_once_per_options(cache):
    folder = pathlib.Path(prepare(Options(**OPTIONS), cache).data_path)
    files = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert sum(".array_record" in name for name in files) == 2
    again = pathlib.Path(prepare(Options(**OPTIONS), cache).data_path)
    assert again == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == files
    other = prepare(Options(**(OPTIONS | {"slip": 0.25})), cache)
    assert pathlib.Path(other.data_path) != folder
    assert len(other.as_data_source("test")) == 20


def test_every_option_is_in_the_folder_name():
    values = dict(min_ops=1, max_ops=5, modulus=1000, operators="+", slip=0.1, train=7, test=8)
    names = {config_name(Options(**{k: v})) for k, v in (values | {"seed": 3}).items()}
    assert len(names | {config_name(Options())}) == len(values) + 2


def test_two_writers_at_once(tmp_path):
    options = Options(**(OPTIONS | {"seed": 9}))
    failures = []

    def write():
        try:
            assert len(prepare(options, str(tmp_path)).as_data_source("train")) == 60
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError):
        prepare(Options(**OPTIONS), str(blocked))


def test_unknown_option_and_split(cache):
    with pytest.raises(ValueError, match="arithmetic has no option slips; it has min_ops"):
        open_source("arithmetic", data_dir=cache, options={"slips": 0.5})
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        open_source("arithmetic", "dev", data_dir=cache, options=OPTIONS)


def test_tensorflow_is_never_imported(tmp_path):
    """Building, reading and batching, in a fresh process that reports what it imported."""
    program = f"""
import sys
from rlhf_jax.data.prompts import PromptSource
from rlhf_jax.data.sources import open_source
from rlhf_jax.text.tokenizer import load_tokenizer
source = open_source("arithmetic", data_dir={str(tmp_path)!r}, options={OPTIONS!r})
text = load_tokenizer("byte")
prompts = PromptSource([source], text, template="{{question}}", max_prompt=32, seed=0)
assert prompts.batch(0, slice(None), 4).mask.any()
assert not any(name.partition(".")[0] == "tensorflow" for name in sys.modules)
print("done")
"""
    root = pathlib.Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["done"], run.stderr
