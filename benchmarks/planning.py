#!/usr/bin/env python3
"""The planner's predictions beside what others published: speed and memory of every run in docs/measurements/published_runs.yaml.

    python benchmarks/planning.py                     all rows, Markdown
    python benchmarks/planning.py --rows skywork nemo-llama3-70b-64 --json
    python benchmarks/planning.py --formulas          which count of FLOPs gives the MFU that a row states

Nothing is fitted to a row. "By the others" takes what the other rows of its group, the same software on the same machine, kept of the rates of single kernels
and of links: two numbers (plan/sustained.py), never found with the row itself. Every run fitted on its GPUs, so a row that is predicted not to is counted as
too big, whether its memory is published or not.
Speed is tokens/s and GPU; where a source gives something else, it follows from what is given:

    from a step's time       global batch * sequence / (seconds * GPUs)
    from samples/s and GPU   samples * sequence
    from TFLOP/s and GPU     TFLOP/s / (FLOPs of one token, counted as the source counts them)
    from MFU                 MFU * peak, then as TFLOP/s

CONVENTIONS are the counts of FLOPs that are in use, for one token, forward and backward, with N the active parameters, N' those of them that stand in a
matrix product (embedding look-up, norms and biases not), V H the output layer, A = heads * head_dim, L layers, S the sequence:

    matmul, causal attention                  6 N' + 6 L A S               plan.flops; NVIDIA's Grok-1 figures
    matmul, full attention                    6 N' + 12 L A S              Korthikanti et al. 2022, "model FLOPs"; Megatron-LM's log; NVIDIA's Llama 3.1 figures
    all parameters, full attention            6 N + 12 L A S               PaLM, appendix B
    all parameters and capacity, full ...     the same, with every slot of an expert counted: moe.capacity_factor times its share
    matmul, full attention, recomputed        8 (N' - V H) + 16 L A S + 6 V H     Narayanan et al. 2021, equation 3: every layer's forward pass twice
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_skywork.config.schema import Config  # noqa: E402
from megatron_skywork.config.yaml_strict import read_yaml, write_yaml  # noqa: E402
from megatron_skywork.errors import ConfigError  # noqa: E402
from megatron_skywork.plan.flops import attention_width, matmul_parameters, report_flops_per_token, train_flops_per_token  # noqa: E402
from megatron_skywork.plan.hardware import load_cluster  # noqa: E402
from megatron_skywork.plan.kernels import relative_errors  # noqa: E402
from megatron_skywork.plan.parameters import count_parameters  # noqa: E402
from megatron_skywork.plan.sustained import LINKS, Sample, find, sample  # noqa: E402

RUNS = ROOT / "docs" / "measurements" / "published_runs.yaml"
GIGA = 1e9
FP32_BYTES = 4
# Two shares are found with two rows at least.
LEAST_OTHERS = 2


@dataclass(frozen=True)
class Run:
    """A published run.

    Args:
        id, group: names; errors are averaged over a group.
        source: title and number of the paper, or the repository, and where in it.
        cluster: a machine of plan/machines.yaml with its number of nodes, or the values of a section `cluster`.
        gpus: of the whole run.
        config: what was trained and how.
        schedule: order of the pipeline; None is megatron-core's.
        gradient_bytes: of a parameter; 4 is what the trainer keeps.
        keeps_more: it kept in memory what the trainer does not, so that its memory is no measure of the prediction.
        published: the figures as printed.
        differs: what the run did otherwise than `config` says.
        assumed: settings that the source does not give, and why they were chosen.
    """

    id: str
    group: str
    source: str
    cluster: str | dict[str, Any]
    gpus: int
    config: Config
    schedule: str | None
    gradient_bytes: int
    keeps_more: bool
    published: dict[str, Any]
    differs: tuple[str, ...]
    assumed: dict[str, str]


# ------------------------------------------------------------------------------------------------------------------------------- reading


def load_runs(path: Path = RUNS) -> list[Run]:
    """All rows of the file.

    Raises:
        ConfigError: the file is not YAML, or a row's settings do not load.
    """
    document = read_yaml(path.read_text(encoding="utf-8"), path.name)
    if document.problems:
        raise ConfigError(document.problems)
    return [_run(document.values, row) for row in document.values["rows"]]


def _run(file: dict[str, Any], row: dict[str, Any]) -> Run:
    model, remarks = file["models"][row["model"]], file["remarks"]
    cluster = file["clusters"].get(row["cluster"], row["cluster"])
    nodes, gpus_per_node = (cluster["nodes"], cluster["gpus_per_node"]) if isinstance(cluster, dict) else (int(cluster.partition(":")[2]), 8)
    settings = {section: dict(values) for section, values in row["settings"].items()}
    settings["model"] = model["model"]
    if "moe" in model:
        settings["moe"] = {**model["moe"], **settings.get("moe", {})}
    settings["parallel"]["gpus_per_node"] = gpus_per_node
    settings["data"]["mock"] = True
    settings["train"]["steps"] = 1
    notes = [model["note"]] if "note" in model else []
    source = f"{file['sources'][row['source']]}; {row['at']}"
    differs = tuple(remarks[name] for name in [*notes, *row.get("differs", [])])
    assumed = {key: remarks[name] for key, name in row.get("assumed", {}).items()}
    config = Config.model_validate(settings)
    return Run(
        row["id"], row["group"], source, cluster, nodes * gpus_per_node, config, row.get("schedule"), row.get("gradient_bytes", FP32_BYTES),
        row.get("keeps_more", False), row["published"], differs, assumed,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------------- conventions


def _full_attention(config: Config) -> int:
    """12 L A S: scores and their product with the values, each 2 A S forward, three times that with backward, no mask taken off."""
    return 12 * config.model.num_layers * attention_width(config) * config.data.seq_length


def _matmul_full(config: Config) -> float:
    return 6 * matmul_parameters(config) + _full_attention(config)


def _with_capacity(config: Config) -> float:
    capacity = (config.moe.capacity_factor if config.moe is not None else None) or 1.0
    return report_flops_per_token(config) + 6 * (capacity - 1) * count_parameters(config).active_components.get("experts", 0)


def _recomputed(config: Config) -> float:
    output = config.model.vocab_size * config.model.hidden_size
    return 8 * (matmul_parameters(config) - output) + _full_attention(config) * 4 / 3 + 6 * output


CONVENTIONS: dict[str, Callable[[Config], float]] = {
    "matmul, causal attention": train_flops_per_token,
    "matmul, full attention": _matmul_full,
    "all parameters, full attention": report_flops_per_token,
    "all parameters and capacity, full attention": _with_capacity,
    "matmul, full attention, recomputed": _recomputed,
}


def stated_speeds(run: Run) -> dict[str, float]:
    """Tokens/s and GPU as each of a row's figures gives it, in the order in which they are trusted."""
    given, config = run.published, run.config
    speeds: dict[str, float] = {}
    if "tokens_per_gpu_second" in given:
        speeds["tokens/s"] = float(given["tokens_per_gpu_second"])
    if "samples_per_gpu_second" in given:
        speeds["samples/s"] = given["samples_per_gpu_second"] * config.data.seq_length
    if "step_seconds" in given:
        speeds["step time"] = config.train.global_batch_size * config.data.seq_length / (given["step_seconds"] * run.gpus)
    if "tflops" in given:
        speeds["TFLOP/s"] = given["tflops"] * 1e12 / CONVENTIONS[given["tflops_counts"]](config)
    if "mfu" in given and "mfu_counts" in given:
        speeds["MFU"] = given["mfu"] * given["mfu_of"] * 1e12 / CONVENTIONS[given["mfu_counts"]](config)
    return speeds


