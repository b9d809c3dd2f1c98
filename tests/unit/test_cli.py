"""The command line as a user types it, in a process of its own: output, exit codes, and no torch before it is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_skywork.config.manual import settings
from megatron_skywork.config.yaml_strict import read_yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "pretrain_moe.py"
TINY, MOE_146B = str(ROOT / "configs" / "tiny.yaml"), str(ROOT / "configs" / "skywork_moe_146b.yaml")
FORBIDDEN = ("torch", "numpy", "megatron.core", "wandb", "transformers")
# Runs the script as __main__ and says afterwards, on stderr, which of the slow packages were imported.
RUNNER = f"""
import atexit, runpy, sys
atexit.register(lambda: print("IMPORTED", [name for name in {FORBIDDEN!r} if name in sys.modules], file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs the script without installing anything and checks that it stayed light and showed no traceback."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WORLD_SIZE", "RANK")} | environment
    result = subprocess.run([sys.executable, "-c", RUNNER, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=cwd or ROOT, env=env, timeout=60)
    assert "IMPORTED []" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_dry_run_of_skywork_moe(tmp_path):
    result = run("--config", MOE_146B, "--dry-run", "--world-size", "1536", cwd=tmp_path)
    assert result.returncode == 0
    for text in ("total   146.4 B (146,356,130,304)", "active  22.7 B (22,691,271,168)", "1,536 ranks on 192 nodes of 8", "PP 12, TP = EP 4, DP 32",
                 "TP:        384 groups of 4, e.g. [0 1 2 3], inside a node",
                 "PP:        128 groups of 12, e.g. [0 128 256 384 ... 1408], all cross nodes (12 nodes each)",
                 "expert DP: 48 groups of 32", "the expert parallel groups are the tensor parallel groups", "31,457,280 tokens per step",
                 "120 micro-batches of 1 sequence on each of 32 data-parallel ranks", "stage  12:   3 layers (50-52)",
                 "FLOPs/token = 3 * (2 * N_matmul + 2 * L * A * S)",
                 "capacity_factor: 1.1"):
        assert text in result.stdout, (text, result.stdout)
    assert list(tmp_path.iterdir()) == []  # a dry run leaves nothing behind


def test_dry_run_as_json():
    result = run("--config", TINY, "--dry-run", "--json", "parallel.pp=2", "parallel.ep=2", "--world-size=4", "parallel.vpp=2", "train.micro_batch_size=2")
    plan = json.loads(result.stdout)
    assert plan["layout"] == {"tp": 1, "pp": 2, "vpp": 2, "cp": 1, "dp": 2, "ep": 2, "etp": 1, "expert_dp": 1}
    assert [stage["layers"] for stage in plan["stages"]] == [[[1, 1], [3, 3]], [[2, 2], [4, 4]]]
    assert {group["name"]: (group["count"], group["size"], group["first"]) for group in plan["groups"]}["ep"] == (2, 2, [0, 1])
    assert plan["config"]["parallel"]["vpp"] == 2 and plan["parameters"]["total"] == sum(plan["parameters"]["components"].values())
    assert plan["batch"]["micro_batches"] * 2 * plan["batch"]["micro_batch_size"] == plan["batch"]["sequences_per_step"]


def test_check_replicas_is_a_setting():
    result = run("--config", TINY, "--dry-run", "--json", "--world-size=2", "--check-replicas", "50", "parallel.ep=2")
    assert json.loads(result.stdout)["config"]["train"]["check_replicas"] == 50
    result = run("--config", TINY, "--dry-run", "--world-size=2", "--check-replicas=-1", "parallel.ep=2")
    assert result.returncode == 2 and "train.check_replicas=-1" in result.stderr


def test_dry_run_says_what_is_recomputed():
    per_stage = ("parallel.recompute=full", "parallel.recompute_layers=[0,1,1,0]", "parallel.pp=2", "parallel.vpp=2", "--world-size=2")
    text = run("--config", TINY, "--dry-run", *per_stage).stdout
    assert "stage   1:   2 layers (1 and 3), 0 and 1 of them recomputed" in text and "stage   2:   2 layers (2 and 4), 1 and 0 of them recomputed" in text
    assert [stage["recomputed_layers"] for stage in json.loads(run("--config", TINY, "--dry-run", "--json", *per_stage).stdout)["stages"]] == [[0, 1], [1, 0]]
    modules = run("--config", TINY, "--dry-run", "parallel.recompute=selective", "parallel.recompute_modules=[core_attn,router]", "--world-size=1").stdout
    assert "recomputed in every layer: core_attn, router" in modules and "of them recomputed" not in modules


def test_resolved_configuration_in_the_dry_run_can_be_loaded_again(tmp_path):
    text = run("--config", TINY, "--dry-run", "run_dir='010'").stdout
    block = "\n".join(line[2:] for line in text.split("\n\n")[0].splitlines()[1:])
    path = tmp_path / "again.yaml"
    path.write_text(block)
    assert read_yaml(block, "x").values["run_dir"] == "010"
    assert run("--config", str(path), "--dry-run").stdout == text


def test_world_size_comes_from_torchrun():
    assert "2 ranks on 1 node" in run("--config", TINY, "--dry-run", WORLD_SIZE="2").stdout
    assert "4 ranks on 1 node" in run("--config", TINY, "--dry-run", "--world-size", "4", "train.global_batch_size=16", WORLD_SIZE="2").stdout


def test_help_lists_every_setting():
    result = run("--help")
    assert result.returncode == 0 and result.stderr.startswith("IMPORTED")
    assert "--dry-run" in result.stdout and "--world-size" in result.stdout and "Exit codes" in result.stdout
    for setting in settings():
        assert f"  {setting.name}  (" in result.stdout
    assert "moe.gate_norm  (true or false; default true)" in result.stdout and "Gate-logit normalization" in result.stdout


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--config", TINY, "model.num_layer=3", "optim.lr=x"], "configuration error: 2 problems\n  - model.num_layer=3"),
    (["--config", TINY, "parallel.ep=3"], "use ep = 1, 2 or 4"),
    (["--config", "nothing.yaml"], "nothing.yaml: there is no such file"),
    (["--config", TINY, "--world-size", "4"], "--world-size 4 is not the number of ranks that were started, 1"),
    (["--config", TINY, "--world-size", "0", "--dry-run"], "--world-size 0: use 1 or more ranks"),
    (["--config", TINY, "--world-size", "x", "--dry-run"], "--world-size"),
    (["--config", TINY, "--learning-rate", "3"], "settings are written section.field=value"),
    (["--config", TINY, "--json"], "--json goes with --dry-run"),
    (["train.seed=1"], "--config"),
    ([], "--config"),
])
def test_mistakes_end_with_exit_code_2_before_torch(arguments, expected):
    result = run(*arguments)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.startswith("configuration error: ") and expected in result.stderr, result.stderr


