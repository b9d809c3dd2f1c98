"""Generate text with `transformers` from a Hugging Face folder: the shortest proof that an export is a model other people's code can run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.errors import EXIT_DONE, CheckpointError, UserError  # noqa: E402


def generate(model_dir: Path, prompt: str, max_new_tokens: int, trust_remote_code: bool) -> dict[str, object]:
    """Greedy continuation of a prompt.

    Args:
        trust_remote_code: run the Python files in the folder, which is what a model class of its own needs. Only for folders you made or read.

    Returns:
        prompt, text (the continuation alone), num_tokens, seconds, model_class.

    Raises:
        CheckpointError: the folder is no Hugging Face model, or needs code that was not allowed.
    """
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"{model_dir} has no config.json; give a folder written by tools/convert_checkpoint.py export")
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in config and not trust_remote_code:
        code = ", ".join(sorted(set(config["auto_map"].values())))
        raise CheckpointError(f"{model_dir} carries its own model code ({code}); read it, then add --trust-remote-code")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", trust_remote_code=trust_remote_code).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    started = time.monotonic()
    with torch.inference_mode():
        output_BS = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    new_S = output_BS[0, inputs["input_ids"].shape[1] :]
    return {
        "prompt": prompt,
        "text": tokenizer.decode(new_S, skip_special_tokens=True),
        "num_tokens": int(new_S.numel()),
        "seconds": round(time.monotonic() - started, 2),
        "model_class": f"{type(model).__module__.rpartition('.')[2]}.{type(model).__name__}",
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR", help="folder with config.json, weights and tokenizer")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="length of the continuation (default 40)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model code that lies in the folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    try:
        result = generate(args.model, args.prompt, args.max_new_tokens, args.trust_remote_code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result, ensure_ascii=False) if args.json else f"{result['prompt']}{result['text']}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
