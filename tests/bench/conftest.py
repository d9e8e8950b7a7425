"""The benchmark modules are scripts in bench/, not a package: they find each other through sys.path."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

sys.path += [str(ROOT / "bench"), str(Path(__file__).parent)]
