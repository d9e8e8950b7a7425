"""Rows in files, and which ratios they allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import store
from bench_rows import row


def test_rows_of_the_same_work_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "generate-cpu.csv"
    store.write(path, [row(), row("peer")])
    store.write(path, [row(median_ms="1.0"), row("other")])
    assert [(r["provider"], r["median_ms"]) for r in store.read(path)] == [
        ("hyperfast", "1.0"), ("peer", "2.0"), ("other", "2.0"),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


def test_save_into_a_folder_makes_a_file_per_operation_and_device(tmp_path: Path) -> None:
    files = store.save([row(), row(op="other"), row(device="cuda")], tmp_path / "new")
    assert [file.name for file in files] == ["generate-cpu.csv", "other-cpu.csv", "generate-cuda.csv"]
    store.save([row(), row(op="other")], tmp_path / "all.csv")
    assert len(store.read(tmp_path / "all.csv")) == 2


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x.csv is not a results file: it lacks the columns op, case"):
        store.read(tmp_path / "x.csv")
    assert store.read(tmp_path / "none.csv") == []


def test_ratio() -> None:
    peer = row("peer", median_ms="5.0")
    assert store.ratio(peer, [row(), peer]) == 2.5


@pytest.mark.parametrize(
    "ours",
    [
        row(verified="no"),
        row(date="2026-01-02T03:04:06Z"),
        row(mode="graph"),
        row(case="large"),
        row("hyperfast-cuda"),
    ],
    ids=["red", "another run", "another mode", "another case", "another provider"],
)
def test_no_ratio_across_runs_or_on_red(ours: dict[str, str]) -> None:
    peer = row("peer", median_ms="5.0")
    assert store.ratio(peer, [ours, peer]) is None


def test_no_ratio_for_a_red_row() -> None:
    peer = row("peer", verified="no")
    assert store.ratio(peer, [row(), peer]) is None
