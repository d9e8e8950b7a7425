"""README tables and pictures come from the result files alone."""

from __future__ import annotations

from pathlib import Path

import plot
import pytest
import store
from bench_rows import row

README = "# Title\n\n<!-- bench:generate-cpu -->\nold\n<!-- /bench -->\n\nafter\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    store.write(tmp_path / "generate-cpu.csv", [row(), row("peer", median_ms="5.0", percent_copy="")])
    return tmp_path


def test_table(results: Path) -> None:
    filled = plot.fill(README, results)
    assert "| small | **hyperfast** | 2.0 (1.9 to 2.2) |  | 7 | 50 % |" in filled
    assert "| small | peer | 5.0 (1.9 to 2.2) | 2.50 | 7 |  |" in filled
    assert "kernels" not in filled, "a column without values is left out"
    assert "A processor, 2 cores, 2 threads, torch 2.13, hyperfast 0.1 (abc), 2026-01-02; measured ceilings" in filled
    assert "old" not in filled
    assert filled.startswith("# Title\n") and filled.endswith("\n\nafter\n")
    assert plot.fill(filled, results) == filled


def test_red_tests_leave_no_ratio(results: Path) -> None:
    rows = [row(verified="no"), row("peer", median_ms="5.0", verified="no")]
    assert "2.50" not in plot.markdown(rows)
    rows = [red | {"op": "fitnets", "provider": red["provider"].replace("peer", "eager")} for red in rows]
    store.write(results / "fitnets-cpu.csv", rows)
    assert "| 5.0 | 5.0 |  |" in plot.losses(results, "cpu")


def test_a_table_without_results_says_so(tmp_path: Path) -> None:
    assert "Not measured yet." in plot.fill(README, tmp_path)


def test_a_case_that_was_measured_once_has_no_quantiles() -> None:
    assert "| 141,400 (once) |" in plot.markdown([row(median_ms="1.414e+05", repeats="1")])


def test_losses_share_a_table(tmp_path: Path) -> None:
    ours = row(op="fitnets", median_ms="2.0")
    others = [row(name, op="fitnets", median_ms=time) for name, time in (("eager (a)", "9.0"), ("eager (b)", "5.0"))]
    compiled = row("torch.compile", op="fitnets", median_ms="3.0")
    store.write(tmp_path / "fitnets-cpu.csv", [ours, *others, compiled])
    filled = plot.fill("<!-- bench:losses-cpu -->\n<!-- /bench -->\n", tmp_path)
    assert "| FitNets | small | **2.0** | 9.0 (4.50x) | 5.0 (2.50x) | 3.0 (1.50x) | 7, theirs 7 |" in filled
    assert "A processor, 2 cores, 2 threads, torch 2.13, hyperfast 0.1 (abc), 2026-01-02.\n" in filled


def test_a_loss_that_was_not_compared_stays_out(tmp_path: Path) -> None:
    store.write(tmp_path / "fitnets-cpu.csv", [row(op="fitnets")])
    assert "Not measured yet." in plot.fill("<!-- bench:losses-cpu -->\n<!-- /bench -->\n", tmp_path)


def test_no_markers_is_an_error_that_helps(results: Path) -> None:
    with pytest.raises(ValueError, match=r"put '<!-- bench:NAME -->'.*result files: generate-cpu"):
        plot.fill("# Title\n", results)


def test_readme_and_check(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = results / "README.md"
    readme.write_text(README)
    arguments = ["--results", str(results)]
    assert plot.main([*arguments, "--check", str(readme)]) == 1
    assert "run: python bench/plot.py --readme" in capsys.readouterr().out
    assert plot.main([*arguments, "--readme", str(readme)]) == 0
    assert plot.main([*arguments, "--check", str(readme)]) == 0


def test_picture(results: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.main(["--results", str(results), "--assets", str(results / "assets")]) == 0
    picture = results / "assets" / "bench-generate-cpu.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_files_come_in_the_order_of_the_registry(tmp_path: Path) -> None:
    for name in ("unknown-cpu", "training_step-cpu", "generate-cuda", "generate-cpu"):
        (tmp_path / f"{name}.csv").touch()
    assert [path.stem for path in plot.result_files(tmp_path)] == [
        "generate-cpu", "generate-cuda", "training_step-cpu", "unknown-cpu",
    ]  # fmt: skip
