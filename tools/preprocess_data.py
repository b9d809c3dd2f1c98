#!/usr/bin/env python3
"""Turn JSON-lines documents into an indexed dataset (PREFIX.bin, PREFIX.idx, PREFIX.json) for training.

Example:
  python tools/preprocess_data.py --input 'docs/*.jsonl.gz' --tokenizer models/dense --output data/train --workers 8 \\
      --holdout 0.05 --holdout-output data/valid

Exit codes: 0 done, 2 wrong arguments, 3 an input, the tokenizer or the output was refused (nothing is written then).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_skywork.data.preprocess import PreprocessOptions, Result, preprocess  # noqa: E402
from megatron_skywork.errors import EXIT_DONE, UserError  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", dest="inputs", action="append", nargs="+", metavar="PATTERN",
                        help="files, or quoted patterns (** goes into folders); .jsonl, .jsonl.gz or .jsonl.zst; may be repeated")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder with tokenizer.json or tokenizer.model, or one of these files")
    parser.add_argument("--output", metavar="PREFIX", help="prefix of the files to write")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize; the files are the same for any number (default 1)")
    parser.add_argument("--field", default="text", help="field of a line that holds the document (default text)")
    parser.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True,
                        help="end each document with the tokenizer's end-of-sequence id (default yes)")
    parser.add_argument("--eod-token", metavar="TOKEN", help="token that ends a document, where the tokenizer names none or another is wanted")
    parser.add_argument("--prepend-bos", action=argparse.BooleanOptionalAction, default=False,
                        help="begin each document with the tokenizer's beginning-of-sequence id (default no)")
    parser.add_argument("--on-bad-line", choices=("stop", "skip"), default="stop",
                        help="a damaged line or file: stop with its name and number, or skip and count (default stop)")
    parser.add_argument("--holdout", type=float, default=0.0, metavar="SHARE",
                        help="share of documents kept for validation, chosen by content, so copies stay together")
    parser.add_argument("--holdout-output", metavar="PREFIX", help="prefix of the held-out dataset")
    parser.add_argument("--seed", type=int, default=1234, help="another seed holds out other documents (default 1234)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--verify", metavar="PREFIX", help="instead of writing, read an existing dataset and compare its content with its side file")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on stdout")
    arguments = parser.parse_args()
    if arguments.verify is None:
        missing = [f"--{name}" for name in ("input", "tokenizer", "output") if not getattr(arguments, "inputs" if name == "input" else name)]
        if missing:
            parser.error(f"missing: {', '.join(missing)}")
    return arguments


def summary(result: Result) -> dict[str, object]:
    speed = round(result.num_tokens / result.seconds) if result.seconds else None
    return {"outputs": {prefix: dataclasses.asdict(side) for prefix, side in result.outputs.items()}, "counts": result.counts, "bad_lines": result.bad_lines,
            "tokens": result.num_tokens, "seconds": round(result.seconds, 3), "tokens_per_second": speed}


def print_result(result: Result) -> None:
    for prefix, side in result.outputs.items():
        print(f"{prefix}: {side.num_documents:,} documents, {side.num_tokens:,} tokens ({side.dtype}, largest id {side.largest_token_id})")
    left_out = ", ".join(f"{result.counts[name]:,} {name.replace('_', ' ')}" for name in ("empty_documents", "blank_lines", "bad_lines"))
    print(f"left out: {left_out}; {result.seconds:.1f} s, {result.num_tokens / max(result.seconds, 1e-9):,.0f} tokens/s")


def main() -> int:
    arguments = parse_arguments()
    try:
        if arguments.verify is not None:
            from megatron_skywork.data.indexed import verify_content

            side = verify_content(arguments.verify)
            text = f"{arguments.verify}: whole, {side.num_documents:,} documents, {side.num_tokens:,} tokens"
            print(json.dumps(dataclasses.asdict(side)) if arguments.json else text)
            return EXIT_DONE
        settings = {name: value for name, value in vars(arguments).items() if name not in ("inputs", "json", "verify")}
        result = preprocess(PreprocessOptions(inputs=[pattern for group in arguments.inputs for pattern in group], **settings))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps(summary(result)))
    else:
        print_result(result)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
