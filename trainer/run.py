"""A run in progress: what one rank holds, and the four things it can do with it."""

import resource
import time
from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist

from trainer import checkpoint, data, events
from trainer.config import TrainingSpec
from trainer.engine import build_engine
from trainer.errors import DivergenceError, SpecError
from trainer.hardware import model_flops_utilization
from trainer.lowrank.switch import SwitchReport
from trainer.methods import make_method
from trainer.methods.base import StepContext
from trainer.model import build_model
from trainer.rundir import RunDir
from trainer.schedule import learning_rate
from trainer.tokenizer import load_tokenizer
from trainer.zero import Shards

Emit = Callable[[events.Event], None]

# Its exponential, the perplexity, is still a number.
_LARGEST_LOSS = 700.0
_CALMER = "lower optimisation.learning_rate, lengthen warmup_steps, or set clip_norm"


class Run:
    """A run in progress on one rank: the engine, the data, the method, and how many steps are done."""

    def __init__(self, spec: TrainingSpec, rundir: RunDir, emit: Emit) -> None:
        self.spec, self.rundir = spec, rundir
        self.emit = emit if dist.get_rank() == 0 else _nowhere
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        self.device_name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        if dist.get_world_size() != spec.resources.processes:
            ranks, wanted = dist.get_world_size(), spec.resources.processes
            raise SpecError(f"resources.processes: {wanted}, but {ranks} ranks were started")
        self.emit(events.Preparing(step=0, what="building the model"))
        tokenizer = load_tokenizer(spec.tokenizer)
        self.sequences = data.Sequences(spec, rundir.data, dist.get_rank(), self.device)

        model = build_model(spec, tokenizer)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.method = make_method(spec)
        self.method.attach(model)
        resumed = checkpoint.newest_for_all(rundir)
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
            steps=whole(optimisation.steps),
            processes=dist.get_world_size(),
            device=self.device_name,
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
        for batch in batches:
            loss = self.engine(input_ids=batch, labels=batch, use_cache=False).loss
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
                f"step {self.step}: loss {mean_loss}, gradient norm {norm}; the last checkpoint is before it; {_CALMER}"
            )
        seconds = time.perf_counter() - began
        self._report_step(mean_loss, rate, norm, seconds, report, peak_host, peak_device)
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
        if not loss < _LARGEST_LOSS:
            raise DivergenceError(f"step {self.step}: held-out loss {loss}; {_CALMER}")
        perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())
        seconds = time.perf_counter() - began
        self.emit(events.Evaluated(step=self.step, loss=loss, perplexity=perplexity, sequences=count, seconds=seconds))

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

    def _report_step(
        self,
        loss: float,
        rate: float,
        norm: float,
        seconds: float,
        report: SwitchReport | None,
        peak_host: int,
        peak_device: int,
    ) -> None:
        tokens = self.spec.optimisation.global_batch * self.spec.dataset.sequence_length
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
                loss=loss,
                learning_rate=rate,
                gradient_norm=norm,
                tokens=self.step * tokens,
                seconds=seconds,
                projection_seconds=report.seconds if report else 0.0,
                tokens_per_second=tokens / seconds,
                mfu=model_flops_utilization(tokens / seconds, self.parameters, self.device_name, dist.get_world_size()),
                peak_device_bytes=peak_device if self.device.type != "cpu" else None,
                peak_host_bytes=peak_host,
            )
        )

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


def whole(value: int | None) -> int:
    """A field that a resolved spec always has."""
    assert value is not None
    return value


def _nowhere(_: events.Event) -> None:
    """Where the events of ranks other than 0 go."""
