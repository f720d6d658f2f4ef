"""Sampling completions inside XLA."""
