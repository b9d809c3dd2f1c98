"""Which runs the ablation consists of, and what is left of them to do.

A variant is a file in configs/ablation/ with only what differs from base.yaml. Two variants whose settings are the same after all (lambda 1 with the
coefficient 0.01, and the coefficient 0.01 with lambda 1) are one run that both comparisons read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_skywork.config.load import dump_config, load_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = Path("configs/ablation")
DEFAULT_OUT = Path("runs/ablation")


@dataclass(frozen=True)
class Group:
    """Variants that are compared with each other.

    Attributes:
        key: names its files.
        title: for people.
        variants: in the order they are shown.
        reference: the one the others are compared with.
    """

    key: str
    title: str
    variants: tuple[str, ...]
    reference: str


GROUPS = (
    Group("gate_norm", "Gate-logit normalization", ("no_norm", "lambda_0.5", "lambda_1", "lambda_2"), reference="no_norm"),
    Group("coefficients", "Auxiliary-loss coefficients", ("fixed_1e-2", "fixed_1e-3", "adaptive"), reference="fixed_1e-2"),
)
VARIANTS = tuple(variant for group in GROUPS for variant in group.variants)


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Attributes:
        variant, seed: what it is; of variants with equal settings the first names it.
        words: what follows `launch/pretrain_moe.py`.
        config: its settings.
    """

    variant: str
    seed: int
    words: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return f"{self.variant} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return ROOT / self.config.run_dir

    @property
    def tokens(self) -> int:
        return self.config.train.steps * self.config.train.global_batch_size * self.config.data.seq_length

    def status(self) -> str:
        """`done`, `to go on with` (started, with these settings), `to do`, or `other settings` (a run of another kind is in its folder)."""
        if not (self.folder / "config.yaml").is_file():
            return "to do"
        if (self.folder / "config.yaml").read_text(encoding="utf-8") != dump_config(self.config):
            return "other settings"
        return "done" if status_of(self.folder) == "done" else "to go on with"

    def make_room(self) -> Path | None:
        """Move a run with other settings out of the way; where it lies now."""
        if self.status() != "other settings":
            return None
        number = 1
        while (target := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
            number += 1
        os.replace(self.folder, target)
        return target


@dataclass(frozen=True)
class Plan:
    """All runs, and which of them a variant reads.

    Attributes:
        runs: each trained once, all variants of a seed after each other.
        trained_as: variant -> variant whose runs it reads, itself for most.
        out: folder of everything.
        seeds: in order.
    """

    runs: tuple[PlannedRun, ...]
    trained_as: dict[str, str]
    out: Path
    seeds: tuple[int, ...]

    def groups(self) -> list[Group]:
        """The comparisons, with the variants of this plan only; one without its reference, or with nothing beside it, is no comparison."""
        found = []
        for group in GROUPS:
            variants = tuple(variant for variant in group.variants if variant in self.trained_as)
            if group.reference in variants and len(variants) > 1:
                found.append(Group(group.key, group.title, variants, group.reference))
        return found


@dataclass(frozen=True)
class Choice:
    """What the user asked for; None leaves a thing as base.yaml (and gpu.yaml) have it."""

    out: Path = DEFAULT_OUT
    only: tuple[str, ...] = VARIANTS
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int | None = None
    settings: tuple[str, ...] = ()
    on_gpu: bool = False


def make_plan(choice: Choice) -> Plan:
    """Runs for a choice.

    Raises:
        ConfigError: a setting is wrong, or a variant does not exist.
    """
    unknown = [name for name in choice.only if name not in VARIANTS]
    if unknown:
        raise ConfigError(f"--only {' '.join(unknown)}: no such variant; there are {', '.join(VARIANTS)}")
    settings = {variant: settings_of(choice, variant) for variant in VARIANTS}
    # Looked for among all variants, so that a part of the ablation leaves its runs where the whole will look for them.
    trained_as = {variant: next(other for other in VARIANTS if settings[other] == settings[variant]) for variant in choice.only}
    trained = list(dict.fromkeys(trained_as.values()))
    # Seed by seed: whoever stops early has all variants of the first seeds.
    runs = tuple(planned_run(choice, variant, seed) for seed in choice.seeds for variant in trained)
    return Plan(runs, trained_as, choice.out, choice.seeds)


def settings_of(choice: Choice, variant: str) -> str:
    """A variant's settings without what names the run, to tell whether two are the same."""
    values = planned_run(choice, variant, choice.seeds[0]).config.model_dump(mode="json")
    del values["run_dir"]
    return json.dumps(values, sort_keys=True)


def planned_run(choice: Choice, variant: str, seed: int) -> PlannedRun:
    files = ["base.yaml", *(["gpu.yaml"] if choice.on_gpu else []), f"{variant}.yaml"]
    paths = [CONFIGS / file for file in files]
    overrides = [f"run_dir={choice.out / variant / f'seed_{seed}'}", f"train.seed={seed}"]
    if choice.out != DEFAULT_OUT:
        places = {"data.train": "data/train", "data.valid.held_out": "data/valid", "data.tokenizer": "tokenizer"}
        overrides += [f"{key}={choice.out / place}" for key, place in places.items()]
    overrides += choice.settings
    if choice.steps is not None:
        overrides += [f"train.steps={choice.steps}", f"optim.warmup_steps={min(warmup_of(paths), choice.steps // 10)}"]
    config = load_config([ROOT / path for path in paths], overrides, world_size=1)
    words = [word for path in paths for word in ("--config", str(path))] + overrides
    return PlannedRun(variant, seed, tuple(words), config)


def warmup_of(paths: Sequence[Path]) -> int:
    return load_config([ROOT / path for path in paths], [], world_size=1).optim.warmup_steps


def status_of(folder: Path) -> str | None:
    """How a run ended, by its run_status.json; None where there is none that can be read."""
    try:
        return json.loads((folder / "run_status.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError):
        return None
