"""A weights-only folder of ours: distributed checkpoint files, `model.yaml`, `manifest.json`, `hf/` (tokenizer and configs to give back), `complete.json` last.

Training checkpoints have the same weights under the same names, with `config.yaml` in the place of `model.yaml`; `describe` reads both.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import megatron_skywork
from megatron_skywork.config.schema import Model, Moe
from megatron_skywork.config.yaml_strict import read_yaml, write_yaml
from megatron_skywork.convert.files.marker import check_link, list_files, sealed, sha256_of
from megatron_skywork.convert.files.text_files import LARGEST_YAML_BYTES, json_object, text_of
from megatron_skywork.convert.layouts import numel
from megatron_skywork.convert.safety.shown import first_lines, shown
from megatron_skywork.convert.table import moe_layers, weights
from megatron_skywork.errors import CheckpointError

MODEL_FILE = "model.yaml"
CONFIG_FILE = "config.yaml"
STATE_FILE = "state.json"
MANIFEST = "manifest.json"
HF_FOLDER = "hf"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Fields of megatron-core's TransformerConfig that change the function a model computes, and the value that does not.
CHANGES_FORWARD: dict[str, Any] = {
    "moe_router_pre_softmax": False, "moe_router_score_function": "softmax", "moe_router_topk_scaling_factor": 1.0, "moe_router_num_groups": None,
    "moe_router_group_topk": None, "moe_router_enable_expert_bias": False, "moe_shared_expert_gate": False, "moe_apply_probs_on_input": False,
    "moe_latent_size": None, "moe_layer_freq": None, "activation_func": "silu", "activation_func_clamp_value": None, "glu_linear_offset": 0.0,
    "gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm", "layernorm_zero_centered_gamma": False, "rotary_interleaved": False,
    "apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False, "attention_output_gate": False, "softmax_scale": None,
    "softmax_type": "vanilla", "window_size": None, "no_rope_freq": None, "multi_latent_attention": False, "use_mup": False,
    "qk_l2_norm": False, "mtp_num_layers": None, "experimental_attention_variant": None, "linear_attention_freq": None,
}  # fmt: skip
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "config.json")


def write_model_file(folder: Path, model: Model, moe: Moe | None) -> None:
    """`model.yaml`: the sections a training run takes as its first --config."""
    sections: dict[str, Any] = {"model": model.model_dump(mode="python", exclude_unset=True)}
    if moe is not None:
        sections["moe"] = moe.model_dump(mode="python", exclude_unset=True)
    (folder / MODEL_FILE).write_text(write_yaml(sections), encoding="utf-8")


def describe(folder: Path | str) -> tuple[Model, Moe | None]:
    """The Model and Moe sections of a folder of ours, weights-only or saved by training.

    Raises:
        CheckpointError: neither file is there, or its sections do not fit the schema.
    """
    folder = Path(folder)
    path = next((folder / name for name in (MODEL_FILE, CONFIG_FILE) if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder}: neither {MODEL_FILE} nor {CONFIG_FILE} is there, so nothing says what model this is")
    document = read_yaml(text_of(path, LARGEST_YAML_BYTES), str(path))
    if document.problems:
        raise CheckpointError("\n".join(first_lines(document.problems)))
    values = document.values if isinstance(document.values, dict) else {}
    try:
        model = Model.model_validate(values.get("model", {}))
        moe = None if values.get("moe") is None else Moe.model_validate(values["moe"])
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise CheckpointError(f"{path}: the sections model and moe do not describe a model:\n" + "\n".join(first_lines(lines))) from error
    if moe is not None and moe.layers is not None and not set(moe.layers) & set(range(model.num_layers)):
        raise CheckpointError(f"{path}: moe.layers={shown(moe.layers)} names none of the {model.num_layers} layers, so there is no mixture of experts; "
                              "name some, or leave out moe")  # fmt: skip
    return model, moe


def check_plain(folder: Path | str) -> None:
    """Refuse a training checkpoint whose `megatron:` section changed what the model computes: no other format, and no reference here, knows that.

    Raises:
        CheckpointError: the settings, all of them.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return
    values = read_yaml(text_of(path, LARGEST_YAML_BYTES), str(path)).values
    passed = values.get("megatron") if isinstance(values, dict) else None
    if not isinstance(passed, dict):
        return
    changed = [
        f"megatron.{name}={shown(value)}"
        for name, value in passed.items()
        if name in CHANGES_FORWARD and value not in (None, False, CHANGES_FORWARD[name])
    ]
    if changed:
        raise CheckpointError(f"{path}: the model was trained with {', '.join(changed)}, which a Hugging Face folder cannot express")


