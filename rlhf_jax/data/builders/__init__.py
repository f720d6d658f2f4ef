"""TFDS builders: they write ArrayRecord, which is read as a random-access source."""
