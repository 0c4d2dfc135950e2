"""Will it fit: an estimate of the bytes that a run takes on a device and on its host. Imports no torch.

What a method keeps is counted (trainer.memory). Beside it there is, at the worst moment, the largest of three things:

    backward   activations and logits, as the backward pass begins, with the sums of earlier micro-batches' gradients
    step       the rank's gradients once more, flat and in float32, 4 bytes an element (stage 3: of 10⁹ at a time); in
               fp32 stages 1 and 2 have no need of it. The optimizer itself is fused and has no temporaries
    switch     activations, two gradients of the largest target in float32, and its decomposition in float64: the
               matrix, a copy, both factors, a workspace, 40 bytes an entry; or its merge alone, 18 bytes an entry

and all the while:

    buckets    DeepSpeed's buffer for gradients on their way: as many as are trained, 5·10⁸ at most; two at stage 3
    gathered   stage 3 on several ranks, or with parameters in host memory: whole parameters, 10⁹ elements at most
    context    assumed: 1.0 GB, 1.5 GB with several ranks: CUDA, cuBLAS and NCCL
    margin     assumed: a tenth of all tensors, for what the allocator cannot use

Activations of a token in a LLaMA block of width d, feed-forward f, attention q + 2·kv, data type of w bytes:
norms 2·(3w + (w = 2 ? 2 : 0))·d, attention w·(2q + 2kv) by a kernel that keeps no scores, feed-forward 4w·f; a factor
that is trained adds its rank, DoRA each output. With activation checkpointing: a block's input, and one block whole.
Logits: 12 bytes a token and word, since the loss is computed in float32 with two temporaries of that size.

The host: the process (assumed: 2.5 GB), what is offloaded and the step's temporaries of it, a copy of the state while a
checkpoint is written; before, below stage 3, the whole model on every rank.
"""

from dataclasses import dataclass
from typing import Literal

from trainer import methodconfig as methods
from trainer.memory import Elements, Matrix, Memory, elements, memory, model_of
from trainer.presets import Shape

CONTEXT, CONTEXT_OF_SEVERAL = 1_000_000_000, 1_500_000_000
PROCESS = 2_500_000_000
MARGIN = 0.1
_BUCKET, _GATHERED, _GROUP = 500_000_000, 1_000_000_000, 1_000_000_000


@dataclass(frozen=True)
class Way:
    """How a model is trained; the names are the spec's. `micro_batch` sequences of `sequence_length` tokens."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"
    activation_checkpointing: bool = False
    processes: int = 1
    micro_batch: int = 1
    sequence_length: int = 1024
    others: Literal["trained", "frozen"] = "trained"

    @property
    def width(self) -> int:
        return {"fp32": 4, "bf16": 2}[self.dtype]

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence_length


@dataclass(frozen=True)
class Footprint:
    """Bytes; of a rank's device, and of a host with all ranks. `counted` and `tensors` are without assumptions."""

    counted: Memory
    buckets: int
    gathered: int
    activations: int
    logits: int
    step: int
    switch: int
    tensors: int
    device: int
    host: int


def footprint(settings: methods.MethodConfig, shape: Shape, vocabulary: int, way: Way) -> Footprint:
    """Of `settings` on a preset's shape, from random weights. Raises SpecError as `trainer.memory.memory`."""
    model = model_of(shape, vocabulary)
    found = elements(settings, model, way.others)
    several = way.processes > 1
    counted = memory(
        settings,
        model,
        dtype=way.dtype,
        zero_stage=way.zero_stage,
        offload=way.offload,
        offload_parameters=way.offload_parameters,
        processes=way.processes,
        beside=way.others,
    )
    bucket = way.width * min(_BUCKET, found.trained)
    buckets = bucket * {0: 0, 1: 1, 2: 1, 3: 2}[way.zero_stage]
    everything = found.frozen + found.trained + found.basis
    gathers = way.zero_stage == 3 and (several or way.offload_parameters != "none")
    gathered = way.width * min(_GATHERED, everything) if gathers else 0
    logits = 12 * way.tokens * vocabulary
    kept, block = _activations(settings, shape, way)
    mine = -(-found.trained // way.processes) if way.zero_stage else found.trained
    flattens = way.dtype == "bf16" or way.zero_stage in (0, 3)
    step = 4 * (min(mine, _GROUP) if way.zero_stage == 3 else mine) if flattens else 0
    switch = _switch(settings, model.matrices[:-2])
    worst = max(
        kept + max(logits, block),
        step if way.offload == "none" else 0,
        kept + block + switch if switch else 0,
    )
    tensors = counted.device.total + buckets + gathered + worst
    device = round((1 + MARGIN) * tensors) + (CONTEXT_OF_SEVERAL if several else CONTEXT)
    offloaded = counted.host.total + (step if way.offload != "none" else 0)
    training = way.processes * offloaded + _state(found, way.width)
    building = way.processes * way.width * model.parameters if way.zero_stage < 3 else 0
    host = way.processes * PROCESS + max(training, building)
    return Footprint(counted, buckets, gathered, kept + block, logits, step, switch, tensors, device, host)


def _activations(settings: methods.MethodConfig, shape: Shape, way: Way) -> tuple[int, int]:
    """(bytes that stay from the forward pass to the backward pass, bytes that are there again for one block)."""
    w, d = way.width, shape.hidden
    norm = (8 if w == 2 else 12) * d  # in float32, whatever the type
    attention = 2 * shape.head_size * (shape.heads + shape.kv_heads)
    block = 2 * norm + w * (attention + 4 * shape.ffn)
    for name, (rows, columns) in shape.target_sides().items():
        if isinstance(settings, methods.TargetedSettings) and settings.has_target(name):
            block += w * _of_layer(settings, rows, columns)
    if way.activation_checkpointing:
        return way.tokens * (shape.layers * w * d + norm), way.tokens * block
    return way.tokens * (shape.layers * block + norm), 0


def _of_layer(settings: methods.TargetedSettings, rows: int, columns: int) -> int:
    """Numbers that a method's layer keeps of a token for its backward pass, beside its input."""
    if isinstance(settings, methods.GaLoreConfig | methods.GoLoreConfig | methods.GaLorePlusConfig):
        return (settings.rank or 0) if rows > columns else 0
    if isinstance(settings, methods.ScaledFactorsSettings | methods.LoroConfig | methods.LowRankConfig):
        return (settings.rank or 0) + (rows if isinstance(settings, methods.DoraConfig) else 0)
    return 0


def _switch(settings: methods.MethodConfig, targets: tuple[Matrix, ...]) -> int:
    """Bytes for a moment, beside a forward pass's, while the largest target has a new subspace chosen and is merged."""
    sizes = [m.rows * m.columns for m in targets if isinstance(settings, methods.TargetedSettings)]
    largest = max(sizes, default=0)
    if isinstance(settings, methods.GradientSettings):
        return (2 * 4 + 40) * largest
    return 18 * largest if isinstance(settings, methods.SubspaceSettings | methods.ReloraConfig) else 0


def _state(found: Elements, width: int) -> int:
    """Of a checkpoint: whole tensors, what is trained and its moments in float32."""
    return width * (found.frozen + found.basis) + 4 * (found.trained + found.moments + found.index + found.residual)
