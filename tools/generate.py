"""Generate text with `transformers` from a Hugging Face folder: the shortest proof that an export is a model other people's code can run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from megatron_skywork.convert.files.text_files import json_object  # noqa: E402
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
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such folder; give one written by tools/convert_checkpoint.py export")
    config = json_object(model_dir / "config.json")
    code = config.get("auto_map", {})
    if code and not trust_remote_code:
        named = ", ".join(sorted({str(value) for value in code.values()})) if isinstance(code, dict) else str(code)
        raise CheckpointError(f"{model_dir} carries its own model code ({named}); read it, then add --trust-remote-code")

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", trust_remote_code=trust_remote_code).eval()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:  # transformers raises almost anything
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise CheckpointError(f"{model_dir}: transformers cannot load it ({type(error).__name__}: {reason}); see convert_checkpoint.py verify") from error
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
    if not args.prompt or args.max_new_tokens < 1:
        parser.error("--prompt must not be empty" if not args.prompt else f"--max-new-tokens={args.max_new_tokens}: must be 1 or more")
    try:
        result = generate(args.model, args.prompt, args.max_new_tokens, args.trust_remote_code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(result, ensure_ascii=False) if args.json else f"{result['prompt']}{result['text']}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