def speed(run: Run) -> float:
    """The published tokens/s and GPU."""
    return next(iter(stated_speeds(run).values()))


def memory_bytes(run: Run) -> float | None:
    """The published memory of the fullest GPU; GB are taken as 10^9 bytes."""
    if "memory_bytes" in run.published:
        return float(run.published["memory_bytes"])
    return run.published["memory_gb"] * GIGA if "memory_gb" in run.published else None


# ------------------------------------------------------------------------------------------------------------------------------ comparing


def load_cluster_of(run: Run) -> Any:
    """The row's `plan.hardware.Cluster`."""
    if isinstance(run.cluster, str):
        return load_cluster(run.cluster)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{run.id}.yaml"
        path.write_text(write_yaml({"cluster": run.cluster}), encoding="utf-8")
        return load_cluster(str(path))


def compare(run: Run, estimate: Callable[..., Any], cluster_of: Callable[[Run], Any] = load_cluster_of) -> dict[str, Any]:
    """One row: published, predicted, and the error as a share of what was published.

    Args:
        estimate: `plan.estimate.estimate`.
        cluster_of: what gives it the row's cluster.
    """
    row: dict[str, Any] = {
        "id": run.id, "group": run.group, "gpus": run.gpus, "source": run.source, "given": next(iter(stated_speeds(run))),
        "published_tokens_per_gpu_second": speed(run), "published_memory_bytes": memory_bytes(run), "differs": list(run.differs), "assumed": run.assumed,
    }  # fmt: skip
    try:
        cluster = cluster_of(run)
        found = estimate(run.config, cluster, schedule=run.schedule)
    except ConfigError as error:
        return {**row, "failed": str(error)}
    row["tokens_per_gpu_second"] = found.tokens_per_gpu_second
    run_seconds = found.step_seconds * found.tokens_per_gpu_second / speed(run)
    row["sample"] = asdict(sample(found, run_seconds))
    row["memory_bytes"] = max(stage.total - stage.gradients * (1 - run.gradient_bytes / FP32_BYTES) for stage in found.memory)
    row["fits"] = row["memory_bytes"] <= cluster.gpu.memory_bytes
    row["speed_error"] = found.tokens_per_gpu_second / row["published_tokens_per_gpu_second"] - 1
    if row["published_memory_bytes"] is not None and not run.keeps_more:
        row["memory_error"] = row["memory_bytes"] / row["published_memory_bytes"] - 1
    return row


