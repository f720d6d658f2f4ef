"""Public data and pretrained weights through the whole project, and the page of what came out.

    python -m benchmarks.real_input --workdir=runs/real_input [--data=../shared/data]

Parts: a pretrained model and a learned reward (`configs/stories.py`), a reward model from human
pairs (`configs/pairs.py`), GSM8K's reference solutions through the exact-answer reward, two PPO
steps on GSM8K, two reward steps on dialogues. A part that is done is not run again and one that
was stopped goes on, so the command can be repeated; it ends by writing the page from the parts'
summaries. About fifteen minutes on two cores. ``--small`` shortens every part, for tests.
"""

import argparse
import gzip
import importlib
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from benchmarks import grading, real_input_page, stories260k
from rlhf_jax import run_folder
from rlhf_jax.data.sources import read_jsonl
from rlhf_jax.ops.reward_metrics import pair_accuracy
from rlhf_jax.pipeline import pipeline
from rlhf_jax.program import set_up
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.train_policy import train_policy
from rlhf_jax.training.writer import write_json

DATA = pathlib.Path("../shared/data")
_log = logging.getLogger("rlhf_jax.benchmarks.real_input")


class Place(NamedTuple):
    """Where data is read and results are written, and whether everything is shortened."""

    data: pathlib.Path
    workdir: pathlib.Path
    small: bool

    def pretrained(self) -> pathlib.Path:
        """stories260K as a Hugging Face folder, made once."""
        folder = self.workdir / "stories260K"
        if not (folder / "tokenizer_config.json").is_file():  # the last file that is written
            stories260k.convert(self.data / "tiny_models/stories260K", folder)
        return folder

    def gpt2(self) -> pathlib.Path:
        """The GPT-2 tokenizer, unpacked."""
        path = self.workdir / "gpt2_tokenizer.json"
        if not path.is_file():
            packed = self.data / "tokenizers/gpt2/tokenizer.json.gz"
            path.write_bytes(gzip.decompress(packed.read_bytes()))
        return path


def config_of(name: str, *argument: str) -> ConfigDict:
    """A shipped config, for programs that are called and not started."""
    return importlib.import_module(f"configs.{name}").get_config(*argument)


def stories(place: Place) -> None:
    """The pretrained model: labels by gold, an outcome model, PPO, gold on held-out prompts."""
    argument = f"model={place.pretrained()}" + (",small" if place.small else "")
    pipeline(config_of("stories", argument), str(place.workdir / "stories"))


# What the cards of reward models say of these sets; no commas.
ABOUT = {
    "ukp_convarg1": dict(
        origin="UKPConvArg1Strict (Habernal and Gurevych 2016; github.com/UKPLab)",
        annotators="crowd workers of Amazon Mechanical Turk; five for each pair",
        aggregation="MACE; pairs of doubtful or contradictory votes were left out",
        licence="CC BY 4.0",
    ),
    "hh_rlhf": dict(
        origin="HH-RLHF (Bai et al. 2022; github.com/anthropics/hh-rlhf)",
        annotators="crowd workers in the USA; one for each pair",
        aggregation="one choice",
        licence="MIT",
    ),
}


def pairs_argument(place: Place, name: str, **values: Any) -> str:
    """The argument of configs/pairs.py for the train and test files of a set."""
    folder = place.data / name
    paths = dict(train=folder / "train.jsonl.gz", test=folder / "test.jsonl.gz")
    values |= ABOUT[name] | dict(model_licence="not for release")
    return ",".join(f"{key}={value}" for key, value in (paths | values).items())


def pairs_ukp(place: Place) -> None:
    """A reward model from UKPConvArg1's human pairs; the test topics are not in training."""
    size = dict(tokenizer=place.gpt2(), size="tiny", max_length=192, rate=1e-3, test_rows=271)
    size |= dict(steps=2, rows=4) if place.small else dict(steps=100, rows=32)
    argument = pairs_argument(place, "ukp_convarg1", **size)
    folder = place.workdir / "pairs_ukp"
    folder.mkdir(exist_ok=True)
    records = read_jsonl(place.data / "ukp_convarg1/test.jsonl.gz")
    lengths = [[len(record[side]) for record in records] for side in ("chosen", "rejected")]
    longer = pair_accuracy(*np.asarray(lengths, np.float32))
    write_json(folder / "baseline.json", {"longer_wins": longer, "pairs": len(records)})
    pipeline(config_of("pairs", argument), str(folder))


