"""Text for the demo: JSONL documents from what every Python installation has, a share of them held out.

Two documents per module of the standard library: its source, and its docstrings put together. Which documents are held out is a function of the
module's name alone, so a module's source and its docstrings are on the same side, and the split is the same every time.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.errors import EXIT_DONE, DataError, UserError  # noqa: E402

# Third parties, tests, and tables that are no text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__", "__phello__"}
HELD_OUT_DENOMINATOR = 1 << 32


def standard_library(folder: Path) -> Iterator[tuple[str, str]]:
    """(module, text) for each document, in the order of the paths."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if LEFT_OUT & set(name.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue  # templates and files kept broken on purpose
        if not source.strip():
            continue
        yield str(name), source
        docstrings = docstrings_of(tree, name.with_suffix("").as_posix().replace("/", "."))
        if docstrings:
            yield str(name), docstrings


def docstrings_of(tree: ast.Module, module: str) -> str:
    """The docstrings of a module as one text: a heading per class and function, then what it says."""
    parts = [f"Module {module}\n\n{text}"] if (text := ast.get_docstring(tree)) else []
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            parts.append(f"{kind} {node.name}\n\n{text}")
    return "\n\n\n".join(parts) + "\n" if parts else ""


def is_held_out(key: str, share: float) -> bool:
    """Whether a document belongs to the held-out part: decided by its key alone."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < share * HELD_OUT_DENOMINATOR


def write(documents: Iterator[tuple[str, str]], out: Path, share: float, min_bytes: int) -> dict[str, int]:
    """Write `train.jsonl` and `valid.jsonl`.

    Returns:
        counts: documents and bytes of text of each file.

    Raises:
        DataError: there is too little text, or one of the files would be empty.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = {"train_documents": 0, "train_bytes": 0, "valid_documents": 0, "valid_bytes": 0}
    with (out / "train.jsonl").open("w", encoding="utf-8") as train, (out / "valid.jsonl").open("w", encoding="utf-8") as valid:
        for key, text in documents:
            side = "valid" if is_held_out(key, share) else "train"
            (valid if side == "valid" else train).write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            counts[f"{side}_documents"] += 1
            counts[f"{side}_bytes"] += len(text.encode())
    total = counts["train_bytes"] + counts["valid_bytes"]
    if total < min_bytes:
        found = f"{total / 1e6:.1f} MB of text found, and {min_bytes / 1e6:.1f} MB are wanted"
        raise DataError(f"{found}; take your own documents instead: make demo DATA='DIR/*.jsonl'")
    for side in ("train", "valid"):
        if not counts[f"{side}_documents"]:
            raise DataError(f"no document fell into the {side} part of {total} bytes of text; give more documents, or another --held-out")
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that receives train.jsonl and valid.jsonl")
    parser.add_argument("--held-out", type=float, default=0.05, metavar="SHARE", help="share of the documents that is kept out of training (default 0.05)")
    parser.add_argument("--min-megabytes", type=float, default=8.0, help="least text that is wanted (default 8)")
    args = parser.parse_args(argv)
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out {args.held_out}: a share between 0 and 1")
    try:
        counts = write(standard_library(Path(sysconfig.get_paths()["stdlib"])), args.out, args.held_out, min_bytes=int(args.min_megabytes * 1e6))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(counts))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
