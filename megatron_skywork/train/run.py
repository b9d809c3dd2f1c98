"""A whole run, from settings to exit code: join the job, build, train, and leave a status that says how it ended.

torchrun does not pass exit codes on, so `run_status.json` in the run's folder says the same: status, step, reason and exit code.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_skywork import device
from megatron_skywork.config.load import dump_config
from megatron_skywork.config.schema import Config
from megatron_skywork.errors import EXIT_DONE, EXIT_OTHER, EXIT_REQUEUE, ConfigError, UserError

PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "safetensors", "tokenizers", "transformers", "wandb")


def run_training(config: Config) -> int:
    """Run `config` in this process, one of the job's ranks.

    Returns:
        exit code: 0 all steps (or those asked for) are done; 75 stopped by a signal or the time limit after a save, to be started again.

    Raises:
        UserError: settings, data or checkpoint were refused; the status says so.
    """
    # Libraries' advice to their own developers, once per rank, would bury the first lines of a run.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    device.prepare()
    # megatron-core may be imported only after that.
    from megatron_skywork import parallel
    from megatron_skywork.train.loop import train
    from megatron_skywork.train.run_lock import RunLock
    from megatron_skywork.train.signals import StopRequest
    from megatron_skywork.train.training import Training

    stop_request = StopRequest(config.train.time_limit_seconds)
    place = parallel.start(config)
    lock = RunLock(Path(config.run_dir), place.is_first_rank)
    lock.take()  # before anything is written there: it may be another run's
    status = Status(Path(config.run_dir), is_writer=place.is_first_rank)
    training = None
    status.begin(config)
    try:
        training = Training(config, place)
        status.write("running", step=training.state.step)
        stopped_by = train(training, stop_request)
        code = EXIT_REQUEUE if stopped_by else EXIT_DONE
        status.write("stopped" if stopped_by or not training.is_whole else "done", step=training.state.step, reason=stopped_by, exit_code=code)
        parallel.stop()
        return code
    except BaseException as failure:
        code = failure.exit_code if isinstance(failure, UserError) else EXIT_OTHER
        reason = str(failure) or type(failure).__name__
        status.write("failed", step=training.state.step if training else None, reason=reason, exit_code=code)
        raise
    finally:
        try:
            if training is not None:
                training.close()
        finally:
            lock.release()
            stop_request.close()


class Status:
    """`run_status.json`, `config.yaml` and `env.json` of a run, written by the first rank.

    Args:
        run_dir: the run's folder; made if needed.
        is_writer: false on ranks that write nothing.
    """

    def __init__(self, run_dir: Path, is_writer: bool):
        self._run_dir, self._is_writer, self._started = run_dir, is_writer, time.time()

    def begin(self, config: Config) -> None:
        """Leave what the run was started with."""
        if not self._is_writer:
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            _replace(self._run_dir / "config.yaml", dump_config(config))
            _replace(self._run_dir / "env.json", json.dumps(environment(), indent=1))
            self.write("starting")
        except OSError as failure:
            raise ConfigError(f"run_dir={self._run_dir}: cannot be written ({failure.strerror}: {failure.filename}); choose a folder that can") from failure

    def write(self, status: str, **fields: Any) -> None:
        """Replace the status: starting, running, done, stopped (go on with the same command) or failed."""
        if self._is_writer:
            record = {"status": status, **fields, "host": socket.gethostname(), "process": os.getpid(), "started": self._started, "updated": time.time()}
            try:
                _replace(self._run_dir / "run_status.json", json.dumps(record, indent=1))
            except OSError as failure:  # a full disk, say; it must not take the place of the error that is being reported
                print(f"warning: {self._run_dir / 'run_status.json'} could not be written: {failure}", file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Versions and machine of a run."""
    from megatron_skywork.checkpoint.state import versions

    found = {distribution.metadata["Name"].lower(): distribution.version for distribution in metadata.distributions() if distribution.metadata["Name"]}
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found[name] for name in PACKAGES if name in found},
        "device": device.name(),
        "host": socket.gethostname(),
        "command": sys.argv,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("SLURM_JOB", "NCCL_", "OMP_", "TORCH_", "WORLD_SIZE"))},
    }


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
