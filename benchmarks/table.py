"""Turns what gpu.sh has run into a Markdown table on stdout. Standard library only.

    python benchmarks/table.py FOLDER

FOLDER holds parts.tsv (name, result, seconds), NAME.out and NAME.err of each part, and the run
folder of ppo_tiny.
"""

import datetime
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_UNITS = {
    "copy_gb_per_s": "GB/s copied (read and written)",
    "matmul_tflop_per_s": "TFLOP/s in matrix products",
    "tokens_per_s": "tokens/s",
    "step_ms": "ms per step",
    "seconds": "s per update",
    "share_of_copy_ceiling": "of the copy ceiling",
    "share_of_matmul_ceiling": "of the matmul ceiling",
    "peak_gib": "GiB at the peak",
}
_SHARES = ("share_of_copy_ceiling", "share_of_matmul_ceiling")


def last_json(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object; None if there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return None


def describe(figures: Mapping[str, Any]) -> str:
    """Figures in words, the units that have a name; nested figures as "rows_8: ...; "."""
    flat, nested = [], []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            nested.append(f"{name.replace('_', ' ')}: {describe(value)}")
        elif name in _SHARES:
            flat.append(f"{value:.1%} {_UNITS[name]}")
        elif name in _UNITS and value is not None:
            flat.append(f"{value:,} {_UNITS[name]}")
    return "; ".join([*nested, *([", ".join(flat)] if flat else [])])


def figures_of(folder: pathlib.Path, name: str) -> str:
    """What a part that ended well has to say."""
    text = (folder / f"{name}.out").read_text()
    if name == "tests":
        lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed)", line)]
        return "; ".join([*lines[-1:], *re.findall(r"\d+ tests were skipped.*", text)])
    if name == "ppo_tiny":
        summary = json.loads((folder / "ppo_tiny" / "summary.json").read_text())
        shown = ("steps", "seconds", "objective/score", "peak_memory_bytes")
        return ", ".join(f"{key} {summary[key]}" for key in shown if key in summary)
    line = last_json(text)
    return describe(line["figures"]) if line else ""


def versions_of(folder: pathlib.Path) -> tuple[str, str]:
    """Device and versions as the benchmarks report them."""
    for name in ("ceilings", "decode", "update"):
        path = folder / f"{name}.out"
        line = last_json(path.read_text()) if path.exists() else None
        if line:
            versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items())
            shapes = ", shrunken shapes" if line["small"] else ""
            return line["device"] + shapes, versions
    return "unknown", "unknown: no benchmark ran to its end"


def first_line(*command: str) -> str:
    """First line of what the command prints; "unknown" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else "unknown"


def table(folder: pathlib.Path, date: str, driver: str, commit: str) -> str:
    """The page: heading, versions, one row per part, and what did not end well."""
    device, versions = versions_of(folder)
    rows, faults = [], []
    for line in (folder / "parts.tsv").read_text().splitlines():
        name, result, seconds = line.split("\t")
        if result == "ok":
            figures = figures_of(folder, name)
        else:
            figures = "—"
            faults.append(f"- **{name}**: {result}")
        rows.append(f"| {name} | {result} | {seconds} | {figures} |")
    return "\n".join(
        [
            "# Measured on one device",
            "",
            "Written by `bash benchmarks/gpu.sh`; do not edit by hand.",
            "",
            f"- Date: {date}",
            f"- Device: {device}, driver {driver}",
            f"- Versions: {versions}",
            f"- Commit: {commit}",
            "",
            "| part | result | seconds | figures |",
            "|---|---|---|---|",
            *rows,
            "",
            *(["Did not end well:", "", *faults] if faults else ["Every part ended well."]),
            "",
        ]
    )


def main() -> None:
    """Reads the folder named on the command line and prints the page."""
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = first_line("git", "rev-parse", "--short", "HEAD")
    sys.stdout.write(table(pathlib.Path(sys.argv[1]), today, driver, commit))


if __name__ == "__main__":
    main()
