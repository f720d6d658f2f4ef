"""Algorithms and rewards of toy size: what the seams must carry without a change to the loop."""
