"""What a run that goes on may change: every setting is never changeable, changeable on request, or free.

A resume under other settings than the checkpoint's is right for some and a silent mistake for others: another learning rate may be wanted, and may be a
forgotten line in a file. So what the model is made of stays as it is; what decides the results needs to be named in `resume.allow_change`; what only decides
where, how fast and how closely watched a run goes is free. Kernels and layouts count as free: they change the rounding alone, unless the settings make
results depend on the split (random numbers, capacity per rank). A setting that is in none of the lists below fails a test, so a new one cannot be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from megatron_skywork.config.manual import is_section, section_names, section_of, settings
from megatron_skywork.config.problems import nearest, shown
from megatron_skywork.config.rules import rule
from megatron_skywork.config.schema import Config
from megatron_skywork.config.section import VALUES_ONLY, Section
from megatron_skywork.errors import CheckpointError, ConfigError

NEVER, ON_REQUEST, FREE = "never", "on request", "free"
# Not a setting, but it decides how many replicas share a batch; it may be named in resume.allow_change too.
WORLD_SIZE = "world_size"


def _names(sections: Mapping[str, str]) -> list[str]:
    return [f"{section}.{name}" if section else name for section, names in sections.items() for name in names.split()]


# Shapes, and what the numbers of the state stand for.
_NEVER = _names({
    "model": "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups head_dim vocab_size vocab_divisible_by"
             " tie_embeddings qkv_bias qk_norm",
    "moe": "num_experts ffn_hidden_size layers shared_expert_ffn_hidden_size shared_expert_gate",
    "megatron": "moe_router_enable_expert_bias",
})
# What the next losses are a function of.
_ON_REQUEST = _names({
    "": "megatron",
    "model": "rope_theta rope_scaling_factor norm_epsilon attention_dropout hidden_dropout",
    "moe": "topk pre_softmax gate_norm gate_norm_scale gate_norm_epsilon gate_norm_unbiased capacity_factor capacity_scope drop_policy aux_loss aux_scope"
           " aux_coefficient aux_schedule extra_aux_losses z_loss_coefficient",
    "moe.adaptive": "enabled sensitivity maximum momentum",
    "data": "train seq_length mock eod_mask_loss reset_position_ids reset_attention_mask",
    "optim": "lr min_lr schedule warmup_steps decay_steps weight_decay beta1 beta2 eps clip_grad moments",
    "train": "global_batch_size precision seed",
})
# Where, how fast, how long, and what is written about it. The tokenizer is known by its content, see `compare`.
_FREE = _names({
    "": "run_dir",
    "model": "max_position_embeddings init_std backend compile",
    "moe": "eval_capacity_factor pad_to_capacity router_init_std dispatcher",
    "parallel": "recompute recompute_layers recompute_modules overlap gpus_per_node",
    "data": "valid tokenizer num_workers cache_dir",
    "train": "keep_logits max_nonfinite_steps check_replicas stop_at_step time_limit_seconds eval_every eval_samples eval_at_start eval_at_end grace_seconds",
    "spikes": "policy window threshold minimum_steps max_rewinds",
    "checkpoint": "init_from every keep save_at_end on_save_error background",
    "resume": "mode allow_change",
    "watchdog": "enabled start_seconds step_seconds evaluation_seconds save_seconds",
    "launch": "nodes spare_nodes request_gpus sbatch environment grace_seconds max_stalled_starts",
    "launch.container": "image mounts runtime",
    "launch.preflight": "enabled min_memory_gib min_gpu_memory_gib min_disk_gib min_bandwidth_gb_per_second max_clock_skew_seconds timeout_seconds",
    "metrics": "every router tensorboard wandb wandb_project peak_tflops",
})


def _draws(config: Config) -> bool:
    """Whether a step draws random numbers."""
    model = config.model
    return model.attention_dropout > 0 or model.hidden_dropout > 0 or bool(config.megatron.get("moe_input_jitter_eps"))


def _of_layout(old: Config, new: Config) -> str:
    """Random numbers are drawn, and capacity per rank is shared out, rank by rank."""
    by_rank = new.moe is not None and new.moe.capacity_factor is not None and new.moe.capacity_scope == "rank"
    return ON_REQUEST if by_rank or _draws(new) else FREE


def _of_world_size(old: Config, new: Config) -> str:
    return ON_REQUEST if _draws(new) else FREE


def _of_micro_batch(old: Config, new: Config) -> str:
    """The tokens of a micro-batch compete for slots, and balance losses may be means over one."""
    moe = new.moe
    shared = moe is not None and (
        moe.capacity_factor is not None or (moe.aux_loss != "none" and "micro_batch" in (moe.aux_scope, *(extra.scope for extra in moe.extra_aux_losses))))
    return ON_REQUEST if shared or _draws(new) else FREE


def _of_steps(old: Config, new: Config) -> str:
    """A longer run is free exactly where the schedule is not laid out over its length."""
    optim = new.optim
    is_laid_out = optim.schedule == "wsd" or (optim.schedule in ("cosine", "linear") and optim.decay_steps is None)
    return ON_REQUEST if is_laid_out else FREE


_DEPENDS: dict[str, Callable[[Config, Config], str]] = {
    **dict.fromkeys(_names({"parallel": "tp pp vpp ep etp cp layers_per_stage"}), _of_layout),
    "train.micro_batch_size": _of_micro_batch,
    "train.steps": _of_steps,
    WORLD_SIZE: _of_world_size,
}
CLASSES: dict[str, str | Callable[[Config, Config], str]] = {
    **dict.fromkeys(_NEVER, NEVER), **dict.fromkeys(_ON_REQUEST, ON_REQUEST), **dict.fromkeys(_FREE, FREE), **_DEPENDS}

# Settings that may be left out and then mean another one's value: compared by what they come to.
_RESOLVED: dict[str, Callable[[Config], Any]] = {
    "model.head_dim": lambda config: config.model.resolved_head_dim,
    "model.num_query_groups": lambda config: config.model.resolved_query_groups,
    "moe.ffn_hidden_size": lambda config: config.moe and (config.moe.ffn_hidden_size or config.model.ffn_hidden_size),
    "moe.layers": lambda config: config.moe_layers,
}


@dataclass(frozen=True)
class Change:
    """One setting that is not what the checkpoint was saved with."""

    key: str
    old: Any
    new: Any
    kind: str
    """NEVER, ON_REQUEST or FREE."""

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.old)} -> {shown(self.new)}"


def read_saved(values: Any, place: str) -> Config:
    """The settings of a checkpoint's config.yaml, whichever version wrote it: what is no setting any more is left out, what is new gets its default.

    Raises:
        CheckpointError: they are no settings.
    """
    try:
        return Config.model_validate(_known(values, Config), context=VALUES_ONLY)
    except (ValidationError, AttributeError) as failure:
        reason = failure.errors()[0]["msg"] if isinstance(failure, ValidationError) else "no sections"
        raise CheckpointError(f"{place}: these are no settings of a run ({reason}); use another checkpoint of this run") from failure


def _known(values: Any, section: type[Any]) -> Any:
    if values is None:
        return None
    found = {}
    for name, value in values.items():
        field = section.model_fields.get(name)
        if field is not None:
            inner = section_of(field.annotation) if is_section(field) else None
            found[name] = value if inner is None else _known(value, inner)
    return found


def compare(
    old: Config, new: Config, *, world_sizes: tuple[int, int], old_data: Mapping[str, Any] | None = None, new_data: Mapping[str, Any] | None = None
) -> list[Change]:
    """What differs, in the schema's order.

    Args:
        world_sizes: ranks of the checkpoint and of this start.
        old_data, new_data: what the data are by content (data/identity.py): `tokenizer`, and `train`, a list with the content and weight of each source.
            Paths of equal content are free to change; other content under the same path is a change. None: nothing is known, paths must do.
    """
    changes = []
    old_values, new_values = _flat(old, new)
    for key in [*dict.fromkeys([*old_values, *new_values])]:
        before, after, resolve = old_values.get(key), new_values.get(key), _RESOLVED.get(key)
        differs = before != after and (resolve is None or resolve(old) != resolve(new))
        if differs and not key.startswith("resume."):
            changes.append(Change(key, before, after, _kind(key, old, new)))
    if world_sizes[0] != world_sizes[1]:
        changes.append(Change(WORLD_SIZE, *world_sizes, _of_world_size(old, new)))
    return _by_content(changes, old_data, new_data)


def _kind(key: str, old: Config, new: Config) -> str:
    if key == "moe":  # a dense model became one with experts, or the other way
        return NEVER
    found = CLASSES.get(key) or CLASSES[key.partition(".")[0]]
    return found if isinstance(found, str) else found(old, new)


def _flat(old: Config, new: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Dotted key -> value, for both; a section that only one has counts as one value."""
    left: dict[str, Any] = {}
    right: dict[str, Any] = {}

    def walk(prefix: str, first: Section, second: Section) -> None:
        for name in type(first).model_fields:
            key, pair = prefix + name, (getattr(first, name), getattr(second, name))
            if isinstance(pair[0], Section) and isinstance(pair[1], Section):
                walk(f"{key}.", *pair)
            elif key == "megatron":
                for found, values in zip((left, right), pair, strict=True):
                    found.update({f"{key}.{option}": value for option, value in values.items()})
            else:
                left[key], right[key] = (_plain(value) for value in pair)

    walk("", old, new)
    return left, right


