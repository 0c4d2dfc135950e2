"""A run in progress: what one rank holds, and the four things it can do with it."""

import math
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist

from trainer import events
from trainer.assemble import assemble
from trainer.checkpoint import place, reading
from trainer.checkpoint.rollback import go_back
from trainer.checkpoint.writing import Writer
from trainer.classify.labels import completed
from trainer.config import TrainingSpec
from trainer.datasetconfig import LabelledDataset
from trainer.engine import build_engine, sharder
from trainer.errors import DivergenceError, RolledBackError, SpecError
from trainer.generation.greedy import samples
from trainer.guard import Guard
from trainer.hardware import model_flops_utilization
from trainer.methods import make_method
from trainer.rundir import RunDir
from trainer.schedule import learning_rate
from trainer.tasks import TASKS
from trainer.tokenizer import load_tokenizer
from trainer.update import Update, update
from trainer.zero import Shards

Emit = Callable[[events.Event], None]

# Its exponential, the perplexity, is still a number. A regression's squared error is in its labels' unit: any number.
_LARGEST_LOSS = 700.0
_CALMER = "lower optimisation.learning_rate, lengthen warmup_steps, or set clip_norm"


class Run:
    """A run in progress on one rank: the engine, the data, the method, and how many steps are done."""

    def __init__(
        self, spec: TrainingSpec, rundir: RunDir, emit: Emit, sync_events: Callable[[], None] = lambda: None
    ) -> None:
        spec = completed(spec, rundir)
        self.spec, self.rundir = spec, rundir
        self.emit = emit if dist.get_rank() == 0 else nowhere
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        self.device_name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        if dist.get_world_size() != spec.resources.ranks:
            ranks, wanted = dist.get_world_size(), spec.resources.ranks
            raise SpecError(f"resources: {wanted} ranks are asked for, but {ranks} were started")
        self.emit(events.Preparing(step=0, what="building the model"))
        self.tokenizer = load_tokenizer(spec.tokenizer)
        regression = isinstance(spec.dataset, LabelledDataset) and spec.dataset.kind == "number"
        self.largest_loss = math.inf if regression else _LARGEST_LOSS
        self.task = TASKS[spec.task].open(spec, rundir.data, dist.get_rank(), self.device)

        self.place = place.place_of(spec, rundir)
        if spec.checkpoints.url and dist.get_rank() == 0:
            place.check(self.place)
        self.writer = Writer(self.place, rundir, spec.checkpoints, sync_events)
        resumed = reading.newest_for_all(self.place)
        self.resumed = resumed is not None
        self.guard = Guard(spec.guard, resumed.guard if resumed else {})
        self.method = make_method(spec)
        model, self.parameters = assemble(spec, self.tokenizer, self.method, resumed, partial(sharder, spec))
        self.engine = build_engine(spec, model, self.method)
        self.model = self.engine.module
        self.shards = Shards(self.engine)
        self.method.keep_masters(self.shards)
        self.step = 0
        if resumed:
            reading.load_training_state(resumed, self.model, self.shards)
            self.method.load_state(resumed.method)
            self.step = resumed.step
            self.place.release(resumed.step)
        self.model.eval()
        with torch.no_grad():
            self.task.check(self.model)

    def started(self) -> events.Started:
        state_bytes = self.shards.state_bytes()
        optimisation = self.spec.optimisation
        shapes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in self.model.parameters()]
        return events.Started(
            step=self.step,
            steps=whole(optimisation.steps),
            processes=dist.get_world_size(),
            device=self.device_name,
            parameters=self.parameters,
            trained_parameters=sum(numel for trained, numel in shapes if trained),
            optimizer_state_bytes=state_bytes,
            full_adamw_state_bytes=2 * 4 * self.parameters,
            tokens_per_step=self.task.tokens_per_step,
            training_tokens=self.task.training_tokens,
        )

    def train_step(self, stop_requested: Callable[[], bool]) -> bool:
        """One update. True, on all ranks alike, when a stop has been requested."""
        began = time.perf_counter()
        rate = self.guard.rate_scale * learning_rate(self.step + 1, self.spec.optimisation)
        batches = self.task.micro_batches(self.step)
        self.model.train()
        made = update(self.engine, self.method, self.shards, self.step, rate, batches, self._seed_step)
        self.step += 1

        mean_loss, accuracy, peak_host, peak_device, stop, written = self._exchange(made, stop_requested())
        if not (mean_loss < self.largest_loss and math.isfinite(made.gradient_norm)):
            # The weights of the step before have this loss.
            what = f"loss {mean_loss} (it should be below {self.largest_loss:g}), gradient norm {made.gradient_norm}"
            self._gone_wrong(what, self.step - 1, self.spec.guard.on_divergence)
        self._report_step(made, mean_loss, accuracy, time.perf_counter() - began, peak_host, peak_device)
        self._watch(mean_loss)
        if self.writer.pending and written:
            self.commit()
        return stop

    def evaluate(self) -> float | None:
        """Loss on what is held out; None where nothing is. Collective."""
        began = time.perf_counter()
        self.model.eval()
        with torch.no_grad():
            found = self.task.evaluate(self.model)
        if found is None:
            return None
        if not found.loss < self.largest_loss:
            what = f"held-out loss {found.loss} (it should be below {self.largest_loss:g})"
            self._gone_wrong(what, self.step, self.spec.guard.on_divergence)
        self.emit(
            events.Evaluated(
                step=self.step,
                loss=found.loss,
                perplexity=math.exp(min(found.loss, _LARGEST_LOSS)),
                sequences=found.count,
                seconds=time.perf_counter() - began,
                accuracy=found.accuracy,
                metrics=found.metrics,
            )
        )
        for said in samples(self.spec, self.task, self.model, self.tokenizer):
            self.emit(events.Sampled(step=self.step, prompt=said.prompt, text=said.text, wanted=said.wanted))
        return found.loss

    def save(self, loss: float | None = None, wait: bool = True) -> None:
        """Begin a checkpoint of the step; `loss` is its held-out loss, where one is known. With `wait` it is whole when
        this returns; else it is committed after a later step."""
        if self.writer.pending:
            self.commit()
        self.writer.begin(self.model, self.shards, self.step, self.method.state(), self.guard.state(), loss)
        if wait or not self.spec.checkpoints.asynchronous:
            self.commit()

    def commit(self) -> None:
        """Finish the checkpoint that is being written."""
        self.emit(self.writer.commit())

    def _watch(self, loss: float) -> None:
        spike, wanted = self.guard.observe(loss), self.spec.guard
        if spike is None:
            return
        self.emit(events.Spiked(step=self.step, loss=loss, usual=spike.usual, deviations=spike.deviations))
        if wanted.on_spike != "report":
            far = f"{spike.deviations:.1f} standard deviations above the usual {spike.usual:.4f}"
            what = f"loss {loss:.4f}, {far}, and high for {wanted.patience} steps"
            self._gone_wrong(what, self.step - wanted.patience, wanted.on_spike)

    def _gone_wrong(self, what: str, suspect: int, answer: str) -> NoReturn:
        """Fail, or go back to before `suspect`, the first step whose weights may be spoilt. Collective."""
        told, guard, wanted = f"step {self.step}: {what}", self.guard, self.spec.guard
        if answer == "stop":
            raise DivergenceError(
                f"{told}; {_CALMER}, or have the run go back by itself (guard.on_divergence, on_spike)"
            )
        if guard.rollbacks >= wanted.most_rollbacks:
            raise DivergenceError(
                f"{told}; the run has gone back {guard.rollbacks} times, guard.most_rollbacks allows no more, and its "
                f"rate was {guard.rate_scale:.3g} × optimisation.learning_rate; {_CALMER}"
            )
        if self.writer.pending_before(suspect):
            self.commit()
        scale = guard.rate_scale * wanted.rate_factor
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            found = [go_back(self.place, suspect, guard.rollbacks + 1, scale)]
            if found[0] is not None:
                back = events.RolledBack(step=found[0], from_step=self.step, rate_scale=scale, reason=told)
                self.emit(back)
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            raise DivergenceError(f"{told}; no checkpoint of before is left to go back to; {_CALMER}")
        raise RolledBackError(f"{told}; started again, the run goes on from step {found[0]}", found[0])

    def _report_step(
        self, made: Update, loss: float, accuracy: float | None, seconds: float, peak_host: int, peak_device: int
    ) -> None:
        """`loss`, `accuracy` and the peaks are the ranks' together. Called with `step` already counted."""
        done = self.task.tokens_before(self.step)
        per_second = (done - self.task.tokens_before(self.step - 1)) / seconds
        for report in made.reports:
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
                loss=loss,
                accuracy=accuracy,
                learning_rate=made.rate,
                gradient_norm=made.gradient_norm,
                tokens=done,
                seconds=seconds,
                projection_seconds=sum(report.seconds for report in made.reports),
                tokens_per_second=per_second,
                mfu=model_flops_utilization(per_second, self.parameters, self.device_name, dist.get_world_size()),
                peak_device_bytes=peak_device if self.device.type != "cpu" else None,
                peak_host_bytes=peak_host,
            )
        )

    def _exchange(self, made: Update, stop: bool) -> tuple[float, float | None, int, int, bool, bool]:
        """(mean loss, share of the targets that was right, where they are counted, largest host peak, largest device
        peak, whether any rank was asked to stop, whether every rank has written its part of a checkpoint), on all
        ranks."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        device = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        figures = [made.loss, made.right, made.targets, host, device, float(stop), float(not self.writer.is_written)]
        mine = torch.tensor(figures, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        table = torch.stack(everyone).cpu()
        right, targets = float(table[:, 1].sum()), float(table[:, 2].sum())
        accuracy = right / targets if targets else None
        *_, host_peak, device_peak, stopping, unwritten = table.max(dim=0).values.tolist()
        return float(table[:, 0].mean()), accuracy, int(host_peak), int(device_peak), bool(stopping), not unwritten

    def _seed_step(self) -> None:
        """Random numbers of the step (dropout) as a pure function of seed, step and rank: nothing to save."""
        seed = (self.spec.optimisation.seed * 1_000_003 + self.step) * 4096 + dist.get_rank()
        torch.manual_seed(seed % 2**63)


def whole(value: int | None) -> int:
    """A field that a resolved spec always has."""
    assert value is not None
    return value


def nowhere(_: events.Event) -> None:
    """Where the events of ranks other than 0 go."""
