"""The only code that config files share: parsing the argument after the colon."""

from ml_collections import ConfigDict


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
    """Reads ``configs/x.py:key=value,flag`` into a ConfigDict with the types of ``defaults``.

    Raises:
        ValueError: for a key that ``defaults`` does not have; the known ones are listed.
    """
    values = ConfigDict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            raise ValueError(f"unknown config argument {key!r}; known: {', '.join(defaults)}")
        kind = type(defaults[key])
        values[key] = (text or "true").lower() in ("1", "true") if kind is bool else kind(text)
    return values
