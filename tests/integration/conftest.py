"""Commands are called as functions, and folders are made as the unit tests make them: both places are on the path before a test module is imported."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "unit")]
