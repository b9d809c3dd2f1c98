"""Train a byte-level BPE tokenizer on JSONL documents: tokenizer.json and tokenizer_config.json, as data/tokenizers.py reads them.

The same documents give the same file. For small experiments: a model of a few million parameters has no use for a vocabulary of 50,000.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.errors import EXIT_DONE, DataError, UserError  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
BYTES = 256


def texts_of(paths: list[Path], field: str) -> Iterator[str]:
    """The text of every document.

    Raises:
        DataError: a file cannot be read, or a line is no document; with its number.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        yield json.loads(line)[field]
                    except (ValueError, KeyError, TypeError) as error:
                        raise DataError(f"{path}, line {number}: expected a JSON object with a field {field!r}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def train(texts: Iterator[str], vocab_size: int, out: Path) -> int:
    """Write the tokenizer's two files into `out`.

    Returns:
        entries of the vocabulary, the end-of-text token among them.

    Raises:
        DataError: the text is too short for so many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All bytes are in the vocabulary from the start, so no text is unknown.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise DataError(f"the text yields {found} entries and --vocab-size is {vocab_size}; give more text, or a smaller vocabulary")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL documents")
    parser.add_argument("--field", default="text", help="field of a line that holds the document (default text)")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help=f"entries, {BYTES} bytes and the end-of-text token among them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tokenizer.json and tokenizer_config.json")
    args = parser.parse_args(argv)
    if args.vocab_size <= BYTES:
        parser.error(f"--vocab-size {args.vocab_size}: at least {BYTES + 1}")
    try:
        entries = train(texts_of(args.input, args.field), args.vocab_size, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.out}: {entries} entries")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