def _plain(value: Any) -> Any:
    """A value as it stands in a file."""
    if isinstance(value, Section):
        return value.model_dump(mode="python")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _by_content(changes: list[Change], old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[Change]:
    """Judge tokenizer and training data by what they hold, where that is known of both."""
    if old is None or new is None:
        return changes
    found = []
    if old.get("tokenizer") and new.get("tokenizer") and old["tokenizer"] != new["tokenizer"]:
        found.append(Change("data.tokenizer", f"content {old['tokenizer'][:12]}", f"content {new['tokenizer'][:12]}", NEVER))
    if old.get("train") and new.get("train"):
        by_path = next((change for change in changes if change.key == "data.train"), None)
        if old["train"] == new["train"]:
            found += [Change(by_path.key, by_path.old, by_path.new, FREE)] if by_path else []
        else:
            found.append(by_path or Change("data.train", _contents(old["train"]), _contents(new["train"]), ON_REQUEST))
    replaced = {change.key for change in found} | ({"data.train"} if old.get("train") and new.get("train") else set())
    return [change for change in changes if change.key not in replaced] + found


def _contents(sources: Sequence[Mapping[str, Any]]) -> str:
    return "content " + ", ".join(str(source["sha256"])[:12] for source in sources)


def is_allowed(key: str, allowed: Sequence[str]) -> bool:
    """Whether one of the names, sections or patterns of `resume.allow_change` covers a key."""
    return any(fnmatchcase(key, pattern) or key.startswith(pattern + ".") for pattern in allowed)


def require_allowed(changes: Sequence[Change], config: Config, folder: str) -> None:
    """Refuse every change that is not free and not asked for, all at once.

    Raises:
        ConfigError: one line for each, with both values and what to type.
    """
    allowed = config.resume.allow_change
    missing = [change.key for change in changes if change.kind == ON_REQUEST and not is_allowed(change.key, allowed)]
    problems = []
    for change in changes:
        both = f"{change.key}={shown(change.new)}, and {folder} was saved with {shown(change.old)}"
        if change.kind == NEVER:
            problems.append(f"{both}; what was saved has no meaning under another value: set it back, or choose another run_dir")
        elif change.key in missing:
            problems.append(f"{both}; results would differ: set it back, or allow it with resume.allow_change={_typed([*allowed, change.key])}")
    if len(missing) > 1:
        problems.append(f"resume.allow_change={_typed([*allowed, *missing])} allows all {len(missing)} of these changes")
    if problems:
        raise ConfigError(problems)


def _typed(names: Sequence[str]) -> str:
    return "'[" + ", ".join(f'"{name}"' if "*" in name else name for name in names) + "]'"


@rule("resume.allow_change")
def _allow_change(config: Config, world: int | None) -> Iterator[str]:
    keys = [setting.name for setting in settings()] + [WORLD_SIZE]
    for pattern in config.resume.allow_change:
        if not any(is_allowed(key, [pattern]) for key in keys) and not pattern.startswith("megatron."):
            match = nearest(pattern, [*keys, *section_names()])
            yield f"resume.allow_change names {pattern}, and there is no such setting" + (f"; did you mean {match[0]}?" if match else "")
        elif pattern in _NEVER:
            yield f"resume.allow_change names {pattern}, which can never change: what was saved has no meaning under another value; leave it out"
