"""GPUs, links and clusters: every figure has a source, every file loads, every mistake is answered with what to type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_skywork.errors import ConfigError
from megatron_skywork.metrics.throughput import peak_tflops
from megatron_skywork.plan import hardware
from megatron_skywork.plan.hardware import Sustained, gpu_names, link_names, load_cluster, packaged_gpu, packaged_link, published_rates
from megatron_skywork.plan.rates import LinkPoint, alpha_beta, least_squares

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted(path for path in (ROOT / "configs" / "clusters").glob("*.yaml") if "cluster" in yaml.safe_load(path.read_text(encoding="utf-8")))
CATALOGUE = yaml.safe_load(Path(hardware.__file__).with_name("machines.yaml").read_text(encoding="utf-8"))

WHOLE = "cluster: {gpu: H100-80G, nodes: 2, gpus_per_node: 8, between: {link: InfiniBand-NDR, per: gpu}}\n"
ONE = "cluster: {gpu: H200, nodes: 1, gpus_per_node: 8"
CPU_RATES = """
    rates:
      memory_bytes: 16000000000
      precision: fp32
      matmul: [{rows: 256, inner: 256, columns: 256, tflops: 0.2}, {rows: 64, inner: 64, columns: 64, tflops: 0.1}]
      copy: [{bytes: 1000000, bytes_per_second: 2.0e10}]
