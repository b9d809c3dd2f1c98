"""benchmarks/preprocess.py on a small text and a stand-in for Megatron-LM: that it runs both, and notices other tokens. No time is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_samples import make_bpe_folder, sentences, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
# Takes the words Megatron-LM's tool takes and writes what it writes; `megatron_mark` is found only through the checkout on PYTHONPATH.
STAND_IN = """
import argparse, itertools, json, struct
import numpy
import tokenizers
import megatron_mark

parser = argparse.ArgumentParser()
for name in ("input", "tokenizer-type", "tokenizer-model", "output-prefix", "workers"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--append-eod", action="store_true")
arguments = parser.parse_args()
assert arguments.tokenizer_type == "HuggingFaceTokenizer" and arguments.workers == "2" and arguments.append_eod
tokenizer = tokenizers.Tokenizer.from_file(f"{arguments.tokenizer_model}/tokenizer.json")
lines = [json.loads(line)["text"] for line in open(arguments.input, encoding="utf-8")]
documents = [[*tokenizer.encode(text).ids, tokenizer.token_to_id("</s>")][WRONG:] for text in lines]
lengths = [len(document) for document in documents]
offsets = [0, *itertools.accumulate(2 * length for length in lengths)][:-1]
numpy.concatenate(documents).astype("<u2").tofile(f"{arguments.output_prefix}_text_document.bin")
with open(f"{arguments.output_prefix}_text_document.idx", "wb") as stream:
    stream.write(b"MMIDIDX\\0\\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1))
    for values, kind in ((lengths, "<i4"), (offsets, "<i8"), (range(len(lengths) + 1), "<i8")):
        stream.write(numpy.array(values, dtype=kind).tobytes())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_bpe_folder(tmp_path / "bpe")
    write_jsonl(tmp_path / "documents.jsonl", sentences(40))
    return tmp_path


def bench(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "preprocess.py"), "--repetitions", "1", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder)


def checkout(folder: Path, wrong: int) -> Path:
    (folder / "other" / "tools").mkdir(parents=True)
    (folder / "other" / "megatron_mark.py").write_text("")
    (folder / "other" / "tools" / "preprocess_data.py").write_text(STAND_IN.replace("WRONG", str(wrong)))
    return folder / "other"


def test_both_commands_run_and_write_the_same_tokens(folder: Path) -> None:
    done = bench(folder, "--input", "documents.jsonl", "--tokenizer", "bpe", "--workers", "2", "--megatron-lm", checkout(folder, wrong=0), "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    (size,) = json.loads(done.stdout)["sizes"]
    assert size["files_equal"] and size["text_bytes"] == sum(len(text.encode()) for text in sentences(40)) and size["tokens"] > 40
    ours, theirs = size["runs"]
    assert (ours["name"], theirs["name"]) == ("ours", "megatron-lm") and ours["workers"] == theirs["workers"] == 2
    assert size["ratio"]["median"] == pytest.approx(theirs["seconds"] / ours["seconds"], rel=0.02)
    assert size["ratio_processor"]["median"] == pytest.approx(theirs["cpu_seconds"] / ours["cpu_seconds"], rel=0.02)


def test_other_tokens_fail_the_benchmark(folder: Path) -> None:
    done = bench(folder, "--input", "documents.jsonl", "--tokenizer", "bpe", "--workers", "2", "--megatron-lm", checkout(folder, wrong=1))
    assert done.returncode == 1 and "files equal: NO" in done.stdout and "not write the same tokens" in done.stderr


def test_alone_it_measures_one_worker_and_many(folder: Path) -> None:
    done = bench(folder, "--megabytes", "0.2,0.6", "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout)["sizes"]
    assert [[run["workers"] for run in size["runs"]] for size in sizes] == [[1, 2], [1, 2]]
    assert all(size["files_equal"] and "ratio" not in size for size in sizes) and sizes[1]["text_bytes"] > sizes[0]["text_bytes"] >= 200_000


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--megatron-lm", "bpe"], "no checkout of Megatron-LM"), (["--workers", "0"], "1 or more"), (["--megabytes", "0"], "not above 0"),
     (["--input", "none.jsonl"], "none.jsonl"), (["--input", "a", "--megabytes", "1"], "one of them"),
     (["--input", "documents.jsonl", "--tokenizer", "none"], "no such file or folder")],
)  # fmt: skip
def test_wrong_arguments_are_answered_in_a_sentence(folder: Path, words: list[str], said: str) -> None:
    done = bench(folder, *words)
    assert done.returncode in (1, 2, 3) and said in done.stderr and "Traceback" not in done.stderr and not done.stdout
