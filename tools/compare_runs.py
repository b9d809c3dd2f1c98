"""Compare two runs number for number: the losses and gradient norms of their steps, and the tensors of a checkpoint.

What a refactor must leave unchanged, and what a resumed run must have in common with one that never stopped, is equality, not closeness:
the default tolerance is 0. Steps that a run did twice (it died after them and did them again) count as it did them last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.errors import EXIT_DONE, EXIT_OTHER, DataError, UserError  # noqa: E402

FIELDS = ("loss", "grad_norm", "learning_rate", "tokens")


def steps_of(run_dir: Path) -> dict[int, dict]:
    """Step -> its last record in the run's metrics.jsonl.

    Raises:
        DataError: there is no such file, or a line of it is not JSON.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the folder of a run")
    steps = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        if record.get("kind") == "step":
            steps[record["step"]] = record
    return steps


def compare_steps(a: dict[int, dict], b: dict[int, dict], first: int, last: int | None, fields: tuple[str, ...], tolerance: float) -> dict:
    """Differences of the steps both runs have, from `first` to `last`.

    Returns:
        steps: the compared step numbers; largest: field -> largest relative difference; differing: steps with any field beyond the tolerance.
    """
    shared = [step for step in sorted(set(a) & set(b)) if step >= first and (last is None or step <= last)]
    largest = dict.fromkeys(fields, 0.0)
    differing = []
    for step in shared:
        beyond = False
        for name in fields:
            x, y = a[step].get(name), b[step].get(name)
            if x is None or y is None:
                beyond |= x is not y
                continue
            gap = abs(x - y) / max(abs(x), abs(y)) if x != y else 0.0
            largest[name] = max(largest[name], gap)
            beyond |= not gap <= tolerance
        if beyond:
            differing.append(step)
    return {"steps": shared, "largest_relative_difference": largest, "differing_steps": differing}


def checkpoint_items(folder: Path) -> dict[str, str]:
    """Name -> what it holds: every item of a distributed checkpoint, else every file of tensors by the SHA-256 of its bytes."""
    if (folder / ".metadata").is_file():
        from megatron_skywork.convert.check.item_digests import item_digests  # imports torch

        return item_digests(folder)
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".distcp", ".safetensors"})
    if not files:
        raise DataError(f"{folder} holds no tensor files")
    return {str(path.relative_to(folder)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def compare_checkpoints(a: Path, b: Path) -> dict:
    """Whether two checkpoints hold the same, item by item."""
    left, right = checkpoint_items(a), checkpoint_items(b)
    return {"items": len(left), "differing_items": sorted(name for name in set(left) | set(right) if left.get(name) != right.get(name))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], epilog="exit code 0: equal; 1: not equal; 3: nothing to compare")
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN_DIR", help="two run folders")
    parser.add_argument("--first", type=int, default=1, help="first step that is compared (default 1)")
    parser.add_argument("--last", type=int, help="last step that is compared (default: the last both have)")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest relative difference that counts as equal (default 0)")
    parser.add_argument("--checkpoint-step", type=int, help="also compare both runs' checkpoints of this step, bit for bit")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    try:
        a, b = (steps_of(run) for run in args.runs)
        result = compare_steps(a, b, args.first, args.last, FIELDS, args.tolerance)
        if not result["steps"]:
            ends = [max(steps, default=0) for steps in (a, b)]
            raise DataError(f"no step from {args.first} to {args.last or 'the end'} is in both runs; their last steps are {ends[0]} and {ends[1]}")
        result["equal"] = not result["differing_steps"]
        if args.checkpoint_step is not None:
            folders = [run / "checkpoints" / f"step_{args.checkpoint_step:08d}" for run in args.runs]
            result["checkpoint"] = compare_checkpoints(*folders)
            result["equal"] = result["equal"] and not result["checkpoint"]["differing_items"]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result) if args.json else describe(result))
    return EXIT_DONE if result["equal"] else EXIT_OTHER


def describe(result: dict) -> str:
    """The result as a few lines of text."""
    steps = result["steps"]
    lines = [f"steps {steps[0]} to {steps[-1]} ({len(steps)} compared): " + ("different" if result["differing_steps"] else "equal")]
    if result["differing_steps"]:
        lines.append(f"  first different step: {result['differing_steps'][0]}")
        lines += [f"  {name}: largest relative difference {gap:.3g}" for name, gap in result["largest_relative_difference"].items()]
    if "checkpoint" in result:
        differing = result["checkpoint"]["differing_items"]
        verdict = f"different: {', '.join(differing)}" if differing else "equal bit for bit"
        lines.append(f"checkpoint: {result['checkpoint']['items']} items, {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