"""


def written(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return str(folder / "mine.yaml")


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_cluster(written(folder, text))
    return raised.value.problems


# ------------------------------------------------------------------------------------------------------------------------------ the catalogue


@pytest.mark.parametrize("name", gpu_names())
def test_every_figure_of_a_gpu_has_a_source(name: str):
    gpu = packaged_gpu(name)
    assert gpu is not None and set(gpu.sources) == {"memory_bytes", "peak_flops", "memory_bytes_per_second"}
    assert all(len(source) > 30 for source in gpu.sources.values()), "a source is a sentence, not a key that nothing explains"
    assert {"bf16", "fp16", "fp32"} <= set(gpu.peak_flops) and published_rates(name).source


def test_every_figure_of_a_link_has_a_source_and_is_one_direction():
    for name in link_names():
        link = packaged_link(name)
        assert 0 < link.bytes_per_second < link.peak_bytes_per_second and link.latency_seconds > 0
        printed = re.match(r"([\d.]+) (GB|TB|Gb)/s (in both directions together|a direction)", link.source)
        assert printed is not None, link.source
        rate = float(printed[1]) * {"GB": 1e9, "TB": 1e12, "Gb": 1e9 / 8}[printed[2]]
        assert link.peak_bytes_per_second == pytest.approx(rate / (2 if "both" in printed[3] else 1))


def test_data_sheets_are_read_as_dense_rates():
    """Independent of the file: the tensor cores of an SM, their FLOPs a clock and the boost clock (NVIDIA's architecture papers of the A100 and H100)."""
    a100, h100 = packaged_gpu("A100-80G"), packaged_gpu("H100-80G")
    assert a100 is not None and h100 is not None
    assert a100.peak_flops["bf16"] == pytest.approx(108 * 4 * 512 * 1.410e9, rel=0.01)
    assert a100.peak_flops["fp32"] == pytest.approx(108 * 64 * 2 * 1.410e9, rel=0.01)
    assert h100.peak_flops["bf16"] == pytest.approx(132 * 4 * 1024 * 1.830e9, rel=0.01)
    assert h100.peak_flops["fp8"] == pytest.approx(2 * h100.peak_flops["bf16"], rel=0.01)
    # Memory: 5 stacks of 1024 bits, two transfers a clock of 1,593 MHz (A100 80 GB).
    assert a100.memory_bytes_per_second == pytest.approx(5 * 1024 / 8 * 2 * 1.593e9, rel=0.01)


def test_published_attention_points_agree_with_each_other():
    """FlashAttention-2's figures 5d and 6d against its 4d (forward and backward together), which none of the points is read from."""
    for point, both in zip(published_rates("A100-80G").attention, (99, 133, 155, 173, 182, 189), strict=True):
        assert point.backward_tflops is not None
        assert 3.5 / (1 / point.forward_tflops + 2.5 / point.backward_tflops) == pytest.approx(both, rel=0.011)


def test_the_catalogue_is_packaged():
    assert '"plan/machines.yaml"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_torch_s_names_find_their_gpu():
    for name, known in (("NVIDIA H100 80GB HBM3", "H100-80G"), ("NVIDIA A800-SXM4-80GB", "A800-80G"), ("NVIDIA A100-SXM4-40GB", "A100-40G"),
                        ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"), ("NVIDIA GB200", "GB200"), ("h100-80g", "H100-80G")):  # fmt: skip
        gpu = packaged_gpu(name)
        assert gpu is not None and gpu.name == known
    assert packaged_gpu("NVIDIA H100 PCIe") is None, "another card, with other figures"


# ------------------------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_cluster_file_loads(path: Path):
    cluster = load_cluster(str(path))
    nodes, in_node = map(int, re.search(r"_(\d+)x(\d+)$", path.stem).groups())
    assert (cluster.nodes, cluster.gpus_per_node, cluster.world_size) == (nodes, in_node, nodes * in_node)
    assert cluster.name == path.stem and cluster.source and cluster.rates.source + str(cluster.rates.measured)


@pytest.mark.parametrize("name", CATALOGUE["machines"])
def test_every_packaged_machine_loads(name: str):
    assert load_cluster(name).nodes == 1
    many = load_cluster(f"{name}:16")
    assert many.nodes == 16 and many.source and many.between.bytes_per_second < many.inside.bytes_per_second


def test_the_cluster_of_skywork_moe():
    cluster = load_cluster(str(ROOT / "configs" / "clusters" / "a800_192x8.yaml"))
    assert cluster.world_size == 1536 and cluster.gpu.name == "A800-80G"
    assert cluster.between.peak_bytes_per_second == pytest.approx(800e9 / 8 / 8), "800 Gb/s of a node for 8 GPUs"
    assert cluster.inside.peak_bytes_per_second == pytest.approx(400e9 / 2)


def test_a_port_for_each_gpu_and_ports_for_a_node(tmp_path: Path):
    of_gpu = load_cluster(written(tmp_path, WHOLE)).between
    of_node = load_cluster(written(tmp_path, WHOLE.replace("per: gpu", "per: node, count: 2"))).between
    assert of_gpu.bytes_per_second == 48e9 and of_node.bytes_per_second == 2 * 48e9 / 8 and of_node.name == "2 x InfiniBand-NDR per node"


def test_own_numbers(tmp_path: Path):
    own = "bytes_per_second: 1.0e9, latency_seconds: 1.0e-5, source: a lab"
    text = f"""
launch: {{spare_nodes: 1}}
cluster:
    gpu: {{name: X1, memory_bytes: 64000000000, peak_flops: {{bf16: 4.0e14}}, memory_bytes_per_second: 2.0e12, source: its maker}}
    nodes: 2
    gpus_per_node: 4
    inside: {{{own}}}
    between: {{link: {{{own}}}, per: node}}
"""
    cluster = load_cluster(written(tmp_path, text))
    assert cluster.gpu.name == "X1" and cluster.gpu.sources["peak_flops"] == "its maker"
    assert cluster.inside.bytes_per_second == 1e9 and cluster.between.bytes_per_second == 0.25e9 and cluster.between.source == "a lab"


def test_one_machine_needs_no_network(tmp_path: Path):
    cluster = load_cluster(written(tmp_path, "cluster: {gpu: A100-80G, nodes: 1, gpus_per_node: 8}\n"))
    assert cluster.between is cluster.inside and cluster.inside.name == "NVLink-A100"


def test_rates_of_a_file_beside_it(tmp_path: Path):
    (tmp_path / "rates.yaml").write_text((ROOT / "docs" / "measurements" / "h100_rates.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    cluster = load_cluster(written(tmp_path, WHOLE.replace("nodes: 2,", "nodes: 2, rates: rates.yaml,")))
    assert cluster.rates.device == "NVIDIA H100 80GB HBM3" and len(cluster.rates.matmul) == 15
    assert not load_cluster(written(tmp_path, WHOLE)).rates.matmul, "without a file: published ones"


def test_a_device_nobody_published_works_with_what_was_measured(tmp_path: Path):
    cluster = load_cluster(written(tmp_path, "cluster:\n    gpu: cpu\n    nodes: 1\n    gpus_per_node: 1" + CPU_RATES))
    assert cluster.gpu.peak_flops == {"fp32": 0.2e12} and cluster.gpu.memory_bytes_per_second == 2e10
    assert "best rate that was measured" in cluster.gpu.sources["peak_flops"]


def test_a_measured_link(tmp_path: Path):
    links = [{"collective": "all_reduce", "ranks": 4, "bytes": size, "seconds": 2 * 3 * 2e-5 + 2 * 3 / 4 * size / 5e8} for size in (10**5, 10**7)]
    links += [{"collective": "all_gather", "ranks": 4, "bytes": 10**6, "seconds": 3 * 2e-5 + 3 / 4 * 10**6 / 5e8}]
    latency, rate = alpha_beta([LinkPoint(**point) for point in links])
    assert latency == pytest.approx(2e-5) and rate == pytest.approx(5e8)
    text = "cluster:\n    gpu: cpu\n    nodes: 1\n    gpus_per_node: 4\n    inside: measured" + CPU_RATES + f"      links: {links}\n"
    inside = load_cluster(written(tmp_path, text)).inside
    assert inside.bytes_per_second == pytest.approx(5e8) and "3 collectives of 4 ranks" in inside.source


def test_a_measured_network_is_one_gpu_s_share():
    """Four ranks on two nodes, 5e8 bytes/s a GPU: rings leave a node over both of its GPUs, an all-to-all sends half of everything to the other node."""
    ring = {"ranks": 4, "seconds": 3 * 2e-5 + 3 / 4 * 10**7 / (2 * 5e8)}
    points = [LinkPoint(collective="all_gather", bytes=10**7, **ring), LinkPoint(collective="all_reduce", bytes=10**7, ranks=4, seconds=2 * ring["seconds"]),
              LinkPoint(collective="all_to_all", bytes=10**7, ranks=4, seconds=3 * 2e-5 + 2 / 4 * 10**7 / 5e8)]  # fmt: skip
    points.append(LinkPoint(collective="all_to_all", bytes=10**4, ranks=4, seconds=3 * 2e-5 + 2 / 4 * 10**4 / 5e8))
    assert alpha_beta(points, ranks_per_node=2) == pytest.approx((2e-5, 5e8))


def test_what_training_sustains_is_read_with_its_source(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("cluster: {gpu: H100-80G, nodes: 1, gpus_per_node: 8, sustained: {kernels: 0.8, collectives: 0.6, source: run 7}}")
    assert load_cluster(str(path)).sustained == Sustained(0.8, 0.6, "run 7")
    assert load_cluster("dgx_h100").sustained == Sustained()
    path.write_text("cluster: {gpu: H100-80G, nodes: 1, gpus_per_node: 8, sustained: {kernels: 0, source: run 7}}")
    with pytest.raises(ConfigError, match=r"cluster.sustained.kernels=0: this must be"):
        load_cluster(str(path))


def test_least_squares_never_goes_below_zero():
    assert least_squares([(1.0, 2.0), (2.0, 1.0)], [5.0, 4.0]) == pytest.approx((1.0, 2.0))
    assert least_squares([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)], [3.0, 2.0, 1.0]) == pytest.approx((2.0, 0.0))


# ------------------------------------------------------------------------------------------------------------------------------ mistakes


def test_an_unknown_gpu_is_answered_with_the_nearest():
    for given, meant in (("H100", "did you mean H100-80G?"), ("A100", "did you mean A100-40G or A100-80G?"), ("NVIDIA H100 PCIe", "H100-80G"),
                         ("TPU-v5", "known are A100-40G")):  # fmt: skip
        with pytest.raises(ConfigError) as raised:
            hardware._cluster({"name": "x", "gpu": given, "nodes": 1, "gpus_per_node": 1}, "x.yaml", Path())
        (problem,) = raised.value.problems
        assert problem.startswith(f'x.yaml: cluster.gpu="{given}"') and meant in problem and "calibrate.py" in problem


def test_all_problems_are_told_at_once(tmp_path: Path):
    text = "cluster: {gpu: H100, nodes: 0, gpus_per_nodes: 8, inside: NVLink9, between: {link: NDR, per: rack}, rates: nothing.yaml}\n"
    found = problems(tmp_path, text)
    told = "\n".join(found)
    for part in ("cluster.nodes=0: this must be a whole number up to 100000 and above 0", "did you mean gpus_per_node?", "cluster.gpus_per_node is not set",
                 'cluster.gpu="H100"', "nothing.yaml: there is no such file"):  # fmt: skip
        assert part in told
    assert all(problem.startswith(str(tmp_path / "mine.yaml")) for problem in found)
    links = "\n".join(problems(tmp_path, "cluster: {gpu: H200, nodes: 2, gpus_per_node: 8, inside: NVLink9, between: {link: IB, per: rack}}\n"))
    assert 'cluster.inside="NVLink9"' in links and 'cluster.between.per="rack": this must be one of gpu, node' in links


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no section `cluster:`"),
        ("launch: {spare_nodes: 1}\n", "no section `cluster:`"),
        ("cluster: {gpu: [1]}\n", "this must be a name (A100-40G"),
        ("cluster: {gpu: H200, nodes: 2, gpus_per_node: 8}\n", "cluster.between is not set, and nodes=2 need a network"),
        (ONE.replace("1", "2") + ", between: InfiniBand-NDR}\n", "must be a section with link, per, count"),
        (ONE + ", inside: measured}\n", "run tools/calibrate.py under torchrun"),
        (ONE + ", inside: 5}\n", "cluster.inside=5: this must be one of NVLink-A100"),
        (ONE + ", inside: {bytes_per_second: fast}}\n", 'bytes_per_second="fast": this must be a number'),
        (ONE + ", rates: 7}\n", "cluster.rates=7: this must be a file of tools/calibrate.py"),
        (ONE + ", rates: {matmul: [{rows: 1, inner: 1, columns: 1, tflops: -1.0}]}}\n", "cluster.rates.matmul.0.tflops=-1.0"),
        (ONE + ", rates: {matmuls: []}}\n", "did you mean matmul?"),
        ("cluster:\n    gpu: cpu\n    nodes: 1\n    gpus_per_node: 2" + CPU_RATES, "cluster.inside is not set, and cpu comes with no known link"),
        ("cluster: {gpu: H200, nodes: 010, gpus_per_node: 8}\n", "octal"),
        (ONE + ", rates: mine.yaml}\n", "holds no rates"),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(tmp_path: Path, text: str, part: str):
    assert part in "\n".join(problems(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path):
    written(tmp_path, WHOLE)
    with pytest.raises(ConfigError, match=r"did you mean .*mine\.yaml"):
        load_cluster(str(tmp_path / "mein.yaml"))
    with pytest.raises(ConfigError, match="did you mean dgx_h100"):
        load_cluster("dgx_h1000:4")
    with pytest.raises(ConfigError, match="machines are hgx_a800"):
        load_cluster("laptop")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_cluster(str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize(("gpu", "more", "said"), [
    ("{bf16: 0}", "", "peak_flops"),
    ("{bf16: 1.0e15}", "\n  rates: {precision: fp32, matmul: [{rows: 8, inner: 8, columns: 8, tflops: 1.0}]}",
     "cluster.rates.precision=fp32: there is no figure"),
    ("{bf16: 1.0e15}", '\n  name: "a\\e[31m"', "cluster.name has characters that cannot be printed"),
])  # fmt: skip
def test_own_numbers_that_cannot_be_are_refused(tmp_path: Path, gpu: str, more: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    own = f"{{name: own, memory_bytes: 8000000000, peak_flops: {gpu}, memory_bytes_per_second: 1.0e12, source: me}}"
    link = "{bytes_per_second: 1.0e9, latency_seconds: 1.0e-6, source: me}"
    path.write_text(f"cluster:\n  gpu: {own}\n  nodes: 1\n  gpus_per_node: 2\n  inside: {link}{more}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_cluster(str(path))


@pytest.mark.parametrize("name", gpu_names())
def test_a_run_s_mfu_and_a_plan_s_have_one_peak(name: str) -> None:
    gpu = packaged_gpu(name)
    assert gpu is not None and peak_tflops(name) == pytest.approx(gpu.peak_flops["bf16"] / 1e12)
