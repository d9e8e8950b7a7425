"""Measure operations against other ways to do the same work, correctness first.

    python bench/run.py                                    everything, into bench/results
    python bench/run.py --op generate --repeats 50
    python bench/run.py --quick                            small sizes, nothing written: does everything run?
    python bench/run.py --device cuda --graph              CUDA graph replays as well

Every provider is compared with a float64 reference on the inputs that are timed, and left out where it is wrong.
Ratios are printed only where the operation's own tests are green.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import memory
import store
import timing
import torch
from machine import Ceilings, environment, measure_ceilings
from registry import NAMES, Case, Operation, Provider, Work, operation
from verify import largest_error, run_tests

from hyperfast import BackendUnavailable


@dataclass(frozen=True)
class Settings:
    """What one run of the program measures, and how."""

    device: torch.device
    providers: Sequence[str] | None
    repeats: int
    graph: bool
    memory: bool
    verified: bool
    seconds: float


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=NAMES, help="may be repeated; default: all")
    parser.add_argument("--case", action="append", help="name of a case, or a part of it; may be repeated")
    parser.add_argument("--provider", action="append", help="name, or a part of it; may be repeated; default: all")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--csv", type=Path, help="folder or .csv file for the rows; default bench/results")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats; written only with --csv")
    parser.add_argument("--repeats", type=int, help="rounds; default 30, with --quick 5")
    parser.add_argument("--seconds", type=float, default=120.0, help="longest time for the rounds of one case")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs as well")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--no-verify", action="store_true", help="do not run the tests; then no ratio is printed")
    parser.add_argument("--kernels", action="store_true", help="with --device cuda: list the kernels of a step")
    parser.add_argument("--profile", action="store_true", help="print torch.profiler's table of ours, measure nothing")
    parser.add_argument("--list", action="store_true", help="list operations, cases and providers")
    options = parser.parse_args(arguments)
    if options.device.split(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device is {options.device!r}; choose cpu or cuda")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.graph and not options.device.startswith("cuda"):
        parser.error("--graph needs --device cuda")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; expected at least 1")
    return options


def chosen_cases(op: Operation, patterns: Sequence[str] | None, small: bool) -> list[Case]:
    """Cases whose name contains one of `patterns`; without patterns the small or the large ones, none that is heavy."""
    if patterns is None:
        return [case for case in op.cases if case.small == small and not case.heavy]
    return [case for case in op.cases if any(pattern in case.name for pattern in patterns)]


def chosen_providers(op: Operation, settings: Settings) -> list[Provider]:
    """Providers that are asked for and can run; the others are named with the reason."""
    found = []
    for provider in op.providers:
        if settings.providers is not None and not any(part in provider.name for part in settings.providers):
            continue
        reason = provider.unavailable(settings.device)
        if reason is None:
            found.append(provider)
        elif settings.device.type == "cuda" or "GPU" not in reason:
            print(f"  {provider.name} is left out: {reason}")
    return found


def measure(op: Operation, case: Case, settings: Settings, ceilings: Ceilings) -> tuple[list[dict[str, str]], bool]:
    """Rows of one case, and whether all providers were right."""
    if case.heavy:
        return _measured_apart(op, case, settings, ceilings), True
    torch.compiler.reset()
    device = settings.device
    traffic = op.traffic(case.options)
    sets = [op.inputs(case.options, device, seed) for seed in range(timing.sets_needed(traffic, device))]
    works, errors, right = _checked(op, chosen_providers(op, settings), sets)
    if not works:
        return [], right
    rounds = (settings.repeats, 3, settings.seconds)
    kernels = {
        name: len(timing.kernels_launched(work[0].step)) for name, work in works.items() if device.type == "cuda"
    }
    times = {"eager": timing.interleaved({n: [w.step for w in work] for n, work in works.items()}, device, *rounds)}
    if settings.graph:
        times["graph"] = timing.interleaved(_captured(works), device, *rounds)
    names = list(works)
    del works, sets
    gc.collect()
    used = _memory(op, case, names, settings)
    rows = []
    for mode, by_provider in times.items():
        for name, found in by_provider.items():
            row = _row(op, case, name, settings, ceilings, found, used.get(name) if mode == "eager" else None)
            rows.append({**row, "mode": mode, "kernels": str(kernels.get(name, "")), "error": f"{errors[name]:.1e}"})
    return rows, right


def _measured_apart(op: Operation, case: Case, settings: Settings, ceilings: Ceilings) -> list[dict[str, str]]:
    """Rows of a heavy case."""
    if settings.device.type == "cuda":
        print("  left out: on a GPU it is measured in one process, which this case is too large for")
        return []
    rows = []
    for provider in chosen_providers(op, settings):
        found = memory.measure_in_process(op.name, case.name, provider.name, torch.get_num_threads())
        if found is not None:
            once = timing.Quantiles.of([found.milliseconds])
            rows.append({**_row(op, case, provider.name, settings, ceilings, once, found), "error": ""})
    return rows


def _row(
    op: Operation,
    case: Case,
    provider: str,
    settings: Settings,
    ceilings: Ceilings,
    found: timing.Quantiles,
    used: memory.Memory | None,
) -> dict[str, str]:
    traffic, flops = op.traffic(case.options), op.flops(case.options)
    gbps = traffic / found.median / 1e6
    return {
        "op": op.name,
        "case": case.name,
        "provider": provider,
        "device": settings.device.type,
        "mode": "eager",
        "median_ms": f"{found.median:.4g}",
        "p20_ms": f"{found.p20:.4g}",
        "p80_ms": f"{found.p80:.4g}",
        "repeats": str(found.repeats),
        "state_mib": f"{used.state:.0f}" if used else "",
        "peak_mib": f"{used.peak:.0f}" if used else "",
        "bytes": str(traffic),
        "flops": str(flops),
        "gbps": f"{gbps:.4g}" if traffic else "",
        "percent_copy": f"{100 * gbps / ceilings.copy_gbps:.1f}" if traffic else "",
        "percent_matmul": f"{100 * flops / found.median / 1e6 / ceilings.matmul_gflops:.1f}",
        "copy_gbps": f"{ceilings.copy_gbps:.4g}",
        "matmul_gflops": f"{ceilings.matmul_gflops:.4g}",
        "kernels": "",
        "verified": "yes" if settings.verified else "no",
    }


def _captured(works: Mapping[str, Sequence[Work]]) -> dict[str, list[timing.Step]]:
    """Replays of CUDA graphs of the steps; providers that wait for the device cannot be captured and are named."""
    steps: dict[str, list[timing.Step]] = {}
    for name, work in works.items():
        try:
            steps[name] = [timing.captured(w.step) for w in work]
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"  {name} is left out: it cannot be captured in a CUDA graph ({str(error).splitlines()[0]})")
    return steps


def _checked(
    op: Operation, providers: Sequence[Provider], sets: Sequence[object]
) -> tuple[dict[str, list[Work]], dict[str, float], bool]:
    """Works of the providers whose results agree with float64, and their errors."""
    truth = op.truth(sets[0])
    works: dict[str, list[Work]] = {}
    errors: dict[str, float] = {}
    right = True
    for provider in providers:
        try:
            work = [provider.build(inputs) for inputs in sets]
            found, name = largest_error(work[0].results(), truth)
        except BackendUnavailable as error:
            print(f"  {provider.name} is left out: {error}")
            continue
        if found <= op.tolerance:  # NaN is not
            works[provider.name], errors[provider.name] = work, found
        else:
            right = False
            print(f"  WRONG: {provider.name} is left out: {name} is off by {found:.1e}, allowed {op.tolerance:.0e}")
    return works, errors, right


def _memory(op: Operation, case: Case, names: Sequence[str], settings: Settings) -> dict[str, memory.Memory]:
    if not settings.memory:
        return {}
    used = {}
    for name in names:
        if settings.device.type == "cuda":
            used[name] = memory.measure_on_gpu(_builder(op, case, name, settings.device))
            continue
        found = memory.measure_in_process(op.name, case.name, name, torch.get_num_threads())
        if found is not None:
            used[name] = found
    return used


def _builder(op: Operation, case: Case, provider: str, device: torch.device) -> Callable[[], Work]:
    return lambda: op.provider(provider).build(op.inputs(case.options, device, 0))


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of one case as text."""
    header = ("median ms", "20 %", "80 %", "x ours", "GB/s", "% copy", "state MiB", "peak MiB", "kernels", "error")
    lines = [f"  {'provider':<28}" + "".join(f"{name:>10}" for name in header)]
    for row in rows:
        ratio = store.ratio(row, rows)
        cells = (
            *(row[name] for name in ("median_ms", "p20_ms", "p80_ms")),
            "" if ratio is None else f"{ratio:.2f}",
            *(row[name] for name in ("gbps", "percent_copy", "state_mib", "peak_mib", "kernels", "error")),
        )
        name = row["provider"] + (" (graph)" if row["mode"] == "graph" else "")
        lines.append(f"  {name:<28}" + "".join(f"{cell or '-':>10}" for cell in cells))
    return "\n".join(lines)


