#!/usr/bin/env python3
"""`make faults`: everything that is done to this framework on purpose, and what it lost. One table, and JSON.

    python tests/faults/suite.py [--short] [--only WORD] [--json FILE]

Exit code 0 when nothing was lost, nothing was believed that was wrong, and every control found what it must find.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parents[1], HERE.parent, HERE.parent / "unit", HERE.parent / "distributed", HERE):
    sys.path.insert(0, str(folder))

from fault import CannotBeTried, Fault, Outcome, passed, timed  # noqa: E402


def all_faults() -> list[Fault]:
    """Every fault of every module beside this one, in the order of their names."""
    modules = sorted(path.stem for path in HERE.glob("*_faults.py") if path.name != "test_faults.py")
    return [fault for name in modules for fault in importlib.import_module(name).FAULTS]


def run(faults: list[Fault], short: bool) -> list[dict[str, Any]]:
    """Inject one after the other, each in a folder of its own, and say how far it is."""
    rows = []
    for number, fault in enumerate(faults, start=1):
        print(f"[{number}/{len(faults)}] {fault.name}", file=sys.stderr, flush=True)
        if fault.needs is not None and shutil.which(fault.needs) is None:
            rows.append({"fault": fault.name, "skipped": f"{fault.needs} is not installed"})
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome, seconds = timed(fault, Path(folder), short)
            except CannotBeTried as reason:
                rows.append({"fault": fault.name, "skipped": str(reason)})
                continue
            except Exception as failure:
                outcome, seconds = Outcome(lost=[f"the suite itself failed: {failure!r}"]), 0.0
        rows.append(
            {
                "fault": fault.name, "control": fault.is_control, "tried": outcome.tried, "survived": outcome.survived, "lost": outcome.lost,
                "note": outcome.note, "passed": passed(fault, outcome), "seconds": round(seconds, 1),
            }
        )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table, what was lost below it."""
    lines = ["| fault | tried | survived | lost | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['fault']} | | | | **SKIPPED: {row['skipped']}** |")
            continue
        verdict = ("must be lost: caught" if row["control"] else "") if row["passed"] else "**FAILED**"
        lines.append(f"| {row['fault']} | {row['tried']} | {row['survived']} | {len(row['lost'])} | {'; '.join(filter(None, [verdict, row['note']]))} |")
    failed = [row for row in rows if not row.get("passed", True)]
    nothing = ["nothing was tried, or nothing was lost where this control must lose something"]
    for row in failed:
        lines += [f"{row['fault']}:", *(f"  {line}" for line in (row["lost"][:10] if row["lost"] and not (row["control"] and row["tried"]) else nothing))]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--short", action="store_true", help="a sample of each, as the tests do")
    parser.add_argument("--only", metavar="WORD", help="faults whose name has this word")
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of processes that are started here
    faults = [fault for fault in all_faults() if arguments.only is None or arguments.only in fault.name]
    faults = [fault for fault in faults if fault.in_short or not arguments.short]
    if not faults:
        parser.error(f"--only {arguments.only}: no fault has that word; --list shows all")
    if arguments.list:
        print("\n".join(fault.name for fault in faults))
        return 0
    warnings.filterwarnings("ignore")  # libraries' advice to their own developers
    started = time.monotonic()
    rows = run(faults, arguments.short)
    print("\n".join(table(rows)))
    done = [row for row in rows if "skipped" not in row]
    lost = sum(len(row["lost"]) for row in done if not row["control"])
    skipped = f", {len(rows) - len(done)} SKIPPED" if len(done) < len(rows) else ""
    print(f"{sum(row['tried'] for row in done)} injections of {len(done)} faults{skipped}, {lost} losses, {time.monotonic() - started:.0f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"short": arguments.short, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["passed"] for row in done) else 1


if __name__ == "__main__":
    sys.exit(main())