def compare_by_others(runs: Sequence[Run], rows: Sequence[dict[str, Any]], estimate: Callable[..., Any], cluster_of: Callable[[Run], Any]) -> None:
    """Adds to each row what is predicted with the shares of the rates that the other rows of its group sustained (plan/sustained.py): the same software on the
    same machine, never the row itself."""
    for run, row in zip(runs, rows, strict=True):
        others = [Sample(**other["sample"]) for other in rows if other["group"] == run.group and other is not row and "sample" in other]
        if "sample" not in row or len(others) < LEAST_OTHERS:
            continue
        sustained = find(others, f"the other rows of {run.group}")
        found = estimate(run.config, replace(cluster_of(run), sustained=sustained), schedule=run.schedule)
        row["sustained"] = {"kernels": sustained.kernels, "collectives": sustained.collectives}
        row["sustained_tokens_per_gpu_second"] = found.tokens_per_gpu_second
        row["sustained_error"] = found.tokens_per_gpu_second / row["published_tokens_per_gpu_second"] - 1


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors of each group, of all rows, and of the rows whose shape, layout and batch are published.

    `too_big` counts rows that are predicted not to fit on their GPUs, on which they ran.
    """
    groups = {name: [row for row in rows if row["group"] == name] for name in dict.fromkeys(row["group"] for row in rows)}
    groups["all"] = list(rows)
    groups["all, shape, layout and batch published"] = [row for row in rows if not any(_is_setting(key) for key in row["assumed"])]
    return [
        {
            "group": name, "rows": len(members), "on_a_bound": sum(_is_on_a_bound(row) for row in members),
            "too_big": sum(not row.get("fits", True) for row in members),
            **_errors(members, "speed_error", "speed"), **_errors(members, "sustained_error", "sustained"), **_errors(members, "memory_error", "memory"),
        }  # fmt: skip
        for name, members in groups.items()
    ]


def _is_on_a_bound(row: dict[str, Any]) -> bool:
    """Whether the share of collectives that the others gave is one that `find` may not pass: then it holds what else is not known."""
    return "sustained" in row and any(abs(1 / row["sustained"]["collectives"] - bound) < 1e-6 for bound in LINKS)


def _is_setting(key: str) -> bool:
    """Whether an assumption is about the run itself; what else there may be is its network, how FLOPs were counted, and if communication was overlapped."""
    return key.partition(".")[0] in Config.model_fields and key != "parallel.overlap"


def _errors(rows: Sequence[dict[str, Any]], key: str, name: str) -> dict[str, Any]:
    errors = [row[key] for row in rows if key in row]
    if not errors:
        return {f"{name}_rows": 0}
    return {
        f"{name}_rows": len(errors), f"{name}_mean_absolute": sum(map(abs, errors)) / len(errors), f"{name}_mean": sum(errors) / len(errors),
        f"{name}_worst": max(errors, key=abs),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------------------- showing


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: every row, then the errors by group."""
    yield "| run | GPUs | given as | tokens/s and GPU, published | predicted | error | by the others | error | GB, published | predicted | error | assumed |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        predicted = row.get("failed") or f"{row['tokens_per_gpu_second']:.0f}"
        cells = [row["id"], f"{row['gpus']}", row["given"], f"{row['published_tokens_per_gpu_second']:.0f}", predicted, _percent(row.get("speed_error")),
                 _whole(row.get("sustained_tokens_per_gpu_second")), _percent(row.get("sustained_error")),
                 _gb(row["published_memory_bytes"]), _gb(row.get("memory_bytes")), _percent(row.get("memory_error")), ", ".join(row["assumed"])]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield ""
    errors = "mean absolute | mean | worst"
    yield f"| group | rows | speed: {errors} | by the others: {errors} | on a bound | memory: rows | {errors} | too big |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for group in summary(rows):
        parts, others, memory = (
            " | ".join(_percent(group.get(f"{name}_{key}"), sign=key != "mean_absolute") for key in ("mean_absolute", "mean", "worst"))
            for name in ("speed", "sustained", "memory")
        )
        yield f"| {group['group']} | {group['rows']} | {parts} | {others} | {group['on_a_bound']} | {group['memory_rows']} | {memory} | {group['too_big']} |"


