#!/usr/bin/env python3
"""Speed of preprocessing on text every Python has: the sources of its standard library.

Prints one JSON object: tokens and bytes per second with 1 and with N workers, start of the workers included, and whether the files were equal.
Without --tokenizer a byte-level BPE of 8192 tokens is trained on a part of the text first (not timed).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_skywork.data.preprocess import PreprocessOptions, preprocess  # noqa: E402
from megatron_skywork.errors import UserError  # noqa: E402


def write_documents(path: Path, megabytes: float) -> int:
    """Standard-library sources as JSON lines, repeated up to the size asked for; bytes of text written."""
    sources = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    written = 0
    with open(path, "w", encoding="utf-8") as stream:
        while written < megabytes * 1e6:
            for text in sources:
                stream.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode("utf-8"))
                if written >= megabytes * 1e6:
                    break
    return written


def train_tokenizer(documents: Path, folder: Path) -> Path:
    """A byte-level BPE of 8192 tokens from the first 200 documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    with open(documents, encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line, _ in zip(stream, range(200), strict=False)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8192, special_tokens=["</s>"], show_progress=False))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", metavar="PATH", help="folder or file of the tokenizer")
    parser.add_argument("--megabytes", type=float, default=32.0, help="text to tokenize (default 32)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes of the second measurement (default: all cores)")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            num_bytes = write_documents(folder / "documents.jsonl", arguments.megabytes)
            tokenizer = arguments.tokenizer or str(train_tokenizer(folder / "documents.jsonl", folder / "tokenizer"))
            runs, hashes = [], set()
            for workers in dict.fromkeys((1, arguments.workers)):
                output = str(folder / f"out{workers}")
                options = PreprocessOptions(inputs=[str(folder / "documents.jsonl")], tokenizer=tokenizer, output=output, workers=workers)
                result = preprocess(options, stream=io.StringIO())
                hashes.add((result.outputs[output].bin_sha256, result.outputs[output].idx_sha256))
                runs.append({"workers": workers, "seconds": round(result.seconds, 3), "tokens": result.num_tokens,
                             "tokens_per_second": round(result.num_tokens / result.seconds), "bytes_per_second": round(num_bytes / result.seconds)})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"benchmark": "preprocess", "text_bytes": num_bytes, "runs": runs, "files_equal": len(hashes) == 1,
                      "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