def hh_argument(place: Place) -> str:
    """Two steps of a tiny model on dialogues."""
    size = dict(tokenizer=place.gpt2(), size="tiny", steps=2, rows=8, max_length=192, rate=1e-3)
    return pairs_argument(place, "hh_rlhf", dialogue=True, test_rows=8, **size)


def pairs_hh(place: Place) -> None:
    """Two reward steps on the dialogues of HH-RLHF: that the door takes them, nothing more."""
    pipeline(config_of("pairs", hh_argument(place)), str(place.workdir / "pairs_hh"))


def gsm8k_grading(place: Place) -> None:
    """Reference solutions of GSM8K, as they are and changed, through `exact_match`."""
    started = time.time()
    records = read_jsonl(place.data / "gsm8k/train.jsonl.gz")
    records = records[:200] if place.small else records
    rows = [
        {"form": form, "right": right, "solutions": count, "graded_so": so}
        for form, right, count, so in grading.report(records, load_tokenizer(str(place.gpt2())))
    ]
    folder = place.workdir / "gsm8k_grading"
    folder.mkdir(exist_ok=True)
    summary = {"rows": rows, "records": len(records)} | run_folder.closing_facts(started)
    write_json(folder / "summary.json", summary)


def gsm8k_config(place: Place) -> ConfigDict:
    """configs/ppo_tiny.py without its learned rewards, on GSM8K's questions: two steps."""
    config = config_of("ppo_tiny")
    config.data.update(
        name=f"jsonl:{place.data / 'gsm8k/train.jsonl.gz'}",
        template="Question: {question}\nAnswer: ",
        max_prompt=64,
        overlong="skip",
        tokenizer=str(place.gpt2()),
    )
    config.data.options = dict()  # update() would merge them with those of the arithmetic task
    config.rewards = {name: config.rewards[name] for name in ("exact", "length")}
    config.rewards.length.free = 0  # a signal: no answer will be right
    config.value.init_from = "policy"
    config.rollout.samples, config.rollout.max_tokens = 2, 8  # 50,257 logits for each token
    config.train.steps = 2
    config.log.samples_every = 1
    return config


def gsm8k_ppo(place: Place) -> None:
    """Two PPO steps of random weights: plumbing."""
    train_policy(gsm8k_config(place), str(place.workdir / "gsm8k_ppo"))


PARTS: dict[str, Callable[[Place], None]] = {
    "stories": stories,
    "pairs_ukp": pairs_ukp,
    "gsm8k_grading": gsm8k_grading,
    "gsm8k_ppo": gsm8k_ppo,
    "pairs_hh": pairs_hh,
}


def run(place: Place) -> None:
    """Every part that has no summary.json yet.

    Raises:
        ValueError: the data folder is absent.
    """
    if not place.data.is_dir():
        raise ValueError(f"--data={place.data} is not a folder")
    place.workdir.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        if (place.workdir / name / "summary.json").is_file():
            _log.info("part %s: done before", name)
            continue
        _log.info("part %s", name)
        part(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/real_input")
    parser.add_argument("--data", type=pathlib.Path, default=DATA, help=f"default: {DATA}")
    parser.add_argument("--page", type=pathlib.Path, default="docs/results/real_input.md")
    parser.add_argument("--small", action="store_true", help="every part short, for tests")
    args = parser.parse_args()
    set_up()
    command = f"python -m benchmarks.real_input {' '.join(sys.argv[1:])}".rstrip()
    run(Place(args.data, args.workdir, args.small))
    args.page.write_text(real_input_page.page(args.workdir, command), encoding="utf-8")
    print(json.dumps({"page": str(args.page)}))


if __name__ == "__main__":
    main()
