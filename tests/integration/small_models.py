"""Small models of every family, made on the spot, and what is asked of the folders that are made from them: logits and tensors, by each of the programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_skywork.convert.check.reference import OurLayers, logits_of
from megatron_skywork.convert.check.verify import open_layers
from megatron_skywork.convert.config_json import LLAMA3_ROPE
from megatron_skywork.convert.export_hf import REMOTE_CODE, REMOTE_FILES
from megatron_skywork.convert.files.checkpoint_folder import describe
from megatron_skywork.convert.files.mcore_files import DistributedReader

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]

SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "initializer_range": 0.2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 4}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
}
SCALED = {"max_position_embeddings": 65536, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **LLAMA3_ROPE}}
TOKENS = torch.randint(0, 100, (24,), generator=torch.Generator().manual_seed(3))
# Long enough for positions to differ in the frequencies that Llama 3.1 scales.
MANY_TOKENS = torch.randint(0, 100, (300,), generator=torch.Generator().manual_seed(4))


def make(folder: Path, config_class: str, changes: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 7, **saving: Any) -> Path:
    """A Hugging Face folder by transformers alone, with random weights in which every part of the model matters."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**{**SHAPE, **changes})).to(torch.float32)
    for name, value in model.named_parameters():
        if "norm" in name or "bias" in name:  # at their initial values these would hide a mistake
            torch.nn.init.normal_(value, float("norm" in name), 0.3)
    model.to(dtype).save_pretrained(folder, **saving)
    return folder


def add_remote_code(folder: Path) -> Path:
    """The files that a folder in the Skywork-MoE layout needs beside its weights."""
    for name in REMOTE_FILES:
        shutil.copyfile(REMOTE_CODE / name, folder / name)
    return folder


def add_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of one token for a byte, as far as the small vocabulary goes."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {"?": 0, **{chr(code): code - 31 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def hf_logits(folder: Path, tokens: torch.Tensor = TOKENS, trust: bool = True) -> torch.Tensor:
    """By transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def our_logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """By the reference, of a folder of ours."""
    return logits_of(OurLayers(DistributedReader(folder), *describe(folder)), tokens)


def reference_logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """By the reference, of either kind."""
    return logits_of(open_layers(folder, torch.float32), tokens)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of a Hugging Face folder, by safetensors alone."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def our_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of a folder of ours."""
    reader = DistributedReader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes, shapes and every bit are the same."""
    return set(left) == set(right) and all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


def assert_same_tensors(a: Path, b: Path) -> None:
    """The same of two Hugging Face folders."""
    left, right = all_tensors(a), all_tensors(b)
    assert set(left) == set(right)
    assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


IN_MEGATRON = """
import json, sys
from pathlib import Path
from megatron_skywork import device
device.prepare()
import torch
from megatron_skywork import parallel
from megatron_skywork.checkpoint.load import load_weights
from megatron_skywork.config.load import load_config
from megatron_skywork.model.build import build_chunks
base, tokens = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
started = False
for folder in sorted(path for path in base.iterdir() if path.is_dir()):
    overrides = ["train.steps=1", "train.global_batch_size=1", "train.precision=fp32", "data.mock=true", f"data.seq_length={len(tokens)}"]
    config = load_config([folder / "model.yaml"], overrides, 1)
    if not started:
        parallel.start(config)
        started = True
    chunks = build_chunks(config)
    load_weights(folder, chunks)
    model = chunks[0].eval()
    with torch.no_grad():
        logits = model(tokens[None], torch.arange(len(tokens))[None], None)[0, :, :config.model.vocab_size]
    torch.save(logits, base / f"{folder.name}.pt")
torch.distributed.destroy_process_group()
"""


def training_logits(base: Path, tokens: torch.Tensor = TOKENS) -> dict[str, torch.Tensor]:
    """By megatron-core's GPTModel as it is trained, of every folder of ours in `base`; in one process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", IN_MEGATRON, str(base), json.dumps(tokens.tolist())]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=base, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in base.glob("*.pt")}
