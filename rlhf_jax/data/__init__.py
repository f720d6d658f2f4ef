"""Data sets: builders, sources with restorable positions, batches."""