def test_one_rank_says_what_is_wrong():
    first, second = (run("--config", TINY, "parallel.ep=3", WORLD_SIZE="2", RANK=rank) for rank in "01")
    assert "parallel.ep=3" in first.stderr and first.returncode == second.returncode == 2
    assert second.stderr.startswith("IMPORTED") and second.stdout == ""


def test_a_broken_world_size_is_a_mistake_of_the_environment():
    result = run("--config", TINY, WORLD_SIZE="many")
    assert result.returncode == 2 and "WORLD_SIZE=many" in result.stderr


def test_a_closed_pipe_is_no_mistake():
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and errors == b""


@pytest.mark.parametrize(("error", "code", "message"), [
    ("DataError", 3, "error: data.bin is damaged\n"),
    ("CheckpointError", 3, "error: data.bin is damaged\n"),
    ("TrainingError", 1, "error: data.bin is damaged\n"),
    ("ConfigError", 2, "configuration error: 1 problem\n  - data.bin is damaged\n"),
])
def test_a_user_s_error_during_the_run_ends_with_its_exit_code(monkeypatch, capsys, error, code, message):
    import types

    from megatron_skywork import cli, errors

    seen = []

    def run_training(config):
        seen.append(config)
        raise getattr(errors, error)("data.bin is damaged")

    monkeypatch.setitem(sys.modules, "megatron_skywork.train.run", types.SimpleNamespace(run_training=run_training))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.pretrain(["--config", TINY, "train.seed=77"])
    assert caught.value.code == code and capsys.readouterr().err == message and seen[0].train.seed == 77


def test_the_run_s_exit_code_is_the_process_s(monkeypatch):
    import types

    from megatron_skywork import cli

    monkeypatch.setitem(sys.modules, "megatron_skywork.train.run", types.SimpleNamespace(run_training=lambda config: 75))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.pretrain(["--config", TINY])
    assert caught.value.code == 75


def test_the_entry_script_has_no_logic():
    assert len([line for line in SCRIPT.read_text().splitlines() if line.strip() and not line.startswith('"""')]) <= 6
