"""The training loop, from the top to the bottom."""

import os
import resource
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
from torch import Tensor

from trainer import checkpoint, data, events
from trainer.config import TrainingSpec
from trainer.engine import build_engine
from trainer.errors import DivergenceError
from trainer.methods import make_method
from trainer.methods.base import StepContext
from trainer.model import build_model
from trainer.rundir import RunDir
from trainer.schedule import learning_rate
from trainer.tokenizer import load_tokenizer, save_tokenizer
from trainer.zero import Shards

Emit = Callable[[events.Event], None]


def train(spec: TrainingSpec, rundir: RunDir, emit: Emit) -> None:
    """Train to the end of the spec or to a stop request, from the newest checkpoint if there is one.

    Called by every rank, inside `distributed`. `emit` is called with what happens, on rank 0 alone.
    """
    if dist.get_rank() != 0:
        emit = _nowhere
    began = time.perf_counter()
    with _StopRequest(rundir) as stop_request:
        run = _Run(spec, rundir, emit)
        emit(run.started())
        steps = spec.optimisation.steps
        assert steps is not None
        if run.step == 0:
            run.evaluate()
        while run.step < steps:
            stop = run.train_step(stop_request.present)
            last = run.step == steps
            if last or run.step % _whole(spec.optimisation.evaluate_every) == 0:
                run.evaluate()
            if last or stop or run.step % _whole(spec.optimisation.checkpoint_every) == 0:
                run.save()
            if stop and not last:
                emit(events.Stopped(step=run.step))
                return
        emit(events.Finished(step=run.step, seconds=time.perf_counter() - began))


