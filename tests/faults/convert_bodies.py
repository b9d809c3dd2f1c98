"""What children of the warm process do in the faults of conversions: a small dense model becomes a folder of ours; and a naive converter, to be caught."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from warm import wait_for_tracer

FILE_BYTES = 12000  # a few files of weights


def make_dense(folder: Path, seed: int = 0) -> None:
    """A dense model of two layers as a Hugging Face folder."""
    import torch
    from safetensors.torch import save_file

    from megatron_skywork.config.schema import Model
    from megatron_skywork.convert.config_json import write_config
    from megatron_skywork.convert.table import weights

    model = Model(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2, vocab_size=50, vocab_divisible_by=32)
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: shape for weight in weights(model, None) for name, shape in zip(weight.theirs, weight.layout.parts, strict=True)}
    folder.mkdir(parents=True)
    save_file({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(write_config(model, None, "llama", "float32")))


def convert(dense: Path, out: Path) -> int:
    """`convert_checkpoint.py import --hf DENSE --out OUT`, with small files; returns its exit code."""
    import convert_checkpoint
    from megatron_skywork.convert import import_hf as module

    module.import_hf.__defaults__ = (module._PLAIN, FILE_BYTES)
    return convert_checkpoint.main(["import", "--hf", str(dense), "--out", str(out), "--workers", "1"])


def convert_traced(root: str) -> None:
    wait_for_tracer()
    raise SystemExit(convert(Path(root, "dense"), Path(root, "out")))


def convert_again(root: str, out: str) -> dict[str, Any]:
    """Give the command (again), undisturbed; what is there then."""
    code = convert(Path(root, "dense"), Path(out))
    return looks(out) if code == 0 else {"problems": f"exit code {code}"}


def verified(folder: Path) -> tuple[int, list[str]]:
    """`convert_checkpoint.py verify FOLDER --json`: exit code and problems."""
    import convert_checkpoint

    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as refused:
        code = convert_checkpoint.main(["verify", str(folder), "--json"])
    return code, json.loads(said.getvalue())["problems"] if said.getvalue() else [refused.getvalue()]


def looks(out: str) -> dict[str, Any]:
    """What a folder holds, and what is wrong with it by its own manifest."""
    _, problems = verified(Path(out))
    files = sorted(path for path in Path(out).rglob("*") if path.is_file())
    return {"problems": problems, "holds": {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}}


# -------------------------------------------------------------------------------------------------------------------------------- naive


def naive_convert(dense: Path, out: Path) -> None:
    """What many scripts do: tensors into two files under their last names; what is there already is not made again."""
    import torch
    from safetensors.torch import load_file

    if out.exists():
        return
    out.mkdir()
    tensors = load_file(dense / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        torch.save({name: tensors[name] for name in part}, out / f"part-{number}.pt")


def naive_traced(root: str) -> None:
    wait_for_tracer()
    naive_convert(Path(root, "dense"), Path(root, "out"))


def naive_again(root: str, out: str) -> dict[str, str]:
    """Convert if nothing is there, and load what is there then."""
    import torch

    naive_convert(Path(root, "dense"), Path(out))
    parts = [torch.load(Path(out, f"part-{number}.pt"), weights_only=True) for number in range(2)]
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for part in parts for name, tensor in part.items()}
