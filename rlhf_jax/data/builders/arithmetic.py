"""The arithmetic task as a TFDS builder: written once per set of options, as ArrayRecord."""

import dataclasses
import hashlib
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data import arithmetic


class Arithmetic(tfds.core.GeneratorBasedBuilder):
    """Generated multi-step arithmetic with worked steps; see `rlhf_jax.data.arithmetic`."""

    VERSION = tfds.core.Version("1.0.0")  # raise it when records change
    pkg_dir_path = pathlib.Path(__file__).parent
    # Where TFDS 4.9 looks for download checksums, by a package that it does not require
    # (importlib_resources). There are no downloads.
    code_path = None

    def __init__(self, *, options: arithmetic.Options, data_dir: str):
        self._options = options
        super().__init__(
            data_dir=data_dir,
            config=tfds.core.BuilderConfig(name=config_name(options)),
            file_format="array_record",
        )

    def _info(self) -> tfds.core.DatasetInfo:
        text, features = tfds.features.Text, tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Multi-step arithmetic: {self._options}",
            features=features.FeaturesDict(
                {
                    "question": text(),
                    "answer": text(),
                    "final": np.int64,
                    "expression": text(),
                    "completion": text(),
                    "is_correct": np.bool_,
                    "steps": features.Sequence(text()),
                    "labels": features.Sequence(np.bool_),
                }
            ),
            disable_shuffling=True,  # record i is the i-th problem, whatever wrote the files
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {split: self._generate_examples(split) for split in arithmetic.SPLITS}

    def _generate_examples(self, split: str):
        found = arithmetic.problems(split, self._options)
        for key, (index, problem) in enumerate(found):
            yield key, arithmetic.record(index, problem, self._options)


def config_name(options: arithmetic.Options) -> str:
    """A folder name that differs wherever the options differ."""
    values = dataclasses.astuple(options)
    digest = hashlib.sha256(repr(values).encode()).hexdigest()[:8]
    return f"ops{options.min_ops}to{options.max_ops}_mod{options.modulus}_{digest}"


def prepare(options: arithmetic.Options, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of `options`, its files written under `data_dir` unless they are there.

    Processes may prepare the same folder at the same time: each writes a folder of its own and
    the first to rename it wins; the contents are the same.
    """
    version = str(Arithmetic.VERSION)
    folder = pathlib.Path(data_dir, Arithmetic.name, config_name(options), version)
    if not (folder / "dataset_info.json").is_file():
        builder = Arithmetic(options=options, data_dir=data_dir)
        try:
            builder.download_and_prepare()
        except OSError:
            if not (folder / "dataset_info.json").is_file():
                raise
    return tfds.builder_from_directory(str(folder))
