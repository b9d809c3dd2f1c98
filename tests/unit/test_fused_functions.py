"""Every function marked `device.fused` can be compiled as a whole: traced without a break, with the same numbers. A GPU compiles them at their first call;
here torch's tracer runs without generating code. In a process of its own, because on a CPU the tracer is switched off."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
from megatron_skywork import device
device.prepare()
import torch
from megatron_skywork.model import output_loss, rope
from megatron_skywork.moe import gating_norm, router_health, swiglu

torch.manual_seed(0)
T, E, V = 12, 8, 32
gate_up, probs, grad = torch.randn(T, 2 * V).bfloat16(), torch.rand(T), torch.randn(T, V).bfloat16()
logits, gate = torch.randn(T, E), torch.softmax(torch.randn(T, E), -1)
normalized, inverse_std = gating_norm._forward(logits, 1.0, 1e-6, E - 1)
block, column = torch.randn(T, V).bfloat16(), torch.randint(-4, V + 4, (T,))
statistics = output_loss.block_statistics(block, column)
losses = output_loss.losses_from(statistics)
angles = torch.randn(T, 1, 1, 16)
CALLS = {
    swiglu._forward: (gate_up, probs),
    swiglu._backward: (gate_up, probs, grad),
    gating_norm._forward: (logits, 1.0, 1e-6, E - 1),
    gating_norm._backward: (torch.randn(T, E), normalized, inverse_std, 1.0, E - 1),
    router_health.gate_entropy: (gate,),
    router_health.gate_ratios: (gate,),
    rope.rotate: (torch.randn(T, 2, 3, 16).bfloat16(), angles.cos(), angles.sin()),
    output_loss.block_statistics: (block, column),
    output_loss.merge_statistics: (torch.stack([statistics, statistics]),),
    output_loss.losses_from: (statistics,),
    output_loss.block_gradient: (block, column, statistics, losses, torch.rand(T)),
}
for function, arguments in CALLS.items():
    compiled = torch.compile(function.__wrapped__, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=1e-5, atol=1e-5)
    print(function.__module__, function.__name__)
"""


def test_every_fused_function_is_traced_whole() -> None:
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    marked = {
        f"megatron_skywork.{path.relative_to(ROOT / 'megatron_skywork').with_suffix('').as_posix().replace('/', '.')} {name}"
        for path in (ROOT / "megatron_skywork").rglob("*.py")
        for name in re.findall(r"^@device\.fused\ndef (\w+)", path.read_text(), re.M)
    }
    assert set(done.stdout.splitlines()) == marked, "a function that is marked and not tried here, or the other way round"
