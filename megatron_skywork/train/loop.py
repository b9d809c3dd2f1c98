"""The training loop. What a feature adds belongs into a step, a writer or a verb of `Training`, not here."""

from __future__ import annotations

from megatron_skywork.train.signals import StopRequest
from megatron_skywork.train.training import Training


def train(training: Training, stop_request: StopRequest) -> str | None:
    """Train until the last step, or until asked to stop; whatever was done is saved.

    Returns:
        why it stopped early: a signal's name or `time limit`; None when it came to its last step.
    """
    settings = training.config.train
    saves = training.config.checkpoint

    if training.start.folder is not None:
        training.writers.event("resume", training.state.step, **training.start.record())
    elif settings.eval_at_start:
        training.evaluate()

    stopped_by = None
    evaluated_step = None
    while not training.is_finished and stopped_by is None:
        result = training.train_one_step()
        training.log(result)
        if training.answer(result):
            continue  # it went back to a checkpoint

        if training.is_due(settings.eval_every):
            training.evaluate()
            evaluated_step = training.state.step
        training.settle_save()
        if training.is_due(saves.every):
            training.save()
        # A signal that comes with the last step has nothing left to stop; asked to start again, a scheduler would repeat what is done.
        stopped_by = None if training.is_finished else stop_request.agreed()

    if training.is_whole and settings.eval_at_end and evaluated_step != training.state.step:
        training.evaluate()
    training.settle_save(wait=True)
    must_save = saves.save_at_end if training.is_whole else True
    if must_save and training.saved_step != training.state.step:
        training.save_last(in_a_hurry=stopped_by is not None)
    training.writers.event("stop", training.state.step, reason=stopped_by or ("done" if training.is_whole else "train.stop_at_step"))
    return stopped_by
