"""Rows of results in CSV files, one file per operation and kind of device.

`python bench/store.py FILE` puts rows that were measured on another machine into bench/results.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from machine import ROOT

RESULTS = ROOT / "bench" / "results"
OURS = "hyperfast"

FIELDS = (
    "op", "case", "provider", "device", "mode", "median_ms", "p20_ms", "p80_ms", "repeats", "state_mib", "peak_mib",
    "bytes", "flops", "gbps", "percent_copy", "percent_matmul", "copy_gbps", "matmul_gflops", "kernels", "error",
    "verified", "machine", "processor", "threads", "torch", "triton", "cuda", "hyperfast", "commit", "date",
)  # fmt: skip
_KEY = ("op", "case", "provider", "device", "mode")

Row = Mapping[str, str]


def read(path: Path) -> list[Row]:
    """Rows of a results file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [field for field in FIELDS if field not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path.name} is not a results file: it lacks the columns {', '.join(missing)}")
        return list(reader)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Put `rows` into a results file: in the place of rows of the same work, else at the end."""
    merged = {tuple(row[key] for key in _KEY): row for row in read(path)}
    merged |= {tuple(row[key] for key in _KEY): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
    unfinished.replace(path)


def save(rows: Sequence[Row], target: Path) -> list[Path]:
    """Put rows into `target`: a CSV file for all of them, or a folder with a file per operation and device."""
    if target.suffix == ".csv":
        write(target, rows)
        return [target]
    files: dict[Path, list[Row]] = {}
    for row in rows:
        files.setdefault(target / f"{row['op']}-{row['device']}.csv", []).append(row)
    for path, part in files.items():
        write(path, part)
    return list(files)


def ratio(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times longer this row's provider takes than hyperfast.

    None where there is nothing to compare with: rows of other runs, of other modes, or without green tests.
    """
    if row["verified"] != "yes":
        return None
    for other in rows:
        same = all(row[key] == other[key] for key in ("op", "case", "device", "mode", "date"))
        if same and other["provider"] == OURS and other["verified"] == "yes":
            found = float(row["median_ms"]) / float(other["median_ms"])
            return found if math.isfinite(found) else None
    return None


def main() -> None:
    """Merge result files into bench/results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, default=RESULTS)
    options = parser.parse_args()
    for file in options.file:
        if not file.exists():
            parser.error(f"{file} does not exist")
        for path in save(read(file), options.into):
            print(f"merged into {path.name}")


if __name__ == "__main__":
    main()
