"""What the router records of a run say: which expert is dead and since when, which layer drops and what its coefficient did about it, whether gates decide.

Shapes: S recorded steps, L MoE layers, E experts, V evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_skywork.metrics import wording
from megatron_skywork.report.averages import nan_mean
from megatron_skywork.report.finding import Finding, cosine, listed, plural, whole_percent
from megatron_skywork.report.load import Run
from megatron_skywork.report.router_records import DEAD_BELOW, STARVED_BELOW, Router

# Max1/Max2 of a gate whose first choice is hardly preferred, and of one that leaves the second no weight.
FLAT_RATIO = 1.02
SATURATED_RATIO = 100.0
# Entropy over log E, likewise.
FLAT_ENTROPY = 0.98
SATURATED_ENTROPY = 0.15
# Mean cosine between experts that are still copies of each other.
COPIES_ABOVE = 0.99
# A coefficient this close to where its drop rate leads it has arrived.
_ARRIVED = 0.10


def router_findings(run: Run, router: Router) -> Iterator[Finding]:
    """All of them."""
    yield from _experts(router)
    yield from _revived(router)
    yield from _drops(run, router)
    yield from _coefficients(run, router)
    yield from _sharpness(router)
    yield from _similarity(router)
    yield from _changes(router)


def _experts(router: Router) -> Iterator[Finding]:
    relative_LE = router.relative_load_LE
    dead_LE = relative_LE < DEAD_BELOW
    if dead_LE.any():
        yield Finding("warn", _dead(router, dead_LE))
    places = np.argwhere((relative_LE < STARVED_BELOW) & ~dead_LE)
    if len(places):
        named = listed([f"expert {expert} of layer {router.layers[layer]} ({whole_percent(relative_LE[layer, expert])})" for layer, expert in places])
        count = f"{plural(len(places), 'starved expert')} of {relative_LE.size}"
        yield Finding("warn", f"{count}: {named} {_receive(len(places))} less than {whole_percent(STARVED_BELOW)} of an even share at the end.")
    if not (relative_LE < STARVED_BELOW).any():
        layer, expert = np.unravel_index(int(relative_LE.argmin()), relative_LE.shape)
        text = f"Every one of the {relative_LE.size} experts is in use; the least, expert {expert} of layer {router.layers[layer]}"
        yield Finding("good", f"{text}, receives {whole_percent(relative_LE[layer, expert])} of an even share.")
    balance_L, variation_L = (router.at_end(router.per_layer[name]) for name in ("load_max_over_mean", "load_variation"))
    if not np.isfinite(balance_L).any():
        return
    worst = int(np.nanargmax(balance_L))
    text = f"Load is least even in layer {router.layers[worst]}: its busiest expert has {balance_L[worst]:.2f} times the even share"
    text += f" (mean over layers {nan_mean(balance_L):.2f})" if len(balance_L) > 1 else ""
    yield Finding("note", f"{text}, and its load varies by {whole_percent(variation_L[worst])} of the mean.")


def _receive(number: int) -> str:
    return "receives" if number == 1 else "receive"


def _dead(router: Router, dead_LE: np.ndarray) -> str:
    """Which, since when, and what the coefficients of their layers did meanwhile."""
    relative_LE = router.relative_load_LE
    places = np.argwhere(dead_LE)
    # The longest dead are named first.
    order = sorted(places.tolist(), key=lambda place: np.nan_to_num(router.dead_since_LE[tuple(place)], nan=np.inf))
    parts = []
    for layer, expert in order:
        since = router.dead_since_LE[layer, expert]
        when = f", since step {int(since)}" if np.isfinite(since) and since > router.steps_S[0] else ", from the start" if np.isfinite(since) else ""
        parts.append(f"expert {expert} of layer {router.layers[layer]} ({wording.percent(float(relative_LE[layer, expert]))}{when})")
    text = f"{plural(len(places), 'dead expert')} of {relative_LE.size}: {listed(parts)} {_receive(len(places))}"
    text += f" less than {whole_percent(DEAD_BELOW)} of an even share at the end."
    coefficients_SL = router.per_layer["coefficient"]
    first = order[0][0]
    if len(router.steps_S) > 1 and np.isfinite(coefficients_SL[:, first]).any():
        start, end = router.at_start(coefficients_SL)[first], router.at_end(coefficients_SL)[first]
        moved = f"stayed at {end:.4f}" if f"{start:.4f}" == f"{end:.4f}" else f"went from {start:.4f} to {end:.4f}"
        text += f" The auxiliary coefficient of layer {router.layers[first]} {moved} meanwhile."
    return text


def _revived(router: Router) -> Iterator[Finding]:
    """Experts that were dead for a twentieth of the run or more, and are not at the end."""
    history = router.history
    width_C = np.diff(history.edges)
    dead_for_LE = np.tensordot(width_C / width_C.sum(), history.dead_CLE, axes=(0, 0))
    places = np.argwhere((dead_for_LE >= 0.05) & (router.relative_load_LE >= DEAD_BELOW))
    if len(places):
        parts = []
        for layer, expert in places:
            last = int(np.flatnonzero(history.dead_CLE[:, layer, expert])[-1])
            parts.append(f"expert {expert} of layer {router.layers[layer]} (last dead about step {int(history.edges[last + 1])})")
        were = "was dead for a while and came" if len(places) == 1 else "were dead for a while and came"
        yield Finding("note", f"{plural(len(places), 'expert')} {were} back: {listed(parts)}.")


def _drops(run: Run, router: Router) -> Iterator[Finding]:
    drops_SL = router.per_layer["drop_rate"]
    if not np.isfinite(drops_SL).any():
        return
    if np.nansum(drops_SL) == 0:
        capacity = run.setting("moe.capacity_factor")
        reason = "no capacity factor is set" if capacity is None else f"the capacity factor of {capacity:g} was never reached"
        yield Finding("note", f"Nothing was dropped: {reason}.")
        return
    drops_L, before_L = router.at_end(drops_SL), router.at_start(drops_SL)
    worst = int(np.nanargmax(drops_L))
    mean, before = float(nan_mean(drops_L)), float(nan_mean(before_L))
    text = f"Layer {router.layers[worst]} drops most: {wording.percent(float(drops_L[worst]))} of its assignments at the end"
    text += f", against {wording.percent(mean)} on average over layers" if len(drops_L) > 1 else ""
    long = len(router.steps_S) > 2 * router.window
    text += f" (at the start it dropped {wording.percent(float(before_L[worst]))})" if long and np.isfinite(before_L[worst]) else ""
    yield Finding("warn" if drops_L[worst] > 0.10 else "note", f"{text}. {_response(run, router, worst)}".rstrip())
    if long:
        direction = "fell" if mean < before else "rose"
        yield Finding("good" if mean < before else "warn", f"The mean drop rate {direction} from {wording.percent(before)} to {wording.percent(mean)}.")


def _response(run: Run, router: Router, layer: int) -> str:
    """What the coefficient of a layer did, and whether it is where its drop rate leads it: alpha = min(xi * d, alpha_max)."""
    coefficients_SL = router.per_layer["coefficient"]
    start, end = router.at_start(coefficients_SL)[layer], router.at_end(coefficients_SL)[layer]
    if not np.isfinite(start) or not np.isfinite(end):
        return ""
    if run.setting("moe.adaptive.enabled") is not True:
        moved = f"is fixed at {end:g}" if start == end else f"went from {start:.3g} to {end:.3g} on schedule"
        return f"Its auxiliary coefficient {moved}: nothing answers the drops."
    moved = f"stayed at {end:.4f}" if f"{start:.4f}" == f"{end:.4f}" else f"{'rose' if end > start else 'fell'} from {start:.4f} to {end:.4f}"
    text = f"Its adaptive coefficient {moved}"
    sensitivity, maximum = run.setting("moe.adaptive.sensitivity"), run.setting("moe.adaptive.maximum")
    drop = float(router.at_end(router.per_layer["drop_rate"])[layer])
    if not isinstance(sensitivity, (int, float)) or not isinstance(maximum, (int, float)) or drop <= 0:
        return f"{text}."
    target = min(sensitivity * drop, maximum)
    led = f"{sensitivity:g} x {wording.percent(drop)}"
    how = f"the maximum, where {led} would be {sensitivity * drop:.4f}" if target == maximum else led
    if abs(end - target) <= _ARRIVED * target:
        place = "at" if end > 0.98 * maximum else "near"
        return f"{text}: it is {place} {how}." if target == maximum else f"{text} and has arrived where its drop rate leads it, at {target:.4f} ({how})."
    return f"{text} and is still on its way {'down' if end > target else 'up'} to {target:.4f} ({how})."


def _coefficients(run: Run, router: Router) -> Iterator[Finding]:
    coefficients_SL = router.per_layer["coefficient"]
    if run.setting("moe.adaptive.enabled") is not True or not np.isfinite(coefficients_SL).any():
        return
    end_L = router.at_end(coefficients_SL)
    low, high = int(np.nanargmin(end_L)), int(np.nanargmax(end_L))
    text = f"Adaptive coefficients end between {end_L[low]:.4f} (layer {router.layers[low]}) and {end_L[high]:.4f} (layer {router.layers[high]})."
    if f"{end_L[low]:.4f}" == f"{end_L[high]:.4f}":
        text = f"Adaptive coefficients end at {end_L[high]:.4f} in every layer."
    maximum, momentum = run.setting("moe.adaptive.maximum"), run.setting("moe.adaptive.momentum")
    if isinstance(maximum, (int, float)):
        capped = int((end_L > 0.98 * maximum).sum())
        text += f" {plural(capped, 'layer')} {'is' if capped == 1 else 'are'} at the maximum of {maximum:g}." if capped else ""
    steps = int(run.steps_S[-1])
    if isinstance(momentum, (int, float)) and 0 < momentum < 1 and steps < 3 / (1 - momentum):
        left = whole_percent(momentum**steps)
        text += f" They keep {momentum:g} of their value each step, so after {plural(steps, 'step')} {left} of the starting value is still in them."
    yield Finding("note", text)


def _sharpness(router: Router) -> Iterator[Finding]:
    entropy_L = router.at_end(router.entropy_SL)
    ratios_SL = router.per_layer["max1_over_max2"]
    start_L, ratio_L = router.at_start(ratios_SL), router.at_end(ratios_SL)
    if np.isfinite(entropy_L).any():
        flat = f"almost flat: its entropy is above {whole_percent(FLAT_ENTROPY)}"
        saturated = f"saturated: it has all but collapsed onto one expert per token, its entropy is below {whole_percent(SATURATED_ENTROPY)}"
        for chosen_L, state in ((entropy_L > FLAT_ENTROPY, flat), (entropy_L < SATURATED_ENTROPY, saturated)):
            layers = [f"{router.layers[index]} ({whole_percent(entropy_L[index])})" for index in np.flatnonzero(chosen_L)]
            if layers:
                yield Finding("warn", f"The gate of {'layer' if len(layers) == 1 else 'layers'} {listed(layers)} is {state} of the largest possible.")
    if not np.isfinite(ratio_L).any():
        return
    lowest, highest = int(np.nanargmin(ratio_L)), int(np.nanargmax(ratio_L))
    text = f"The first choice is on average {nan_mean(ratio_L):.2f} times as probable as the second"
    text += f" ({nan_mean(start_L):.2f} at the start)" if len(router.steps_S) > 2 * router.window and np.isfinite(start_L).any() else ""
    text += f"; least so in layer {router.layers[lowest]}, {ratio_L[lowest]:.2f} times" if len(ratio_L) > 1 else ""
    if ratio_L[lowest] < FLAT_RATIO:
        text += ": near 1 the choice is a coin toss, which gate-logit normalization is there to prevent"
    yield Finding("warn" if ratio_L[lowest] < FLAT_RATIO else "note", f"{text}.")
    if ratio_L[highest] > SATURATED_RATIO:
        text = f"The gate of layer {router.layers[highest]} is saturated: its first choice is {ratio_L[highest]:.0f} times as probable as the second"
        yield Finding("warn", f"{text}, so the second expert is run and hardly used.")


def _similarity(router: Router) -> Iterator[Finding]:
    evaluations = router.evaluations
    known = np.isfinite(evaluations.similarity_VL).any(axis=1) if evaluations is not None else np.zeros(0, dtype=bool)
    if evaluations is None or not known.any():
        return
    steps, values_VL = evaluations.steps_V[known], evaluations.similarity_VL[known]
    first, last = float(nan_mean(values_VL[0])), float(nan_mean(values_VL[-1]))
    worst = int(np.nanargmax(values_VL[-1]))
    most = f"most alike are those of layer {router.layers[worst]}, at {cosine(values_VL[-1][worst])}" if len(router.layers) > 1 else ""
    if len(steps) == 1:
        yield Finding("note", f"Expert similarity is {cosine(last)} at step {steps[0]}, the mean cosine over pairs of experts{'; ' + most if most else ''}.")
        return
    moved = "fell" if last < first - 0.0005 else "rose" if last > first + 0.0005 else "stayed"
    text = f"Expert similarity {moved} from {cosine(first)} at step {steps[0]} to {cosine(last)} at step {steps[-1]}{'; ' + most if most else ''}."
    if last > COPIES_ABOVE:
        yield Finding("warn", f"{text} Experts are still copies of each other: they have learned nothing apart.")
    else:
        yield Finding("good" if first > 0.5 and last < first - 0.01 else "note", text)


def _changes(router: Router) -> Iterator[Finding]:
    evaluations = router.evaluations
    known = np.isfinite(evaluations.changed_VL).any(axis=1) if evaluations is not None else np.zeros(0, dtype=bool)
    if evaluations is None or not known.any():
        return
    steps, values_VL = evaluations.steps_V[known], evaluations.changed_VL[known]
    last_L = values_VL[-1]
    worst = int(np.nanargmax(last_L))
    share = wording.percent(float(nan_mean(last_L)))
    text = f"At the evaluation at step {steps[-1]}, {share} of the probe's tokens went to other experts than at the one before"
    text += f", most in layer {router.layers[worst]} ({wording.percent(float(last_L[worst]))})" if len(last_L) > 1 else ""
    text += f"; at step {steps[0]} it was {wording.percent(float(nan_mean(values_VL[0])))}" if len(steps) > 1 else ""
    yield Finding("note", f"{text}.")
