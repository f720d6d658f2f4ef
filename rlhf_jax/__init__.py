"""RLHF in JAX: outcome and process reward models, sampling and policy updates as XLA steps."""

__version__ = "0.1.0"