def formula_table(runs: Sequence[Run]) -> Iterator[str]:
    """Markdown: the MFU of every row that states one with its speed, under each convention."""
    yield f"| run | stated | {' | '.join(CONVENTIONS)} | nearest |"
    yield f"| --- | --- | {' | '.join('---' for _ in CONVENTIONS)} | --- |"
    for run in runs:
        if "mfu" not in run.published or next(iter(stated_speeds(run)), "MFU") == "MFU":
            continue
        found = {name: speed(run) * count(run.config) / (run.published["mfu_of"] * 1e12) for name, count in CONVENTIONS.items()}
        nearest = min(found, key=lambda name: abs(found[name] - run.published["mfu"]))
        yield f"| {run.id} | {_percent(run.published['mfu'], sign=False)} | {' | '.join(_percent(value, sign=False) for value in found.values())} | {nearest} |"


def kernel_table(cluster: Any) -> Iterator[str]:
    """Markdown: by how much the times of kernels differ from the points that were measured on a cluster's GPU."""
    yield "| kernel | points | mean absolute error | worst |"
    yield "| --- | --- | --- | --- |"
    for kernel, errors in relative_errors(cluster.gpu, cluster.rates).items():
        if errors:
            yield f"| {kernel} | {len(errors)} | {_percent(sum(map(abs, errors)) / len(errors), sign=False)} | {_percent(max(errors, key=abs))} |"


def _percent(share: float | None, sign: bool = True) -> str:
    return "" if share is None else f"{100 * share:+.1f} %" if sign else f"{100 * share:.1f} %"


def _whole(number: float | None) -> str:
    return "" if number is None else f"{number:.0f}"


def _gb(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIGA:.1f}"


def chosen(runs: Sequence[Run], names: Sequence[str] | None) -> list[Run]:
    """The rows of these ids and groups; all where none are named.

    Raises:
        ConfigError: there is no such row.
    """
    if not names:
        return list(runs)
    known = {run.id for run in runs} | {run.group for run in runs}
    if unknown := [name for name in names if name not in known]:
        groups = ", ".join(dict.fromkeys(run.group for run in runs))
        raise ConfigError(f"--rows {' '.join(unknown)}: there is no such row; groups are {groups}, and --list prints all ids")
    return [run for run in runs if run.id in names or run.group in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", metavar="ID", help="only these rows or groups")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    parser.add_argument("--formulas", action="store_true", help="the MFU that each count of FLOPs gives, instead of predictions")
    parser.add_argument("--kernels", metavar="CLUSTER", help="how far kernels' times are from a cluster's measured points, instead of predictions")
    parser.add_argument("--list", action="store_true", help="ids, groups and sources, instead of predictions")
    arguments = parser.parse_args()
    try:
        runs = chosen(load_runs(), arguments.rows)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.kernels is not None:
        print("\n".join(kernel_table(load_cluster(arguments.kernels))))
        return 0
    if arguments.list or arguments.formulas:
        for line in [f"{run.id}  {run.group}  {run.source}" for run in runs] if arguments.list else formula_table(runs):
            print(line)
        return 0
    from megatron_skywork.plan.estimate import estimate

    rows = [compare(run, estimate) for run in runs]
    compare_by_others(runs, rows, estimate, load_cluster_of)
    for line in [json.dumps({"rows": rows, "groups": summary(rows)}, indent=1)] if arguments.json else table(rows):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
