"""Write the report of a training run: one self-contained HTML page, and its plots as PNG files.

python tools/report.py runs/demo                     -> runs/demo/report.html and runs/demo/report/*.png
python tools/report.py runs/a runs/b --out ab.html   -> both runs on one page, curves over each other
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_skywork.errors import EXIT_DONE, UserError  # noqa: E402 - the package may not be installed
from megatron_skywork.report.build import build_report  # noqa: E402
from megatron_skywork.report.load import read_summary  # noqa: E402
from megatron_skywork.report.prediction import comparison_lines  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    codes = "Exit codes: 0 written, 2 wrong usage or matplotlib missing, 3 no data."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=codes)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run, with metrics.jsonl; several are compared")
    parser.add_argument("--out", metavar="FILE", help="the HTML file (default: report.html in the run's folder; comparison.html in the first one for several)")
    parser.add_argument(
        "--summary", metavar="FILE", help="a demonstration's summary.json to show at the top (default: the one in the run's folder or above it)"
    )
    parser.add_argument(
        "--cluster", metavar="FILE", help="the machine the run ran on (configs/clusters, or what tools/calibrate.py wrote), to show its predicted speed too"
    )
    parser.add_argument("--json", action="store_true", help="print what was written, the key figures and the findings as JSON")
    arguments = parser.parse_args(argv)
    try:
        report = build_report(arguments.run_dirs, arguments.out, read_summary(arguments.summary) if arguments.summary else None, arguments.cluster)
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps({"report": str(report.path), "figures": [str(figure) for figure in report.figures], "runs": report.runs}, indent=2))
        return EXIT_DONE
    for run, comparison in zip(report.runs, report.comparisons, strict=True):
        for finding in run["findings"]:
            if finding["level"] == "warn":
                print(f"{run['name']}: {finding['text']}")
        if comparison.rows:
            print("\n".join([f"{run['name']}:", *(f"  {line}" for line in comparison_lines(comparison))]))
    print(f"{report.path} ({len(report.figures)} plots in {report.path.with_suffix('')})")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
