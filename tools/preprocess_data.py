#!/usr/bin/env python3
"""Turn JSON-lines documents into an indexed dataset (PREFIX.bin, PREFIX.idx, PREFIX.json) for training.

Examples:
  python tools/preprocess_data.py --input 'docs/*.jsonl.gz' --tokenizer models/dense --output data/train --workers 8 \\
      --holdout 0.05 --holdout-output data/valid
  python tools/preprocess_data.py verify data/train data/valid          # is every byte what was written? (verify --help)

Exit codes: 0 done, 2 wrong arguments, 3 an input, the tokenizer or the output was refused (nothing is written then).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_skywork.convert.progress import Progress  # noqa: E402
from megatron_skywork.data.documents import BAD_LINE_REASONS, MAX_LINE_BYTES  # noqa: E402
from megatron_skywork.data.preprocess import PreprocessOptions, Result, preprocess  # noqa: E402
from megatron_skywork.data.verification import bytes_to_verify, verify_content  # noqa: E402
from megatron_skywork.errors import EXIT_DONE, EXIT_REFUSED, DataError, UserError  # noqa: E402

VERIFY = """Read datasets whole and compare every byte with what was written: finds a flipped bit, which the sizes checked at every start cannot.

PREFIX.json holds the SHA-256 of PREFIX.bin and PREFIX.idx, and of its own text. A pair that Megatron-LM wrote has no such file: then it is said that there is
no hash to compare, the .idx is checked against itself and against the .bin, and the largest token id is printed. Every dataset is looked at, whatever is wrong
with those before it.

Exit codes: 0 all are whole, 2 wrong arguments, 3 a dataset is missing or damaged.
"""


def parse_arguments(words: list[str]) -> argparse.Namespace:
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
                        help="a damaged line or file: stop with its name and number, or skip and count by reason (default stop)")
    parser.add_argument("--on-empty", choices=("stop", "skip"), default="skip", help="a document without a token: the same choice (default skip)")
    parser.add_argument("--max-line-bytes", type=int, default=MAX_LINE_BYTES, metavar="N",
                        help="a longer line is a bad line, and is never held in memory (default 64 MiB)")
    parser.add_argument("--holdout", type=float, default=0.0, metavar="SHARE",
                        help="share of documents kept for validation, chosen by content, so copies stay together")
    parser.add_argument("--holdout-output", metavar="PREFIX", help="prefix of the held-out dataset")
    parser.add_argument("--seed", type=int, default=1234, help="another seed holds out other documents (default 1234)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on stdout")
    arguments = parser.parse_args(words)
    missing = [f"--{name}" for name in ("input", "tokenizer", "output") if not getattr(arguments, "inputs" if name == "input" else name)]
    if missing:
        parser.error(f"missing: {', '.join(missing)}")
    return arguments


def summary(result: Result) -> dict[str, object]:
    speed = round(result.num_tokens / result.seconds) if result.seconds else None
    return {"outputs": {prefix: dataclasses.asdict(side) for prefix, side in result.outputs.items()}, "counts": result.counts, "left_out": result.left_out,
            "tokens": result.num_tokens, "seconds": round(result.seconds, 3), "tokens_per_second": speed}


def print_result(result: Result) -> None:
    for prefix, side in result.outputs.items():
        print(f"{prefix}: {side.num_documents:,} documents, {side.num_tokens:,} tokens ({side.dtype}, largest id {side.largest_token_id})")
    left_out = ", ".join(f"{result.counts[name]:,} {name.replace('_', ' ')}" for name in ("empty_documents", "blank_lines", "bad_lines"))
    reasons = ", ".join(f"{result.counts[name]:,} {name.replace('_', ' ')}" for name in BAD_LINE_REASONS if result.counts[name])
    print(f"left out: {left_out}{f' ({reasons})' if reasons else ''}; {result.seconds:.1f} s, {result.num_tokens / max(result.seconds, 1e-9):,.0f} tokens/s")


def verify(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="preprocess_data.py verify", description=VERIFY, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path of a dataset without .bin, .idx, .json")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each dataset on stdout, as a list")
    arguments = parser.parse_args(words)
    found: list[dict[str, object]] = []
    progress = Progress("verify", bytes_to_verify(arguments.prefixes))
    for prefix in arguments.prefixes:
        try:
            side = verify_content(prefix, progress)
        except DataError as error:
            found.append({"prefix": prefix, "whole": False, "problem": str(error)})
        else:
            found.append({"prefix": prefix, "whole": True, "hashes_compared": side.is_recorded, "documents": side.num_documents, "tokens": side.num_tokens,
                          "largest_token_id": side.largest_token_id, "tokenizer": side.tokenizer_name})
    progress.close()
    if arguments.json:
        print(json.dumps(found))
    for result in found:
        if not result["whole"]:
            print(f"error: {result['problem']}", file=sys.stderr)
        elif not arguments.json:
            how = "" if result["hashes_compared"] else f"; structure only: no {result['prefix']}.json, so there is no hash to compare"
            print(f"{result['prefix']}: whole, {result['documents']:,} documents, {result['tokens']:,} tokens, largest id {result['largest_token_id']}{how}")
    return EXIT_DONE if all(result["whole"] for result in found) else EXIT_REFUSED


def main(words: list[str]) -> int:
    if words[:1] == ["verify"]:
        return verify(words[1:])
    arguments = parse_arguments(words)
    try:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("inputs", "json")}
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
    sys.exit(main(sys.argv[1:]))