def is_ours(folder: Path | str) -> bool:
    """Whether a folder looks like one of our checkpoints rather than a Hugging Face folder."""
    folder = Path(folder)
    return (folder / MODEL_FILE).is_file() or (folder / "metadata.json").is_file() or (folder / ".metadata").is_file()


def step_of(folder: Path | str) -> int | None:
    """Training steps behind a checkpoint; None for a weights-only folder."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return None
    step = json_object(path).get("step")
    return step if isinstance(step, int) else None


def count_parameters(model: Model, moe: Moe | None) -> dict[str, int]:
    """Parameters without vocabulary padding: `total`, and `active` ones, which a token passes through (top-k of the experts)."""
    total = idle = 0
    for weight in weights(model, moe):
        count = sum(numel(shape) for shape in weight.layout.parts)
        total += count
        if moe is not None and weight.kind.startswith("expert_"):
            idle += count * (moe.num_experts - moe.topk) // moe.num_experts
    return {"total": total, "active": total - idle}


def carry_files(source: Path, target: Path, names: Iterable[str] = CARRIED_FILES) -> list[str]:
    """Copy the small files that an export needs again; returns the names that were there.

    Raises:
        CheckpointError: one is a link out of the folder; a copy would give away what it leads to.
    """
    found = [name for name in names if (source / name).is_file()]
    if found:
        target.mkdir(exist_ok=True)
    for name in found:
        check_link(source, source / name)
        shutil.copyfile(source / name, target / name)
    return found


def write_manifest(folder: Path, content: dict[str, Any], known_hashes: dict[str, str]) -> None:
    """`manifest.json`: where the weights come from, how they were made, by which versions, and the SHA-256 of every file."""
    names = [name for name in list_files(folder) if name != MANIFEST]
    files = {name: ((folder / name).stat().st_size, known_hashes.get(name) or sha256_of(folder / name)) for name in names}
    (folder / MANIFEST).write_text(manifest_text(content, files), encoding="utf-8")


def manifest_text(content: dict[str, Any], files: Mapping[str, tuple[int, str]]) -> str:
    """A sealed manifest of these files: name -> bytes, SHA-256."""
    listed = {name: {"bytes": num_bytes, "sha256": sha256} for name, (num_bytes, sha256) in files.items()}
    return sealed({**content, "versions": versions(), "files": listed})


def versions() -> dict[str, str]:
    """Versions of what took part in a conversion."""
    found = {"megatron_skywork": megatron_skywork.__version__, "python": platform.python_version(), "byteorder": sys.byteorder}
    for package in ("torch", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def layout_summary(model: Model, moe: Moe | None) -> dict[str, Any]:
    """Shape of a model in a few numbers, for people and manifests."""
    summary: dict[str, Any] = {
        "layers": model.num_layers, "hidden": model.hidden_size, "ffn": model.ffn_hidden_size,
        "heads": model.num_attention_heads, "query_groups": model.resolved_query_groups,
        "vocabulary": model.vocab_size, "padded_vocabulary": model.padded_vocab_size, "tied_embeddings": model.tie_embeddings,
    }  # fmt: skip
    if moe is not None:
        summary |= {"experts": moe.num_experts, "topk": moe.topk, "moe_layers": len(moe_layers(model, moe)), "gate_norm": moe.gate_norm}
    return summary
