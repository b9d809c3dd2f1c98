"""What a run's numbers say, in sentences: the part of the report that is read when nothing else is.

Each finding is computed from the records, names its number, and carries how serious it is: `good`, `note` or `warn`. "At the end" is the mean over the last
tenth of the records.
"""

from __future__ import annotations

from megatron_skywork.report.finding import Finding
from megatron_skywork.report.load import Run
from megatron_skywork.report.router_findings import router_findings
from megatron_skywork.report.training_findings import continuity_findings, training_findings


def findings(run: Run) -> list[Finding]:
    """All findings of a run, the serious ones first."""
    found = [*training_findings(run), *(router_findings(run, run.router) if run.router is not None else []), *continuity_findings(run)]
    return sorted(found, key=lambda finding: ("warn", "good", "note").index(finding.level))
