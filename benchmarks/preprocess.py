#!/usr/bin/env python3
"""How fast tools/preprocess_data.py turns text into tokens; and, with --megatron-lm, Megatron-LM's own tools/preprocess_data.py on the same text.

The text is what every Python has, the sources of its standard library (about 30 MB; more is a repetition), or a file given with --input. Without
--tokenizer a byte-level BPE of 8192 tokens is trained on a part of the text first (not timed).

Both are whole commands, start of Python and imports included, with the same tokenizer, the same number of workers and end-of-document tokens. They run in
turns, the order turned round every round, after a round that is not counted, and their .bin and .idx files must be equal byte for byte. Tokens per second are
by the clock, which other programs on the machine disturb; tokens per second of processor time, of all processes together, stand beside: they are steadier.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import shlex
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from costs import Cost, run_command, spread  # noqa: E402

from megatron_skywork.data.indexed import paths_of, read_side_file  # noqa: E402
from megatron_skywork.errors import ConfigError, UserError  # noqa: E402

OURS, THEIRS = "ours", "megatron-lm"
THEIR_SUFFIX = "_text_document"
END = "<|endoftext|>"  # in no text: Megatron-LM reads a control token out of a text, ours reads its characters


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_documents(path: Path, megabytes: float) -> int:
    """Standard-library sources as JSON lines, repeated where there are not enough; bytes of text written."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
    written = 0
    with open(path, "w", encoding="utf-8") as stream:
        while written < megabytes * 1e6:
            for source in sources:
                text = source.read_text(encoding="utf-8", errors="replace")
                if not text:  # an empty document: Megatron-LM keeps a place for it in the index, ours leaves it out
                    continue
                stream.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode("utf-8"))
                if written >= megabytes * 1e6:
                    break
    return written


def count_bytes(path: Path) -> int:
    """Bytes of text in a file of JSON lines.

    Raises:
        ConfigError: it cannot be read, or has no texts.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            return sum(len(json.loads(line)["text"].encode("utf-8")) for line in stream)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--input {path}: not JSON lines with a field text ({error})") from error


def train_tokenizer(documents: Path, folder: Path) -> Path:
    """A byte-level BPE of 8192 tokens from the first 200 documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    with open(documents, encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line, _ in zip(stream, range(200), strict=False)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8192, special_tokens=[END], initial_alphabet=alphabet, show_progress=False))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


