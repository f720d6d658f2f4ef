"""Tokenizers, templates and the cutting of solutions into steps."""
