"""GPUs, links between them, and clusters: what a plan reckons with, each figure with its source.

`machines.yaml` beside this file holds the published machines and says where each number is from. A cluster is a YAML file with a section `cluster` (other
sections, such as `launch`, are left alone), or a packaged machine by name and nodes, `dgx_h100:16`:

    cluster:
      gpu: A800-80G                  # of machines.yaml, or what torch calls it ("NVIDIA A800-SXM4-80GB"), or a section with own numbers
      nodes: 192
      gpus_per_node: 8
      inside: NVLink-A800            # of machines.yaml, or own numbers, or `measured`; unset: what the GPU comes with
      between: {link: RoCE-200, per: node, count: 4}     # four ports share a node's GPUs; with `per: gpu` each GPU has its own
      sustained: {kernels: 0.9, collectives: 0.7, source: our last run}      # what training keeps of those rates; unset: all
      rates: measured.yaml           # a file of tools/calibrate.py, looked for beside this one; or its rates as a section; unset: published ones

`between` is one GPU's share of the network: all ports divided by the GPUs of a node. That is what a GPU has in an all-to-all, and in a ring with one rank on
each node while its neighbours are in rings of their own. A ring with k ranks on each node leaves the node at one of them and comes back at another, and
libraries lay k such rings at once, so that it has k shares, up to what the link inside carries (collective_time.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from megatron_skywork.config.problems import nearest, shown
from megatron_skywork.config.yaml_strict import read_yaml
from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.cluster_file import ClusterSection, Network, OwnGpu, OwnLink, checked
from megatron_skywork.plan.rates import Rates, alpha_beta

MEASURED = "measured"
_PACKAGED = re.compile(r"([a-z][a-z0-9_]*)(?::([1-9][0-9]*))?$")


@dataclass(frozen=True)
class Link:
    """One GPU's way to others.

    Args:
        name: of the link.
        bytes_per_second: what collectives get of it, in one direction, one GPU's share.
        latency_seconds: of one step of a ring, or one message.
        source: of both numbers.
        peak_bytes_per_second: the data sheet's, likewise in one direction and one GPU's share.
    """

    name: str
    bytes_per_second: float
    latency_seconds: float
    source: str
    peak_bytes_per_second: float


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: in machines.yaml, or the device's own.
        memory_bytes: all that torch can allocate from.
        peak_flops: by precision (bf16, fp16, fp32, fp8), dense; fp32 without TF32.
        memory_bytes_per_second: the data sheet's.
        sources: of each of these.
    """

    name: str
    memory_bytes: int
    peak_flops: dict[str, float]
    memory_bytes_per_second: float
    sources: dict[str, str]


