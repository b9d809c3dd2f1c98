"""The SLURM scripts on a real SLURM of several nodes on this machine, with CPU ranks: jobs that are preempted, warned, refused, or lead nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from private_cluster import PrivateCluster
from training_bodies import records

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from compare_runs import FIELDS, compare_steps, steps_of  # noqa: E402

pytestmark = pytest.mark.slurm

SETTINGS = """\
run_dir: {run_dir}
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 32, num_attention_heads: 4, vocab_size: 100, max_position_embeddings: 64}}
moe: {{num_experts: 4, topk: 2}}
data: {{mock: true, seq_length: 16, num_workers: 0}}
optim: {{schedule: constant}}
train: {{steps: 100000, global_batch_size: 2, micro_batch_size: 1, precision: fp32, stop_at_step: {stop_at_step}}}
parallel: {{gpus_per_node: 1, ep: 2}}
launch:
  request_gpus: false
  grace_seconds: 60
  max_stalled_starts: 2
  sbatch: {{time: '1:00:00', output: {run_dir}.log}}
  environment: {{GLOO_SOCKET_IFNAME: lo}}
  preflight: {{enabled: {preflight}, min_disk_gib: 0.1}}
"""


def write_settings(path: Path, run_dir: Path, stop_at_step: int, preflight: bool = False) -> Path:
    path.write_text(SETTINGS.format(run_dir=run_dir, stop_at_step=stop_at_step, preflight=str(preflight).lower()))
    return path


def submit(cluster: PrivateCluster, config: Path, *overrides: str, **environment: str) -> int:
    """Submit for two nodes with tools/submit.py, as a user does."""
    command = [sys.executable, "tools/submit.py", "--config", str(config), "--nodes", "2", "--json", *overrides]
    own = {name: value for name, value in cluster.environment.items() if name != "PYTHONPATH"}
    answer = subprocess.run(command, cwd=ROOT, env={**own, "PYTHON_ENV": sys.prefix, **environment}, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    return int(json.loads(answer.stdout)["job"])


def steps_done(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir)), default=0) if (run_dir / "metrics.jsonl").is_file() else 0


def stops(run_dir: Path) -> list[dict]:
    return [event for event in records(run_dir, "event") if event["event"] == "stop"]


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "run_status.json").read_text())


def log_of(run_dir: Path) -> str:
    path = Path(f"{run_dir}.log")
    nodes = sorted((run_dir / "slurm").glob("*/*.log")) if run_dir.exists() else []
    return "\n".join(f"== {one.name}\n{one.read_text()[-3000:]}" for one in [path, *nodes] if one.is_file())


def test_a_job_that_is_preempted_and_warned_requeues_itself_and_trains_as_if_undisturbed(cluster: PrivateCluster, tmp_path: Path):
    run_dir, plain = tmp_path / "disturbed", tmp_path / "undisturbed"
    config = write_settings(tmp_path / "run.yaml", run_dir, 100_000, preflight=True)
    job = submit(cluster, config, "launch.sbatch.nodelist='n1,n2'")
    cluster.wait_for("step 3", lambda: steps_done(run_dir) >= 3, 150)
    write_settings(config, run_dir, 100_000)  # one preflight is enough

    # Preempted: a job of a higher partition wants the same nodes.
    cluster.run("sbatch", "--partition=high", "--nodelist=n1,n2", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1", cwd=tmp_path)
    cluster.wait_for("a step of the second start", lambda: any(steps_done(run_dir) > stop["step"] for stop in stops(run_dir)), 150)

    # Warned: the time limit is moved so near that SLURM says so within half a minute.
    minutes = 1 + sum(int(part) * 60**place for place, part in enumerate(reversed(cluster.job(job)["RunTime"].split(":")))) // 60
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    cluster.wait_for("the second requeue", lambda: cluster.job(job)["Restarts"] == "2", 120)
    assert [stop["reason"] for stop in stops(run_dir)] == ["SIGTERM", "SIGUSR2"], log_of(run_dir)
    last_step = stops(run_dir)[-1]["step"] + 3
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    write_settings(config, run_dir, last_step)
    other = submit(cluster, write_settings(tmp_path / "plain.yaml", plain, last_step), "launch.sbatch.nodelist='n3,n4'")
    for number, folder in ((job, run_dir), (other, plain)):
        ended = cluster.wait_for_state(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log_of(folder)

    assert status(run_dir)["step"] == last_step
    same = compare_steps(steps_of(run_dir), steps_of(plain), 1, None, FIELDS, 0.0)
    assert (same["steps"], same["differing_steps"]) == (list(range(1, last_step + 1)), [])
    log = log_of(run_dir)
    assert "preflight: n1: no GPU" in log and "all-reduce right" in log
    assert cluster.job(job)["Restarts"] == "2" and log.count("putting job") == 2 and "the run's status is stopped, exit code 75 (SIGTERM)" in log
    assert {path.name for path in (run_dir / "slurm" / str(job)).glob("n*.log")} == {"n1.log", "n2.log"}


def test_a_job_whose_starts_lead_nowhere_ends(cluster: PrivateCluster, tmp_path: Path):
    run_dir = tmp_path / "run"
    job = submit(cluster, write_settings(tmp_path / "run.yaml", run_dir, 5), "launch.environment.GLOO_SOCKET_IFNAME=nosuch0")
    ended = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    log = Path(f"{run_dir}.log").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), log_of(run_dir)
    assert log.count("what follows: again") == 1
    assert "2 starts in a row left the run's last saved step at 0; the job ends (launch.max_stalled_starts)" in log


def test_a_wrong_setting_ends_the_job_at_once_with_exit_code_2(cluster: PrivateCluster, tmp_path: Path):
    config = write_settings(tmp_path / "run.yaml", tmp_path / "run", 5)
    refused = subprocess.run(
        [sys.executable, "tools/submit.py", "--config", str(config), "--nodes", "2", "parallel.ep=3"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2 and "parallel.ep=3" in refused.stderr
    environment = {**cluster.environment, "PYTHON_ENV": sys.prefix}
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/job.log", "launch/pretrain_moe.sbatch", str(config), "parallel.ep=3"]
    job = int(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout)
    ended = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert ended["ExitCode"] == "2:0"
    assert (tmp_path / "job.log").read_text() == refused.stderr
    assert not (tmp_path / "run").exists()


# What `apptainer exec [--nv] --bind PLACES --pwd PLACE IMAGE COMMAND` does, without a container.
APPTAINER = """\
#!/bin/bash
echo "$SLURMD_NODENAME $*" >> {log}
shift
while [[ $1 == --* ]]; do if [[ $1 == --nv ]]; then shift; else shift 2; fi; done
shift
exec "$@"
"""


def test_a_node_unlike_the_others_is_named_and_a_spare_trains_in_a_container(cluster: PrivateCluster, tmp_path: Path):
    run_dir, log, tools = tmp_path / "run", tmp_path / "apptainer.log", tmp_path / "bin"
    tools.mkdir()
    (tools / "apptainer").write_text(APPTAINER.format(log=log))
    (tools / "apptainer").chmod(0o755)
    other = tmp_path / "other" / "torch-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    config = write_settings(tmp_path / "run.yaml", run_dir, 2, preflight=True)
    path = f"{tools}:{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}:/usr/sbin"
    overrides = ["launch.sbatch.nodelist='n3,n4,n5'", "launch.spare_nodes=1", "launch.container={image: skywork.sif, runtime: apptainer}"]
    with cluster.environment_of("n4", PYTHONPATH=str(other.parent)):
        job = submit(cluster, config, *overrides, PATH=path)
        ended = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    said = log_of(run_dir)
    assert ended["ExitCode"] == "0:0" and status(run_dir)["step"] == 2, said
    assert "preflight: node n4 is left out: torch is 1.0, and 2." in said
    assert {path.name for path in (run_dir / "slurm" / str(job)).glob("n*.log")} == {"n3.log", "n5.log"}
    ranks = [line for line in log.read_text().splitlines() if "slurm_node.sh" in line]
    assert sorted(line.split()[0] for line in ranks) == ["n3", "n5"] and all(f"--bind {ROOT}:{ROOT} --pwd {ROOT} skywork.sif" in line for line in ranks)


def test_a_node_that_goes_down_is_replaced_by_a_spare_and_the_job_goes_on(cluster: PrivateCluster, tmp_path: Path):
    run_dir = tmp_path / "run"
    config = write_settings(tmp_path / "run.yaml", run_dir, 100_000, preflight=True)
    job = submit(cluster, config, "launch.sbatch.nodelist='n3,n4,n5'", "launch.spare_nodes=1", "checkpoint.every=5")
    cluster.wait_for("step 7", lambda: steps_done(run_dir) >= 7, 150)
    write_settings(config, run_dir, steps_done(run_dir) + 50, preflight=True)
    cluster.kill_node("n4")
    ended = cluster.wait_for_state(job, "COMPLETED", "FAILED", "NODE_FAIL", seconds=200)
    said = log_of(run_dir)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), said
    assert "what follows: again" in said and "preflight: node n4 is left out: gave no answer" in said and "start 2 on n3,n5" in said
    assert [event["event"] for event in records(run_dir, "event")].count("resume") == 1
