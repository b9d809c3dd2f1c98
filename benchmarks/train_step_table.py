"""The plan and the result of benchmarks/train_step.py as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_TOP_OPERATIONS = 6


def plan_text(plan: dict[str, Any]) -> Iterator[str]:
    """What will be run."""
    work = plan["workload"]
    yield "shape: " + ", ".join(f"{name} {value}" for name, value in work["shape"].items())
    yield (f"{plan['parameters'] / 1e6:.1f} M parameters, {plan['active_parameters'] / 1e6:.1f} M active; {plan['tokens_per_step']} tokens a step; "
           f"{work['precision']}; seed {work['seed']}")  # fmt: skip
    yield plan["flops_formula"]
    yield (f"a step: {plan['flops_per_token'] * plan['tokens_per_step'] / 1e12:.4g} TFLOP; the Skywork-MoE report would count "
           f"{plan['report_flops_per_token'] / plan['flops_per_token']:.3f} times as many (6 N_active + 12 L A S)")  # fmt: skip
    clock = "wall clock" if plan["clock"] == "wall" else "seconds of processor time, over all threads"
    turns = "one process at a time" if plan["one_at_a_time"] else "all processes stay"
    yield (f"{plan['repetitions']} repetitions of {plan['steps']} steps after {plan['warmup']} not counted, {turns}, {clock}, "
           f"router: {plan['router']}")  # fmt: skip
    yield "expected memory, roughly: " + ", ".join(f"{name} {gib(size)}" for name, size in plan["expected_bytes"].items()) + " GiB"


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    yield f"{result['command']}"
    yield (f"{result['device']} ({result['cpu']}), {result['threads']} threads, {result['cores']} cores, load {result['load'][0]:.1f}; "
           f"Python {result['python']}, {versions}")  # fmt: skip
    yield from plan_text(result)
    peak, matmul = result["peak_tflops"], result["matmul"]
    yield f"peak: {f'{peak:g} TFLOP/s by data sheet; MFU = TFLOP/s / {peak:g}' if peak else 'no data sheet figure known, hence no MFU'}"
    yield (f"torch's product of {matmul['size']} x {matmul['size']} reached {matmul['tflops']:.4g} TFLOP/s ({matmul['tflops_before']:.4g} before the run, "
           f"{matmul['tflops_after']:.4g} after)")  # fmt: skip
    yield ""
    yield from speed_lines(result["rows"])
    yield ""
    yield from ratio_lines(result)
    yield ""
    yield from part_lines(result["cases"])


def speed_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Time, speed and memory of every case."""
    yield (f"{'contender':13}{'router':10}{'step s, quartiles':>28}{'tokens/s':>10}{'TFLOP/s':>11}{'MFU':>8}{'of matmul':>11}{'report MFU':>12}{'peak GiB':>10}"
           f"{'above start':>13}{'kept':>8}{'max load':>10}{'loss, first and last':>22}")  # fmt: skip
    for row in rows:
        name = f"{row['contender']:13}{row['router']:10}"
        if "step_seconds" in row:
            time = f"{row['step_seconds']:.4f}  {row['step_seconds_p25']:.4f} .. {row['step_seconds_p75']:.4f}"
            losses = f"{row['first_loss']:.3f} {row['last_loss']:.3f}"
            load = f"{row['load_max_over_mean']:.2f}" if row["load_max_over_mean"] is not None else "-"
            yield (f"{name}{time:>28}{row['tokens_per_second']:10.0f}{row['tflops_per_device']:11.4g}{percent(row['mfu']):>8}{percent(row['of_matmul']):>11}"
                   f"{percent(row['report_mfu']):>12}{gib(row['peak_bytes']):>10}{gib(row['peak_bytes'] - row['start_bytes']):>13}{percent(row['kept']):>8}"
                   f"{load:>10}{losses:>22}")  # fmt: skip
        if row["failed"]:
            yield f"{name}not measured{' to the end' if 'step_seconds' in row else ''}: {row['failed']}"
    yield ("MFU counts no assignment as dropped; kept and max load are after dropping. The losses of hf include its auxiliary loss (0.02 when even), "
           "and it has taken fewer steps than those with two kinds of router.")  # fmt: skip


def ratio_lines(result: dict[str, Any]) -> Iterator[str]:
    """Ratios beside the goals."""
    yield f"{'time':28}{'router':10}{'median':>8}{'quartiles':>18}   goal"
    for ratio in result["ratios"]:
        goal = "-"
        if ratio["goal"] is not None:
            goal = f"{'at most' if ratio['at_most'] else 'at least'} {ratio['goal']:g}: {'reached' if ratio['reached'] else 'not reached'}"
        spread = f"{ratio['p25']:.3f} .. {ratio['p75']:.3f}"
        yield f"{ratio['name']:28}{ratio['router']:10}{ratio['median']:8.3f}{spread:>18}   {goal}"
    for ratio in result["memory_ratios"]:
        yield (f"peak memory {ratio['name']}: {ratio['peak']:.3f} (above start {ratio['above_start']:.3f}); goal at most 1: "
               f"{'reached' if ratio['reached'] else 'not reached'}")  # fmt: skip
    if result["mfu_goal"]:
        found = dict(result["mfu_goal"])
        wanted = found.pop("goal")
        reached = (f"{name} {percent(row['mfu'])} ({percent(row['kept'])} of the assignments kept)" for name, row in found.items())
        yield f"MFU with a real router, goal at least {percent(wanted)}: {', '.join(reached)}"


def part_lines(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Where the time goes."""
    measured = [case for case in cases if "parts" in case]
    if not measured:
        return
    names = list(measured[0]["parts"]["shares"])
    yield f"{'share of a step':23}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in names) + f"{'idle (within)':>16}"
    for case in measured:
        shares = "".join(f"{percent(share):>{max(9, len(name) + 2)}}" for name, share in case["parts"]["shares"].items())
        yield f"{case['contender']:13}{case['router']:10}{shares}{percent(case['parts']['idle']):>16}"
    for case in measured:
        operations = ", ".join(f"{operation['name']} {percent(operation['share'])}" for operation in case["parts"]["operations"][:_TOP_OPERATIONS])
        yield f"{case['contender']:13}{case['router']:10}{operations}"


def percent(share: float | None) -> str:
    """A share, or a dash."""
    return "-" if share is None else f"{100 * share:.1f}%"


def gib(num_bytes: float) -> str:
    """Bytes as GiB, without the unit."""
    return f"{num_bytes / 2**30:.2f}"
