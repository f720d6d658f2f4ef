"""Python runs this as it starts where this folder is on its path; see `environment` in
tests/processes.py.

torch is not there, as for users, who get it by the extras [test] and [hf-parity] alone: where it
is, transformers imports it, which is a third of what it costs to start a program.
"""

import importlib.machinery
import sys

_PLAIN = importlib.machinery.PathFinder


class _Base(_PLAIN):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else super().find_spec(name, path, target)


sys.meta_path[:] = [_Base if finder is _PLAIN else finder for finder in sys.meta_path]