@dataclass(frozen=True)
class Sustained:
    """What training keeps of the rates of single kernels and collectives; 1 where nobody found out.

    Args:
        kernels: power limits, gaps between kernels, kernels that a software does not fuse.
        collectives: ranks that wait for each other, other traffic on the same links.
        source: the runs it was found with.
    """

    kernels: float = 1.0
    collectives: float = 1.0
    source: str = ""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs.

    Args:
        inside: between the GPUs of a node.
        between: one GPU's share of its node's network; on a single node, where nothing uses it, `inside`.
        rates: what the GPU reaches of its peaks.
        source: of nodes and network.
        sustained: what remains of rates and links in training.
    """

    name: str
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    inside: Link
    between: Link
    rates: Rates
    source: str = ""
    sustained: Sustained = Sustained()

    @property
    def world_size(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus_per_node


def load_cluster(name_or_path: str) -> Cluster:
    """A cluster from a file, or a packaged machine by name and number of nodes.

    Args:
        name_or_path: `configs/clusters/a800_192x8.yaml`, `dgx_h100:16`.

    Raises:
        ConfigError: with every problem that was found.
    """
    path, packaged = Path(name_or_path), _PACKAGED.match(name_or_path)
    if packaged and packaged[1] in _catalogue()["machines"] and not path.exists():
        values = {**_catalogue()["machines"][packaged[1]], "name": name_or_path, "nodes": int(packaged[2] or 1)}
        return _cluster(values, name_or_path, Path())
    if packaged and not path.exists():
        machines = list(_catalogue()["machines"])
        match = nearest(packaged[1], machines)
        meant = f"did you mean {match[0]}?" if match else f"machines are {', '.join(machines)}, with `:16` behind them for 16 nodes"
        raise ConfigError(f"{name_or_path}: there is no such file and no such machine; {meant}")
    values = _section_of_file(path)
    return _cluster({"name": path.stem, **values}, str(path), path.parent)


def node_size(cluster: Cluster, overrides: Sequence[str]) -> str:
    """The override that gives a run the cluster's node size.

    Raises:
        ConfigError: another size was typed.
    """
    key = "parallel.gpus_per_node"
    typed = [word for word in overrides if word.startswith(f"{key}=") and word != f"{key}={cluster.gpus_per_node}"]
    if typed:
        raise ConfigError(f"{typed[-1]}: nodes of {cluster.name} have {cluster.gpus_per_node} GPUs; leave it out, or name another cluster")
    return f"{key}={cluster.gpus_per_node}"


def gpu_names() -> list[str]:
    """The GPUs of machines.yaml."""
    return list(_catalogue()["gpus"])


def link_names() -> list[str]:
    """The links of machines.yaml."""
    return list(_catalogue()["links"])


def packaged_gpu(name: str) -> Gpu | None:
    """A GPU of machines.yaml by its name there or by what torch calls it; None if it is not there.

    torch's name is matched without the maker's: "NVIDIA H100 80GB HBM3" is "H100 80GB HBM3".
    """
    plain = name.removeprefix("NVIDIA ").lower()
    for known, values in _catalogue()["gpus"].items():
        if plain in {known.lower(), *(other.lower() for other in values["names"])}:
            sources = {field: _catalogue()["sources"].get(source, source) for field, source in values["sources"].items()}
            return Gpu(known, values["memory_bytes"], dict(values["peak_flops"]), values["memory_bytes_per_second"], sources)
    return None


def one_node(gpu: str, gpus: int) -> Cluster | None:
    """A node of so many GPUs of machines.yaml, with the link they come with; None where the GPU, named as for `packaged_gpu`, is not there."""
    known = packaged_gpu(gpu)
    return None if known is None else _cluster({"name": f"a node of {known.name}", "gpu": gpu, "nodes": 1, "gpus_per_node": gpus}, gpu, Path())


def packaged_link(name: str) -> Link:
    """A link of machines.yaml.

    Raises:
        ConfigError: naming the nearest one.
    """
    links = _catalogue()["links"]
    if name not in links:
        raise ConfigError(f"{shown(name)}: there is no such link; {_meant(name, list(links))}, or give bytes_per_second, latency_seconds and source")
    return Link(name, **links[name])


def published_rates(gpu: str) -> Rates:
    """Published points of a GPU of machines.yaml; no points where nobody published any."""
    values = _catalogue()["gpus"][gpu]
    values = _catalogue()["gpus"][values["rates_of"]] if "rates_of" in values else values
    return Rates.model_validate(values.get("rates", {"source": "the reference's shares of the peaks (plan.kernels)"}))


# ------------------------------------------------------------------------------------------------------------------------------ reading


@cache
def _catalogue() -> dict[str, Any]:
    path = Path(__file__).with_name("machines.yaml")
    document = read_yaml(path.read_text(encoding="utf-8"), path.name)
    assert not document.problems, document.problems
    return document.values


def _section_of_file(path: Path) -> dict[str, Any]:
    """The section `cluster` of a file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        beside = sorted(item.name for item in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        match = nearest(path.name, beside)
        raise ConfigError(f"{path}: there is no such file" + (f"; did you mean {path.parent / match[0]}?" if match else "")) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    document = read_yaml(text, str(path))
    if document.problems:
        raise ConfigError(document.problems)
    values = document.values.get("cluster") if isinstance(document.values, dict) else None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: there is no section `cluster:` with at least gpu, nodes and gpus_per_node")
    return values


def _cluster(values: dict[str, Any], origin: str, folder: Path) -> Cluster:
    problems: list[str] = []
    section = checked(ClusterSection, values, "cluster", problems)
    rates = _rates(values.get("rates"), folder, problems)
    gpu = _gpu(values.get("gpu"), rates, problems) if "gpu" in values else None
    inside = between = None
    if section is not None:
        inside = _inside(section, gpu, rates, problems)
        between = _between(section, inside, rates, problems)
    if section is not None and not section.name.isprintable():
        problems.append("cluster.name has characters that cannot be printed; choose another name")
    if rates is not None and gpu is not None and rates.precision not in gpu.peak_flops and (rates.matmul or rates.attention or rates.best_matmul_tflops):
        problems.append(f"cluster.rates.precision={rates.precision}: there is no figure of {gpu.name} for it; add one to gpu.peak_flops, or measure in "
                        f"{' or '.join(gpu.peak_flops)}")  # fmt: skip
    if problems:
        raise ConfigError([f"{origin}: {problem}" for problem in problems])
    assert section is not None and gpu is not None and inside is not None and between is not None
    if rates is None:
        rates = published_rates(gpu.name) if gpu.name in gpu_names() else Rates(source="the reference's shares of the peaks (plan.kernels)")
    return Cluster(section.name, gpu, section.nodes, section.gpus_per_node, inside, between, rates, section.source, Sustained(**section.sustained.model_dump()))


def _rates(given: Any, folder: Path, problems: list[str]) -> Rates | None:
    """Measured rates; None where the cluster has none of its own."""
    if given is None:
        return None
    if isinstance(given, dict):
        return checked(Rates, given, "cluster.rates", problems)
    if not isinstance(given, str):
        problems.append(f"cluster.rates={shown(given)}: this must be a file of tools/calibrate.py, or a section")
        return None
    try:
        inner = _section_of_file(folder / given).get("rates")
    except ConfigError as error:
        problems += [f"cluster.rates={shown(given)}: {problem}" for problem in error.problems]
        return None
    if not isinstance(inner, dict):
        problems.append(f"cluster.rates={shown(given)}: its section `cluster` holds no rates; python tools/calibrate.py --write FILE makes such a file")
        return None
    return checked(Rates, inner, f"cluster.rates ({given})", problems)


def _gpu(given: Any, rates: Rates | None, problems: list[str]) -> Gpu | None:
    if isinstance(given, dict):
        own = checked(OwnGpu, given, "cluster.gpu", problems)
        if own is None:
            return None
        return Gpu(own.name, own.memory_bytes, {str(name): flops for name, flops in own.peak_flops.items()}, own.memory_bytes_per_second, {
            "memory_bytes": own.source, "peak_flops": own.source, "memory_bytes_per_second": own.source})  # fmt: skip
    if not isinstance(given, str):
        problems.append(f"cluster.gpu={shown(given)}: this must be a name ({', '.join(gpu_names())}) or a section with name, memory_bytes, peak_flops, "
                        "memory_bytes_per_second and source")  # fmt: skip
        return None
    known = packaged_gpu(given)
    if known is None and rates is not None and rates.memory_bytes and rates.matmul and rates.copy_:
        best = f"the best rate that was measured, not a data sheet's ({rates.measured.get('command', 'tools/calibrate.py')})"
        flops: dict[str, float] = {rates.precision: max(point.tflops for point in rates.matmul) * 1e12}
        bandwidth = max(point.bytes_per_second for point in rates.copy_)
        sources = {"memory_bytes": rates.source or best, "peak_flops": best, "memory_bytes_per_second": best}
        return Gpu(given, rates.memory_bytes, flops, bandwidth, sources)
    if known is None:
        problems.append(f"cluster.gpu={shown(given)}: there is no figure of it; {_meant(given, gpu_names())}, or measure it: "
                        "python tools/calibrate.py --write FILE")  # fmt: skip
    return known


def _inside(section: ClusterSection, gpu: Gpu | None, rates: Rates | None, problems: list[str]) -> Link | None:
    if section.inside is not None:
        return _link(section.inside, "cluster.inside", rates, problems)
    if section.gpus_per_node == 1:
        rate = gpu.memory_bytes_per_second if gpu is not None else 0.0
        return Link("memory", rate, 0.0, "one GPU in a node: what it sends itself is a copy in its memory", rate)
    known = _catalogue()["gpus"].get(gpu.name if gpu else "")
    if known is not None:
        return packaged_link(known["inside"])
    problems.append(f"cluster.inside is not set, and {gpu.name if gpu else 'this GPU'} comes with no known link: {', '.join(link_names())}, `measured`, or a "
                    "section with bytes_per_second, latency_seconds and source")  # fmt: skip
    return None


def _between(section: ClusterSection, inside: Link | None, rates: Rates | None, problems: list[str]) -> Link | None:
    if section.between is None:
        if section.nodes == 1:
            return inside
        problems.append(f"cluster.between is not set, and nodes={section.nodes} need a network: "
                        "{link: InfiniBand-NDR, per: gpu}, or {link: RoCE-200, per: node, count: 4}")  # fmt: skip
        return None
    if section.between == MEASURED:
        return _link(MEASURED, "cluster.between", rates, problems, section.gpus_per_node)
    network = checked(Network, section.between, "cluster.between", problems)
    port = _link(network.link, "cluster.between.link", rates, problems) if network is not None else None
    if network is None or port is None:
        return None
    share = network.count / (section.gpus_per_node if network.per == "node" else 1)
    ports = f"{network.count} x " if network.count > 1 else ""
    return replace(port, name=f"{ports}{port.name} per {network.per}", bytes_per_second=port.bytes_per_second * share,
                   peak_bytes_per_second=port.peak_bytes_per_second * share)  # fmt: skip


def _link(given: Any, key: str, rates: Rates | None, problems: list[str], ranks_per_node: int = 1) -> Link | None:
    if isinstance(given, dict):
        own = checked(OwnLink, given, key, problems)
        return None if own is None else Link(own.name, own.bytes_per_second, own.latency_seconds, own.source, own.peak_bytes_per_second or own.bytes_per_second)
    if given == MEASURED:
        points = [point for point in rates.links if point.ranks > 1] if rates is not None else []
        if not points:
            problems.append(f"{key}=measured: the rates hold no links; run tools/calibrate.py under torchrun on the ranks that the link joins")
            return None
        latency, speed = alpha_beta(points, ranks_per_node)
        command = rates.measured.get("command", "tools/calibrate.py") if rates is not None else ""
        return Link(MEASURED, speed, latency, f"{len(points)} collectives of {points[0].ranks} ranks, {command}", speed)
    if not isinstance(given, str):
        problems.append(f"{key}={shown(given)}: this must be one of {', '.join(link_names())}, or `measured`, or a section with bytes_per_second, "
                        "latency_seconds and source")  # fmt: skip
        return None
    try:
        return packaged_link(given)
    except ConfigError as error:
        problems += [f"{key}={problem}" for problem in error.problems]
        return None


def _meant(name: str, known: list[str]) -> str:
    """The nearest of the known names, by spelling or by a common beginning, or all of them."""
    plain = name.removeprefix("NVIDIA ").lower()
    begins = [candidate for candidate in known if candidate.lower().startswith(re.split(r"[-_ ]", plain)[0])]
    match = begins or nearest(plain, known, 2)
    return f"did you mean {' or '.join(match)}?" if match else f"known are {', '.join(known)}"
