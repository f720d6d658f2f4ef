"""One file per workload; each prints one JSON line: ``python -m benchmarks.decode [--small]``."""
