"""Convert checkpoints between Hugging Face folders and ours, say what one is, and compare an upcycled one with its dense source.

    python tools/convert_checkpoint.py import --hf HF_DIR --out DIR              dense, Skywork-MoE or Mixtral -> ours
    python tools/convert_checkpoint.py export --checkpoint DIR --out HF_DIR      ours (weights-only or saved by training) -> Hugging Face
    python tools/convert_checkpoint.py inspect DIR                               either kind
    python tools/convert_checkpoint.py verify-upcycle --dense HF_DIR --checkpoint DIR

Exit codes: 0 done, 2 a wrong argument, 3 a checkpoint was refused or the comparison failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.errors import EXIT_DONE, EXIT_OTHER, EXIT_REFUSED, UserError  # noqa: E402


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{import,export,inspect,verify-upcycle}")

    command = commands.add_parser("import", help="Hugging Face folder -> our weights-only folder", allow_abbrev=False)
    command.add_argument("--hf", required=True, metavar="HF_DIR", help="folder with config.json and weights")
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write; absent or complete, never half")
    command.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --out")

    command = commands.add_parser("export", help="our folder -> Hugging Face folder", allow_abbrev=False)
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="weights-only folder, or a step_... folder of a run")
    command.add_argument("--out", required=True, metavar="HF_DIR", help="folder to write; absent or complete, never half")
    formats = ["auto", "skywork_moe", "mixtral", "llama", "mistral", "qwen2", "qwen3"]
    command.add_argument("--format", default="auto", choices=formats, help="Hugging Face model type (default: what fits; skywork_moe for mixtures)")
    command.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: as stored; else cast all but a router stored in fp32")
    command.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer files (default: the checkpoint's own)")
    command.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --out")

    command = commands.add_parser("inspect", help="layout, parameters, dtype, experts, step", allow_abbrev=False)
    command.add_argument("checkpoint", metavar="DIR", help="Hugging Face folder or one of ours")
    command.add_argument("--no-similarity", action="store_true", help="leave out the similarity of experts, which reads every expert")

    command = commands.add_parser("verify-upcycle", help="compare an upcycled checkpoint with its dense source", allow_abbrev=False)
    command.add_argument("--dense", required=True, metavar="HF_DIR", help="the dense Hugging Face folder")
    command.add_argument("--checkpoint", "--moe", required=True, metavar="DIR", help="the upcycled folder")
    command.add_argument("--tokens", type=int, default=256, metavar="N", help="tokens to compare on (default 256)")
    command.add_argument("--text", metavar="TEXT", help="text to compare on (default: random tokens)")
    command.add_argument("--precision", default="fp32", choices=["fp32", "fp64"], help="what to compute in (default fp32)")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command's result as a dictionary."""
    if arguments.command == "import":
        from megatron_skywork.convert.import_hf import import_hf

        return import_hf(arguments.hf, arguments.out, arguments.overwrite, sys.stderr)
    if arguments.command == "export":
        from megatron_skywork.convert.export_hf import export_hf

        chosen = {"family": arguments.format, "dtype": arguments.dtype, "tokenizer": arguments.tokenizer, "overwrite": arguments.overwrite}
        return export_hf(arguments.checkpoint, arguments.out, **chosen, progress=sys.stderr)
    if arguments.command == "inspect":
        from megatron_skywork.convert.inspect_folder import inspect_folder

        return inspect_folder(arguments.checkpoint, not arguments.no_similarity)
    from megatron_skywork.convert.checkpoint_folder import describe as describe_folder
    from megatron_skywork.convert.verify import compare, tokens_for

    vocab_size = describe_folder(arguments.checkpoint)[0].vocab_size
    tokens = tokens_for(arguments.dense, vocab_size, arguments.text, arguments.tokens)
    return compare(arguments.dense, arguments.checkpoint, tokens, progress=sys.stderr, precision=arguments.precision)


def describe(result: dict[str, Any], indent: str = "") -> str:
    """A result as lines `name: value`."""
    lines = []
    for name, value in result.items():
        if value is None or value == []:
            continue
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", describe(value, indent + "  ")]
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else value
            lines.append(f"{indent}{name}: {', '.join(map(str, shown)) if isinstance(shown, list) else shown}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parse(words)
    try:
        result = run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return EXIT_OTHER
    print(json.dumps(result) if arguments.json else describe(result))
    return EXIT_REFUSED if result.get("passed") is False else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