class _Run:
    """A run in progress on one rank: the engine, the data, the method, and how many steps are done."""

    def __init__(self, spec: TrainingSpec, rundir: RunDir, emit: Emit) -> None:
        self.spec, self.rundir, self.emit = spec, rundir, emit
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        tokenizer = load_tokenizer(spec.tokenizer)
        if dist.get_rank() == 0:
            emit(events.Preparing(step=0, what="tokenising the dataset"))
            data.prepare(spec, tokenizer, rundir.data, self._report_tokens)
            save_tokenizer(tokenizer, rundir.tokenizer)
            emit(events.Preparing(step=0, what="building the model"))
        dist.barrier()
        self.sequences = data.Sequences(spec, rundir.data, dist.get_rank(), self.device)

        model = build_model(spec, tokenizer)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.method = make_method(spec)
        self.method.attach(model)
        resumed = checkpoint.newest(rundir)
        if resumed:
            checkpoint.load_values(resumed, model)
        self.engine = build_engine(spec, model, self.method)
        self.model = self.engine.module
        self.shards = Shards(self.engine)
        self.step = 0
        if resumed:
            checkpoint.load_training_state(resumed, self.model, self.shards)
            self.method.load_state(resumed.method)
            self.step = resumed.step

    def started(self) -> events.Started:
        state_bytes = self.shards.state_bytes()
        optimisation = self.spec.optimisation
        shapes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in self.model.parameters()]
        return events.Started(
            step=self.step,
            steps=_whole(optimisation.steps),
            processes=dist.get_world_size(),
            device=torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            parameters=self.parameters,
            trained_parameters=sum(numel for trained, numel in shapes if trained),
            optimizer_state_bytes=state_bytes,
            full_adamw_state_bytes=2 * 4 * self.parameters,
            tokens_per_step=optimisation.global_batch * self.spec.dataset.sequence_length,
            training_tokens=self.sequences.training * self.spec.dataset.sequence_length,
        )

    def train_step(self, stop_requested: Callable[[], bool]) -> bool:
        """One update. True, on all ranks alike, when a stop has been requested."""
        began = time.perf_counter()
        optimisation = self.spec.optimisation
        rate = learning_rate(self.step + 1, optimisation)
        for group in self.shards.parameter_groups:
            group["lr"] = rate * group["rate"]
        batches = self.sequences.micro_batches(self.step)
        context = StepContext(self.step, rate, self.model, self.shards, batches)
        self.model.train()

        self._seed_step()
        report = self.method.before_step(context)
        # The same numbers again, so that the forward pass drops out what the probe dropped out.
        self._seed_step()
        losses = torch.zeros((), dtype=torch.float64, device=self.device)
        norm = 0.0
        for tokens in batches:
            loss = self.engine(input_ids=tokens, labels=tokens, use_cache=False).loss
            self.engine.backward(loss)
            losses += loss.detach().double()
            if self.shards.norm_is_known_before_step and self.engine.is_gradient_accumulation_boundary():
                norm = self.shards.gradient_norm()
            self.engine.step()
        if not self.shards.norm_is_known_before_step:
            norm = self.shards.gradient_norm()
        self.method.after_step(context)
        self.step += 1

        mean_loss, peak_host, peak_device, stop = self._exchange(float(losses) / len(batches), stop_requested())
        if not torch.isfinite(torch.tensor([mean_loss, norm])).all():
            raise DivergenceError(
                f"step {self.step}: loss {mean_loss}, gradient norm {norm}; the last checkpoint is before it. "
                "Lower optimisation.learning_rate, lengthen warmup_steps, or set clip_norm."
            )
        seconds = time.perf_counter() - began
        tokens = optimisation.global_batch * self.spec.dataset.sequence_length
        if report:
            self.emit(
                events.Switched(
                    step=self.step,
                    seconds=report.seconds,
                    energy_kept=report.energy_kept,
                    fallbacks=report.fallbacks,
                )
            )
        self.emit(
            events.Step(
                step=self.step,
                loss=mean_loss,
                learning_rate=rate,
                gradient_norm=norm,
                tokens=self.step * tokens,
                seconds=seconds,
                projection_seconds=report.seconds if report else 0.0,
                tokens_per_second=tokens / seconds,
                peak_device_bytes=peak_device if self.device.type != "cpu" else None,
                peak_host_bytes=peak_host,
            )
        )
        return stop

    def evaluate(self) -> None:
        """Loss on the held-out sequences, shared out over the ranks; every rank makes as many forward passes."""
        batches = self.sequences.validation_batches()
        if not batches:
            return
        began = time.perf_counter()
        rank, world = dist.get_rank(), dist.get_world_size()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss × sequences, sequences
        self.model.eval()
        with torch.no_grad():
            for first in range(0, len(batches), world):
                spare = first + rank >= len(batches)
                rows = batches[0] if spare else batches[first + rank]
                tokens = self.sequences.load(rows)
                loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
                if not spare:
                    totals += torch.tensor([float(loss) * len(rows), len(rows)], dtype=torch.float64).to(self.device)
        dist.all_reduce(totals)
        loss, count = float(totals[0] / totals[1]), int(totals[1])
        perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())
        seconds = time.perf_counter() - began
        self.emit(
            events.Evaluated(step=self.step, loss=loss, perplexity=perplexity, sequences=count, seconds=seconds)
        )

    def save(self) -> None:
        began = time.perf_counter()
        path = checkpoint.save(
            self.rundir,
            self.model,
            self.shards,
            self.step,
            self.method.state(),
            self.spec.optimisation.keep_checkpoints,
        )
        size = checkpoint.total_bytes(path) if dist.get_rank() == 0 else 0
        seconds = time.perf_counter() - began
        self.emit(events.Checkpointed(step=self.step, path=str(path), bytes=size, seconds=seconds))

    def _exchange(self, loss: float, stop: bool) -> tuple[float, int, int, bool]:
        """(mean loss, largest host peak, largest device peak, whether any rank was asked to stop), on all ranks."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        device = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        mine = torch.tensor([loss, host, device, float(stop)], dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        table = torch.stack(everyone).cpu()
        largest = table.max(dim=0).values
        return float(table[:, 0].mean()), int(largest[1]), int(largest[2]), bool(largest[3])

    def _seed_step(self) -> None:
        """Random numbers of the step (dropout) as a pure function of seed, step and rank: nothing to save."""
        seed = (self.spec.optimisation.seed * 1_000_003 + self.step) * 4096 + dist.get_rank()
        torch.manual_seed(seed % 2**63)

    def _report_tokens(self, tokens: int) -> None:
        self.emit(events.Preparing(step=0, what="tokenising the dataset", done=tokens))


class _StopRequest:
    """A stop file in the run directory, or SIGTERM: either is obeyed at the next step boundary."""

    def __init__(self, rundir: RunDir) -> None:
        self._file = rundir.stop
        self._signalled = False

    def present(self) -> bool:
        return self._signalled or self._file.exists()

    def __enter__(self) -> "_StopRequest":
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True


@contextmanager
def distributed() -> Iterator[None]:
    """torch.distributed from torchrun's environment, or a world of one; NCCL with a GPU, else gloo."""
    accelerated = torch.cuda.is_available()
    # On a CPU DeepSpeed would compile, at the first start, a kernel that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if accelerated:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(
        dist_backend="nccl" if accelerated else "gloo", auto_mpi_discovery=False, verbose=False, dist_init_required=True
    )
    try:
        yield
    finally:
        # After a failure another rank may be stuck in a collective; leaving is then the launcher's business.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _nowhere(_: Any) -> None:
    """What ranks other than 0 do with events."""


def _whole(value: int | None) -> int:
    """A field that a resolved spec always has."""
    assert value is not None
    return value


__all__ = ["Tensor", "distributed", "train"]
