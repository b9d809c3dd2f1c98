"""A whole run, from settings to exit code: join the job, build, train, and leave a status that says how it ended."""

from __future__ import annotations

import gc
import json
import os
import platform
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_skywork.config.load import dump_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import EXIT_DONE, EXIT_REQUEUE, ConfigError, UserError
from megatron_skywork.train import grace
from megatron_skywork.train.phases import Phases
from megatron_skywork.train.run_lock import RunLock
from megatron_skywork.train.signals import StopRequest
from megatron_skywork.train.status import Status, died_silently, read, replace
from megatron_skywork.train.watchdog import Watchdog

PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "safetensors", "tokenizers", "transformers", "wandb")


def run_training(config: Config) -> int:
    """Run `config` in this process, one of the job's ranks, as all that this process does: when the job ends elsewhere, the process is ended (watchdog.py).

    Returns:
        exit code: 0 all steps (or those asked for) are done; 75 stopped by a signal or the time limit after a save, to be started again.

    Raises:
        UserError: settings, data or checkpoint were refused; the status says so.
    """
    # Libraries' advice to their own developers, once per rank, would bury the first lines of a run.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    run_dir, phases = Path(config.run_dir), Phases()
    status = Status(run_dir, is_writer=os.environ.get("RANK", "0") == "0")
    watchdog = Watchdog(config.watchdog, run_dir, phases, status, os.environ)
    lock = RunLock(run_dir, is_first_rank=status.is_writer)
    before = read(run_dir)
    try:
        watchdog.start()
        status.is_silent = not lock.take()  # a folder in use has another run's status, and keeps it
        status.write("starting", step=None)
    except OSError as failure:
        raise ConfigError(f"run_dir={run_dir}: cannot be written ({failure.strerror}: {failure.filename}); choose a folder that can") from failure
    stop_request = StopRequest(config.train.time_limit_seconds)
    training = None
    try:
        from megatron_skywork import device  # torch: seconds, so the watchdog and signals come first

        device.prepare()
        # megatron-core may be imported only after that.
        from megatron_skywork import parallel
        from megatron_skywork.train.loop import train
        from megatron_skywork.train.training import Training

        watchdog.join()
        phases.part("process groups")
        place = parallel.start(config, told=phases.waits)
        try:
            lock.agree()
        except UserError:
            status.is_silent = True
            raise
        if place.is_first_rank:
            replace(run_dir / "config.yaml", dump_config(config))
            replace(run_dir / "env.json", json.dumps(environment(), indent=1))
        training = Training(config, place, phases)
        # megatron-core collects garbage twice in every save, while training stands still; what lives as long as the run need not be looked at each time.
        gc.collect()
        gc.freeze()
        status.write("running", step=training.state.step)
        for sentence in _warnings(config, before) if place.is_first_rank else []:
            print(f"warning: {sentence}", file=sys.stderr, flush=True)
            training.writers.event("warning", training.state.step, message=sentence)
        stopped_by = train(training, stop_request)
        code = EXIT_REQUEUE if stopped_by else EXIT_DONE
        status.write("stopped" if stopped_by or not training.is_whole else "done", step=training.state.step, reason=stopped_by, exit_code=code)
        watchdog.settle(code)
    except BaseException as failure:
        code, reason = watchdog.failed(failure)
        status.write("failed", step=training.state.step if training else None, reason=reason, exit_code=code, for_all=True)
        _leave(*([training.close] if training is not None else []), lock.release)
        raise
    _leave(parallel.stop, training.close, lock.release, watchdog.close)
    return code


def _leave(*steps: Callable[[], None]) -> None:
    """Take each step out of a run that has ended as its status says. What breaks on the way changes nothing of that, and no other step is left out for it."""
    for step in steps:
        try:
            step()
        except Exception:
            traceback.print_exc()


def _warnings(config: Config, before: dict[str, Any] | None) -> list[str]:
    """What the first rank has to say about earlier starts of the run."""
    slow_save = grace.warning(grace.last_save_seconds(Path(config.run_dir)), grace.grace_seconds(config.train.grace_seconds))
    return [sentence for sentence in (died_silently(before), slow_save) if sentence]


def environment() -> dict[str, Any]:
    """Versions and machine of a run."""
    from megatron_skywork import device
    from megatron_skywork.checkpoint.state import versions

    found = {distribution.metadata["Name"].lower(): distribution.version for distribution in metadata.distributions() if distribution.metadata["Name"]}
    return {
        **versions(),
        "platform": platform.platform(),
        "packages": {name: found[name] for name in PACKAGES if name in found},
        "device": device.name(),
        "host": socket.gethostname(),
        "command": sys.argv,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("SLURM_JOB", "NCCL_", "OMP_", "TORCH_", "WORLD_SIZE"))},
    }
