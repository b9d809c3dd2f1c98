"""Three ways to lay experts over the ranks that split attention, compared: the argument of the Skywork-MoE report's appendix B, in figures.

For the same tensor-parallel degree tp, in megatron-core's degrees:

    EP inside TP    ep = tp, etp = 1    the report's "expert data parallel": the ranks that split attention each hold whole experts
    expert TP       ep = 1,  etp = tp   every expert split over the same ranks: rows are gathered, products are narrow
    EP over DP      ep = n,  etp = tp   experts split likewise, and dealt out over n data-parallel groups, which lie on other nodes
    whole, over DP  ep = E,  etp = 1    whole experts, one on each rank
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_skywork.config.rules import divisors
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.collective_time import Network
from megatron_skywork.plan.estimate import COLLECTIVES, Estimate, estimate
from megatron_skywork.plan.hardware import Cluster
from megatron_skywork.plan.layout_costs import changed
from megatron_skywork.plan.layouts import problems_of


@dataclass(frozen=True)
class ExpertLayout:
    """One of the three.

    Args:
        ep, etp: expert parallel degree, and tensor parallel degree inside an expert.
        crosses_nodes: whether the ranks that exchange rows lie on several nodes.
        estimate: None where a rule forbids it.
        exchange_seconds, communication_seconds: of a step on the stage that works most, what the experts' exchange takes, and that with tensor
            parallelism's collectives; recomputation's not counted.
        fullest_bytes: of the stage that needs most.
        problem: the rule.
    """

    name: str
    ep: int
    etp: int
    crosses_nodes: bool
    estimate: Estimate | None = field(repr=False)
    exchange_seconds: float = 0.0
    communication_seconds: float = 0.0
    fullest_bytes: int = 0
    problem: str | None = None


def expert_layouts(config: Config, cluster: Cluster) -> list[ExpertLayout]:
    """The three, experts dealt over data-parallel ranks and not split, and the configuration's own; all with its tp, pp, split and recomputation.

    Raises:
        ConfigError: a model without experts.
    """
    if config.moe is None:
        raise ConfigError("there is no moe section: a dense model has no experts to lay out")
    tp, experts = config.parallel.tp, config.moe.num_experts
    # As many data-parallel groups as the first layout deals experts to, or the fewest that the experts can be dealt to.
    groups = tp if tp > 1 and experts % tp == 0 else next((degree for degree in divisors(experts) if degree > 1), 1)
    own = (config.parallel.ep, config.parallel.etp)
    named = [("EP inside TP", (tp, 1)), ("expert TP", (1, tp)), ("EP over DP", (groups, tp)), ("whole, over DP", (experts, 1)), ("as given", own)]
    distinct: dict[tuple[int, int], str] = {}
    for name, degrees in named:
        distinct.setdefault(degrees, name)
    return [_foreseen(config, cluster, name + ", as given" * (degrees == own and name != "as given"), *degrees) for degrees, name in distinct.items()]


def _foreseen(config: Config, cluster: Cluster, name: str, ep: int, etp: int) -> ExpertLayout:
    candidate = changed(config, parallel={"ep": ep, "etp": etp})
    problems = problems_of(candidate, cluster.world_size)
    if problems:
        return ExpertLayout(name, ep, etp, False, None, problem=problems[0])
    crosses = Network(candidate, cluster.world_size, cluster).where("etp_ep").crosses
    foreseen = estimate(candidate, cluster)
    exchange, sent = foreseen.parts.get("ep", 0.0), sum(foreseen.parts.get(part, 0.0) for part in COLLECTIVES)
    return ExpertLayout(name, ep, etp, crosses, foreseen, exchange, sent, max(memory.total for memory in foreseen.memory))