def profile(op: Operation, case: Case, settings: Settings, kernels: bool) -> None:
    """Print where the time of our own step goes."""
    for provider in chosen_providers(op, settings):
        if settings.providers is None and provider.name != store.OURS:
            continue
        step = provider.build(op.inputs(case.options, settings.device, 0)).step
        print(f"{op.name}, {case.name}, {provider.name}")
        if kernels:
            print("\n".join(f"  kernel {name}" for name in timing.kernels_launched(step)))
        else:
            print(timing.profile_table(step, settings.device))


def list_everything() -> None:
    """Print operations, cases and providers."""
    for name in NAMES:
        op = operation(name)
        print(f"{name}: {op.title}")
        print("\n".join(f"  case {case.name}{' (small)' if case.small else ''}" for case in op.cases))
        print("\n".join(f"  provider {provider.name}" for provider in op.providers))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, store. Exit status 1 where a provider was wrong or the tests of an operation are not green."""
    options = parse(arguments)
    if options.list:
        list_everything()
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = environment(device)
    print(", ".join(f"{name} {value}" for name, value in where.items() if value))
    looking = options.profile or options.kernels
    ceilings = Ceilings(0.0, 0.0)
    if not looking:
        ceilings = measure_ceilings(device, scale=0.05 if options.quick else 1.0)
        print(f"measured ceilings: copy {ceilings.copy_gbps:.1f} GB/s, matmul {ceilings.matmul_gflops:.0f} GFLOP/s")
    good, rows = True, []
    for name in options.op or NAMES:
        op = operation(name)
        verified = False
        if not (options.no_verify or looking):
            verdict = run_tests(op, device)
            verified = verdict.green
            good &= verdict.green
            print(f"\n{name}: tests {'green' if verified else 'RED, no ratios'}: {verdict.summary}")
        settings = Settings(
            device,
            options.provider,
            options.repeats or (5 if options.quick else 30),
            options.graph,
            not (options.no_memory or options.quick),
            verified,
            options.seconds,
        )
        for case in chosen_cases(op, options.case, options.quick):
            if looking:
                profile(op, case, settings, options.kernels)
                continue
            print(f"\n{op.title}\n  {case.name}, {device.type}", flush=True)
            found, right = measure(op, case, settings, ceilings)
            good &= right
            found = [row | where for row in found]
            print(table(found), flush=True)
            rows += found
            if options.csv or not options.quick:
                store.save(found, options.csv or store.RESULTS)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