class Bench:
    """The commands under test, and the folder they work in."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self.folder, self.documents = arguments, folder, arguments.input or folder / "documents.jsonl"
        self.tokenizer = arguments.tokenizer

    def run(self, name: str, workers: int) -> Cost:
        """One command to its end.

        Raises:
            UserError: it failed.
        """
        cost = self._ours(workers) if name == OURS else self._theirs(workers)
        if cost.exit_code:
            raise UserError(f"{name} ended with exit code {cost.exit_code}:\n{cost.errors[-2000:]}")
        return cost

    def prefix(self, name: str, workers: int) -> str:
        """Of the files a command writes."""
        return str(self.folder / f"{name}{workers}")

    def _ours(self, workers: int) -> Cost:
        words = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(self.documents), "--tokenizer", str(self.tokenizer)]
        return run_command([*words, "--output", self.prefix(OURS, workers), "--workers", str(workers), "--overwrite"])

    def _theirs(self, workers: int) -> Cost:
        checkout = self.arguments.megatron_lm
        words = [self.arguments.megatron_python, str(checkout / "tools" / "preprocess_data.py"), "--input", str(self.documents), "--append-eod"]
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.tokenizer)]
        words += ["--output-prefix", self.prefix(THEIRS, workers), "--workers", str(workers)]
        # The checkout's own megatron-core, whatever is installed; and no question to a model hub.
        return run_command(words, environment={**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"})

    def files(self, name: str, workers: int) -> list[Path]:
        """The .bin and the .idx a command wrote."""
        paths = paths_of(self.prefix(name, workers) + (THEIR_SUFFIX if name == THEIRS else ""))
        return [paths["bin"], paths["idx"]]


def measure_size(bench: Bench, megabytes: float | None) -> dict[str, Any]:
    """All commands on one text, in turns; speeds, ratios of runs of one round, and whether all wrote the same files."""
    arguments = bench.arguments
    num_bytes = count_bytes(bench.documents) if megabytes is None else write_documents(bench.documents, megabytes)
    if bench.tokenizer is None:
        bench.tokenizer = train_tokenizer(bench.documents, bench.folder / "tokenizer")
    commands = [(OURS, count) for count in sorted({1, arguments.workers})]
    if arguments.megatron_lm:
        commands = [(name, arguments.workers) for name in (OURS, THEIRS)]
    costs: dict[tuple[str, int], list[Cost]] = {command: [] for command in commands}
    for turn in range(arguments.repetitions + 1):
        for name, workers in commands if turn % 2 else reversed(commands):
            cost = bench.run(name, workers)
            say(f"{num_bytes / 1e6:.0f} MB, round {turn}{'' if turn else ' (not counted)'}, {name} with {workers} workers: "
                f"{cost.seconds:.1f} s, {cost.cpu_seconds:.1f} s of processor")  # fmt: skip
            if turn:
                costs[name, workers].append(cost)
    first = bench.files(*commands[0])
    equal = all(filecmp.cmp(one, other, shallow=False) for command in commands[1:] for one, other in zip(first, bench.files(*command), strict=True))
    tokens = read_side_file(bench.prefix(*commands[0])).num_tokens
    runs = [speeds(name, workers, tokens, costs[name, workers]) for name, workers in commands]
    found: dict[str, Any] = {"text_bytes": num_bytes, "tokens": tokens, "runs": runs, "files_equal": equal}
    if arguments.megatron_lm:
        pairs = list(zip(*(costs[command] for command in commands), strict=True))
        found["ratio"] = spread([theirs.seconds / ours.seconds for ours, theirs in pairs])
        found["ratio_processor"] = spread([theirs.cpu_seconds / ours.cpu_seconds for ours, theirs in pairs])
    return found


def speeds(name: str, workers: int, tokens: int, costs: list[Cost]) -> dict[str, Any]:
    """Medians of one command."""
    seconds, cpu_seconds = (statistics.median(getattr(cost, key) for cost in costs) for key in ("seconds", "cpu_seconds"))
    return {"name": name, "workers": workers, "seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3), "tokens_per_second": round(tokens / seconds),
            "tokens_per_cpu_second": round(tokens / cpu_seconds)}  # fmt: skip


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result as a person reads it."""
    yield (f"medians of {result['repetitions']} rounds after one that is not counted; {result['cores']} cores, Python {result['python']}; "
           "processor: of all processes of a command together")  # fmt: skip
    yield f"{'MB':>6}{'tokens':>13}  {'':12}{'workers':>8}{'s':>8}{'tokens/s':>12}{'processor s':>13}{'tokens/s of it':>16}"
    for size in result["sizes"]:
        for run in size["runs"]:
            yield (f"{size['text_bytes'] / 1e6:6.0f}{size['tokens']:13,}  {run['name']:12}{run['workers']:8}{run['seconds']:8.1f}{run['tokens_per_second']:12,}"
                   f"{run['cpu_seconds']:13.1f}{run['tokens_per_cpu_second']:16,}")  # fmt: skip
        for key, name in (("ratio", "by the clock"), ("ratio_processor", "by processor time")):
            if key in size:
                yield f"{'':21}times Megatron-LM's speed, {name}: {{median:.2f}} ({{min:.2f}} .. {{max:.2f}})".format(**size[key])
        yield f"{'':21}files equal: {'yes' if size['files_equal'] else 'NO'}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of a Hugging Face tokenizer (default: one is trained)")
    parser.add_argument("--megabytes", type=sizes, metavar="N,M", help="sizes of the text, one measurement each (default 10,30)")
    parser.add_argument("--input", type=Path, metavar="FILE", help="JSON lines with a field text, plain, instead of the standard library")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
                        help="processes that tokenize (default: all cores; without --megatron-lm also one)")  # fmt: skip
    parser.add_argument("--repetitions", type=int, default=4, metavar="N", help="rounds that count, after one that does not (default 4: 2 in either order)")
    parser.add_argument("--megatron-lm", type=Path, metavar="DIR", help="checkout of Megatron-LM to measure beside it")
    parser.add_argument("--megatron-python", default=sys.executable, metavar="FILE", help="Python that has what Megatron-LM needs (default: this one)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    arguments = parser.parse_args()
    if min(arguments.workers, arguments.repetitions) < 1:
        parser.error("--workers and --repetitions must be 1 or more")
    if arguments.input and arguments.megabytes:
        parser.error("--input and --megabytes: give one of them")
    if arguments.megatron_lm and not (arguments.megatron_lm / "tools" / "preprocess_data.py").is_file():
        parser.error(f"--megatron-lm {arguments.megatron_lm}: no checkout of Megatron-LM (it has no tools/preprocess_data.py)")
    arguments.megabytes = [None] if arguments.input else arguments.megabytes or [10.0, 30.0]
    return arguments


def sizes(text: str) -> list[float]:
    """`10,30` as numbers above zero."""
    found = [float(part) for part in text.split(",")]
    if not min(found) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} has a size that is not above 0")
    return found


def main() -> int:
    arguments = parse()
    try:
        with tempfile.TemporaryDirectory(prefix="preprocess-benchmark-") as name:
            bench = Bench(arguments, Path(name))
            measured = [measure_size(bench, megabytes) for megabytes in arguments.megabytes]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 1
    result = {"benchmark": "preprocess", "command": shlex.join(["python", *sys.argv]), "cpu": platform.processor() or platform.machine(),
              "cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version(), "repetitions": arguments.repetitions,
              "sizes": measured}  # fmt: skip
    print(json.dumps(result) if arguments.json else "\n".join(table(result)))
    if not all(size["files_equal"] for size in measured):
        print("error: the commands did not write the same tokens", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
