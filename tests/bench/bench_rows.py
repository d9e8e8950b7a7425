"""A row of results for the tests of what reads them."""

from __future__ import annotations

import store


def row(provider: str = "hyperfast", **changes: str) -> dict[str, str]:
    base = dict.fromkeys(store.FIELDS, "")
    base |= {
        "op": "generate", "case": "small", "provider": provider, "device": "cpu", "mode": "eager", "median_ms": "2.0",
        "p20_ms": "1.9", "p80_ms": "2.2", "repeats": "5", "percent_copy": "50.0", "copy_gbps": "20", "peak_mib": "7",
        "matmul_gflops": "100", "verified": "yes", "processor": "A processor, 2 cores", "threads": "2", "torch": "2.13",
        "hyperfast": "0.1", "commit": "abc", "date": "2026-01-02T03:04:05Z",
    }  # fmt: skip
    return base | changes
