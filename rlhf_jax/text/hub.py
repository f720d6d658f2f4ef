"""Models on the Hugging Face hub: their files in the local cache, safetensors only, no pickles."""

import functools
import pathlib
import re

import huggingface_hub

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TEXT = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
# Folders with the same weights in other forms, and a second copy that some keep beside the first.
_LEFT = ("*/*", "consolidated*")


@functools.cache
def local_folder(name: str, said_of: str = "", *, weights: bool = True) -> str:
    """The folder of a model: `name` itself, or, for one like "org/name" that is no path here, the
    hub's copy in the local cache, fetched where it is not there yet.

    Args:
        said_of: how messages begin, such as "model.init_from='org/name'".
        weights: else only what a tokenizer may consist of.

    Raises:
        ValueError: the cache does not have it, and the hub does not give it.
    """
    if not _NAME.fullmatch(name) or pathlib.Path(name).exists():
        return name
    try:
        found = huggingface_hub.snapshot_download(
            name,
            allow_patterns=[*_TEXT, *(["*.safetensors"] if weights else [])],
            ignore_patterns=list(_LEFT),
        )
    except OSError as error:  # all errors of the hub's client are of this kind
        line = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"{said_of or repr(name)} is no local path, is not in the local cache of the Hugging "
            f"Face hub, and the hub does not give it ({type(error).__name__}: {line}); name a "
            "folder, or make the hub reachable and log in where the model is gated"
        ) from error
    return str(found)
