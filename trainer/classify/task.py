"""Labelled examples on one rank: those of a step in batches, and the metrics of all that is held out.

Step t has the examples [t·B, (t+1)·B) of the run's order, B = global_batch. Every micro-batch has equally many, so the
loss of a step is the mean over its examples, whatever the ranks and micro-batches. Metrics are no means over batches:
every rank's predictions are put together first, and measured as a whole.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer import glue, heldout
from trainer.batch import Batch, CountRight
from trainer.classify.labels import dataset_of
from trainer.config import TrainingSpec
from trainer.datasetconfig import METRICS, LabelledDataset
from trainer.metrics import measure
from trainer.order import Order, groups
from trainer.prepared import Prepared, training_of
from trainer.rundir import META
from trainer.task import Measured


class LabelTask:
    """The `Task` of classification."""

    def __init__(self, spec: TrainingSpec, directory: Path, rank: int, device: torch.device) -> None:
        meta = json.loads((directory / META).read_text())
        self.prepared = Prepared(directory, meta)
        self.training, self.held_out = training_of(dataset_of(spec), meta["examples"], meta["validation"])
        self._spec, self._rank, self._device = spec, rank, device
        self._dataset = dataset_of(spec)
        assert spec.optimisation.micro_batch is not None
        self._micro = spec.optimisation.micro_batch
        self._order = Order(spec.optimisation.seed, len(self.training))
        # Of the model, from `check` on: what pads, whether it tells segments apart, what it computes in.
        self._padding, self._has_segments, self._dtype = 0, False, torch.float32
        lengths = self.prepared.lengths[self.training.start : self.training.stop]
        self.training_tokens = int(lengths.sum())
        self.tokens_per_step = round(self.training_tokens / len(self.training) * spec.optimisation.global_batch)

    def tokens_before(self, step: int) -> int:
        first = self._spec.batches_before(step) * self._spec.optimisation.global_batch
        epoch, position = divmod(first, len(self.training))
        part = self._order.of_epoch(epoch)[:position]
        return epoch * self.training_tokens + int(self.prepared.lengths[part].sum())

    def micro_batches(self, step: int) -> list[Batch]:
        batch, ranks = self._spec.optimisation.global_batch, self._spec.resources.ranks
        first, end = (self._spec.batches_before(t) * batch for t in (step, step + 1))
        starts = range(first + self._rank * self._micro, end, self._micro * ranks)
        return [self.batch([self._order[start + j] for j in range(self._micro)]) for start in starts]

    def check(self, model: Any) -> None:
        self._padding = model.config.pad_token_id
        self._has_segments = (getattr(model.config, "type_vocab_size", 0) or 0) > 1
        self._dtype = next(model.parameters()).dtype

    def held_out_batches(self) -> list[list[int]]:
        """Examples that an evaluation uses, in batches of micro_batch. Equal on all ranks."""
        return list(groups(self.held_out[: self._spec.optimisation.evaluation_sequences], self._micro))

    def evaluate(self, model: Any) -> Measured | None:
        batches = self.held_out_batches()
        if not batches:
            return None
        numbers = [number for rows in batches for number in rows]
        place = {number: index for index, number in enumerate(numbers)}
        # Each rank fills in its own; the loss of a batch is its mean.
        predicted = torch.zeros(len(numbers) + 1, dtype=torch.float64)
        for rows, counts in heldout.share(batches):
            output = model(**self.batch(rows).inputs)
            if counts:
                predicted[[place[number] for number in rows]] = self._predictions(output).double().cpu()
                predicted[-1] += float(output.loss) * len(rows)
        predicted = predicted.to(self._device)
        dist.all_reduce(predicted)
        *_, loss = predicted.tolist()
        wanted = torch.from_numpy(np.array(self.prepared.values[numbers], dtype=np.float64))
        metrics = self._measure(predicted[:-1].cpu(), wanted)
        return Measured(loss / len(numbers), len(numbers), accuracy=metrics.get("accuracy"), metrics=metrics)

    def _measure(self, predicted: Tensor, wanted: Tensor) -> dict[str, float]:
        names = metrics_of(self._dataset)
        if self._dataset.kind == "number":
            return measure(names, predicted, wanted, 0)
        return measure(names, predicted.long(), wanted.long(), len(self._dataset.labels or ()))

    def _predictions(self, output: Any) -> Tensor:
        """(rows): the class whose logit is largest, or the number."""
        logits: Tensor = output.logits
        return logits[:, 0] if self._dataset.kind == "number" else logits.argmax(-1)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Padded on the right to the longest."""
        examples = [self.prepared[number] for number in numbers]
        width = max(len(ids) for ids, _ in examples)
        ids = torch.full((len(examples), width), self._padding, dtype=torch.int64)
        mask, segments = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (tokens, marks) in enumerate(examples):
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
            segments[row, : len(tokens)] = torch.from_numpy(marks)
            mask[row, : len(tokens)] = 1
        values = torch.from_numpy(np.array(self.prepared.values[list(numbers)]))
        labels = values.to(self._dtype) if self._dataset.kind == "number" else values.long()
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._has_segments:
            inputs["token_type_ids"] = segments
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        if self._dataset.kind == "number":
            return Batch(inputs)
        return Batch(inputs, targets=len(examples), right=self._right_of(inputs["labels"]))

    def _right_of(self, labels: Tensor) -> CountRight:
        def count(output: Any) -> Tensor:
            right: Tensor = (self._predictions(output) == labels).sum()
            return right

        return count


def metrics_of(dataset: LabelledDataset) -> list[str]:
    """What an evaluation reports: first what the run is judged by, then what its task of GLUE reports, or all."""
    assert dataset.metric is not None
    others = glue.TASKS[dataset.glue].metrics if dataset.glue else METRICS[dataset.kind]
    return list(dict.fromkeys([dataset.metric, *others]))
