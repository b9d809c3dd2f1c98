"""Convert checkpoints between Hugging Face folders and ours, say what one is, and whether it is what it should be.

    python tools/convert_checkpoint.py import --hf HF_DIR --out DIR              dense, Skywork-MoE, Mixtral, Qwen2-MoE, Qwen3-MoE, GGUF -> ours
    python tools/convert_checkpoint.py export --checkpoint DIR --out HF_DIR      ours (weights-only or saved by training) -> Hugging Face
    python tools/convert_checkpoint.py reshard --checkpoint DIR --out DIR --tp 8 ours -> ours, weights only, cut for a layout
    python tools/convert_checkpoint.py inspect DIR                               what a folder is; either kind
    python tools/convert_checkpoint.py verify DIR                                whether it is what its manifest says; either kind
    python tools/convert_checkpoint.py verify-upcycle --dense PLACE --checkpoint DIR

An interrupted import, export or reshard goes on where it stopped when it is given again. Under torchrun the ranks of all nodes share its work.
Exit codes: 0 done, 2 a wrong argument, 3 a checkpoint was refused, is not what it should be, or differs from what it is compared with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from tool_main import finish, lines  # noqa: E402


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{import,export,reshard,inspect,verify,verify-upcycle}")
    add_writers(commands)
    add_readers(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(words)


def add_writers(commands: Any) -> None:
    """Commands that write a folder."""
    command = commands.add_parser("import", help="Hugging Face folder -> our weights-only folder", allow_abbrev=False)
    command.add_argument("--hf", required=True, metavar="PLACE", help="folder with config.json and weights, or a .gguf file")
    writers = [command]

    command = commands.add_parser("export", help="our folder -> Hugging Face folder", allow_abbrev=False)
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="weights-only folder, or a step_... folder of a run")
    formats = ["auto", "skywork_moe", "mixtral", "qwen2_moe", "qwen3_moe", "llama", "mistral", "qwen2", "qwen3"]
    command.add_argument("--format", default="auto", choices=formats, help="Hugging Face model type (default: what fits; skywork_moe for mixtures)")
    command.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer files (default: the checkpoint's own)")
    writers.append(command)

    command = commands.add_parser("reshard", help="our folder -> the same weights, cut for a layout, without optimizer state", allow_abbrev=False)
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="weights-only folder, or a step_... folder of a run")
    command.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel degree to cut for (default 1: whole)")
    command.add_argument("--etp", type=int, default=1, metavar="N", help="the same inside experts (default 1)")
    writers.append(command)

    for command in writers[1:]:
        said = "auto: as stored; else cast all but a router stored in fp32"
        command.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help=said)
    for command in writers:
        command.add_argument("--out", required=True, metavar="DIR", help="folder to write; absent or complete, never half")
        command.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --out")
        command.add_argument("--check-finite", action="store_true", help="refuse a source that has NaN or infinite numbers")
        command.add_argument("--workers", type=int, default=2, metavar="N", help="files written at the same time (default 2)")


def add_readers(commands: Any) -> None:
    """Commands that look at a folder."""
    command = commands.add_parser("inspect", help="layout, parameters, dtype, experts, step, manifest", allow_abbrev=False)
    command.add_argument("checkpoint", metavar="DIR", help="Hugging Face folder or one of ours")
    command.add_argument("--no-similarity", action="store_true", help="leave out the similarity of experts, which reads every expert")

    command = commands.add_parser("verify", help="every file against the manifest, every tensor against the model", allow_abbrev=False)
    command.add_argument("checkpoint", metavar="DIR", help="Hugging Face folder or one of ours")
    command.add_argument("--source", action="append", metavar="PLACE", help="also: is it made from this? Repeat for several")
    command.add_argument("--finite", action="store_true", help="also: read every number, and name tensors with NaN or infinite ones")

    command = commands.add_parser("verify-upcycle", help="compare an upcycled checkpoint with its dense source", allow_abbrev=False)
    command.add_argument("--dense", required=True, metavar="PLACE", help="the dense model")
    command.add_argument("--checkpoint", "--moe", required=True, metavar="DIR", help="the upcycled folder, of either kind")
    command.add_argument("--tokens", type=int, default=256, metavar="N", help="tokens to compare on (default 256)")
    command.add_argument("--text", metavar="TEXT", help="text to compare on (default: a page of English, code and Chinese)")
    command.add_argument("--precision", default="auto", choices=["auto", "fp32", "fp64"], help="auto is fp32, and fp64 where that is not enough")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The command's result as a dictionary, on the first rank."""
    if arguments.command in ("import", "export", "reshard"):
        return write(arguments)
    if arguments.command == "inspect":
        from megatron_skywork.convert.check.inspect_folder import inspect_folder

        return inspect_folder(arguments.checkpoint, not arguments.no_similarity)
    if arguments.command == "verify":
        from megatron_skywork.convert.check.verify_manifest import verify_folder

        return verify_folder(arguments.checkpoint, arguments.source, sys.stderr, arguments.finite)
    from megatron_skywork.convert.check.verify import compare, tokens_for
    from megatron_skywork.convert.sources import open_source

    source = open_source(arguments.dense)
    tokens = tokens_for(source.carried or source.folder, source.model.vocab_size, arguments.text, arguments.tokens)
    return compare(arguments.dense, arguments.checkpoint, tokens, progress=sys.stderr, precision=arguments.precision)


def write(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Import, export or reshard."""
    from megatron_skywork.convert.streaming.ranks import Ranks
    from megatron_skywork.convert.streaming.run import Options
    from megatron_skywork.errors import ConfigError

    if arguments.workers < 1:
        raise ConfigError(f"--workers={arguments.workers}: must be 1 or more")
    ranks = Ranks.from_environment()
    options = Options(arguments.workers, arguments.overwrite, arguments.check_finite, sys.stderr, ranks)
    try:
        if arguments.command == "import":
            from megatron_skywork.convert.import_hf import import_hf

            result = import_hf(arguments.hf, arguments.out, options)
        elif arguments.command == "export":
            from megatron_skywork.convert.export_hf import export_hf

            result = export_hf(arguments.checkpoint, arguments.out, arguments.format, arguments.dtype, arguments.tokenizer, options)
        else:
            from megatron_skywork.convert.reshard import reshard

            result = reshard(arguments.checkpoint, arguments.out, arguments.tp, arguments.etp, arguments.dtype, options)
        return result if ranks.rank == 0 else None
    finally:
        ranks.close()


def main(words: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return finish(parse(words), run, lines)


if __name__ == "__main__":
    sys.exit(main())
