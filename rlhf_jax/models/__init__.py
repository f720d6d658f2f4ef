"""The decoder, its heads and adapters, and loading: the only place that imports flax."""
