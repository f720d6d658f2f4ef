"""Pure array mathematics: masks, log-probabilities, returns, losses, metrics."""
