"""The training loop, from the top to the bottom."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from trainer import agreement, events, nvme
from trainer.config import TrainingSpec
from trainer.errors import HostGoneError, RolledBackError, SpecError
from trainer.hosts import for_world
from trainer.prepare import prepare
from trainer.run import Emit, Run, nowhere, whole
from trainer.rundir import RunDir


def train(spec: TrainingSpec, rundir: RunDir, emit: Emit, sync_events: Callable[[], None]) -> None:
    """Train to the end of the spec or to a stop request, from the newest checkpoint if there is one.

    Called by every rank. `emit` is called with what happens, on rank 0 alone. So is `sync_events`, after which all that
    was emitted must outlive a power cut. Raises RolledBackError, on every rank, where this is to be done again from the
    beginning, in new processes.
    """
    world = int(os.environ["WORLD_SIZE"])
    emit = emit if int(os.environ["RANK"]) == 0 else nowhere
    with _StopRequest(rundir, alone=world == 1) as stop_request:
        try:
            _train(spec, rundir, emit, sync_events, stop_request)
        except RolledBackError as back:
            if not stop_request.last_look():
                raise
            emit(events.Stopped(step=back.step))


def _train(
    spec: TrainingSpec, rundir: RunDir, emit: Emit, sync_events: Callable[[], None], stop_request: "_StopRequest"
) -> None:
    began = time.perf_counter()
    local_rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    of_world = for_world(spec, world)
    if spec.resources.device == "gpu" and not torch.cuda.is_available():
        raise SpecError("resources.device: 'gpu' is asked for, and torch finds none here; use 'any' or 'cpu'")
    # Before the ranks meet: none of them may wait in a collective for as long as this can take.
    nvme.check(spec.deepspeed, lambda what: emit(events.Preparing(step=0, what=what)))
    prepared = prepare(spec, rundir, local_rank, emit, stop_request.present)
    with distributed(), nvme.own_directory(of_world, rundir, local_rank) as own:
        stop_request.ranks_have_met()
        run = Run(own, rundir, emit, sync_events) if agreement.all_prepared(spec, rundir, prepared) else None
        if run is not None and _loop(run, stop_request):
            emit(events.Finished(step=run.step, seconds=time.perf_counter() - began))
            return
        step = run.step if run else 0
        # A signal to one of several hosts takes that host away; only the file ends the run.
        if spec.resources.hosts > 1 and not agreement.any_rank(rundir.stop.exists()):
            raise HostGoneError(f"step {step}: a host was told to end; the others go on from the last checkpoint")
        emit(events.Stopped(step=step))


def _loop(run: Run, stop_request: "_StopRequest") -> bool:
    """Whether the end was reached; if not, a stop was requested. Either way all ranks have saved the last step."""
    optimisation, checkpoints = run.spec.optimisation, run.spec.checkpoints
    steps = whole(optimisation.steps)
    run.emit(run.started())
    if run.step == 0:
        loss = run.evaluate()
        if run.spec.guard.rolls_back and not run.resumed:
            run.save(loss, wait=False)  # so that there is always one to go back to
    while run.step < steps:
        stop = run.train_step(stop_request.present)
        last = run.step == steps
        due = last or run.step % whole(checkpoints.every) == 0
        evaluated = last or run.step % whole(optimisation.evaluate_every) == 0 or (due and checkpoints.keep_best)
        loss = run.evaluate() if evaluated else None
        if due or stop:
            run.save(loss, wait=last or stop)
        if stop and not last:
            return False
    return True


class _StopRequest:
    """A stop file in the run directory, SIGTERM or Ctrl-C: each is obeyed at the next step boundary.

    So is a lease that has run out: the supervisor is stopped or hangs, and somebody else may want to train this.

    Until several ranks have met, SIGTERM ends a rank on the spot: it comes from torchrun, since another rank has failed
    and would be waited for in vain, or this host is taken away; and there is nothing yet to save.
    """

    def __init__(self, rundir: RunDir, alone: bool) -> None:
        self._rundir, self._file = rundir, rundir.stop
        self._signalled = False
        self._alone = alone
        self._previous: dict[signal.Signals, Any] = {}

    def present(self) -> bool:
        return self._signalled or self._file.exists() or not self._rundir.is_vouched_for()

    def __enter__(self) -> "_StopRequest":
        self._obey(signal.SIGINT)
        if self._alone:
            self._obey(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def last_look(self) -> bool:
        """Whether this process, which is about to be started again, was asked to stop.

        Signals that come later wait, for the program that it becomes. Of several ranks the answer is no: torchrun's
        signals tell of a peer that was quicker to leave, and what was asked of all is in the file, for the next ranks.
        """
        if not self._alone:
            return False
        signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)
        return self.present()

    def ranks_have_met(self) -> None:
        if signal.SIGTERM not in self._previous:
            self._obey(signal.SIGTERM)

    def _obey(self, number: signal.Signals) -> None:
        self._previous[number] = signal.signal(number, self._on_signal)
        # What has waited since the last look of the program before.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True


@contextmanager
def distributed() -> Iterator[None]:
    """torch.distributed from torchrun's environment, or a world of one; NCCL with a GPU, else gloo."""
    accelerated = torch.cuda.is_available()
    # On a CPU DeepSpeed would compile, at the first start, a kernel that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if accelerated:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise SpecError(f"resources.processes: rank {local} finds only {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
    deepspeed.init_distributed(
        dist_backend="nccl" if accelerated else "gloo", auto_mpi_discovery=False, verbose=False, dist_init_required=True
    )
    try:
        yield
    finally:
        # After a failure another rank may be stuck in a collective; leaving is then the launcher's business.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()
