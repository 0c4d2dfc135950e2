"""Examples on one rank: which of them a step learns, as rows of tokens, and the held-out ones.

Step t has the examples [t·B, (t+1)·B) of the run's order, B = global_batch. Its loss is the mean over all of their
learnt tokens, however they are packed and whoever computes them: each batch's weight follows from the index alone.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer import heldout
from trainer.batch import Batch, CountRight
from trainer.causal import check_causal
from trainer.config import TrainingSpec
from trainer.finetune.leakage import border_mask, needs_mask
from trainer.finetune.make import dataset_of
from trainer.finetune.packing import deal, pack
from trainer.order import Order, groups
from trainer.prepared import Prepared, training_of
from trainer.rundir import META
from trainer.task import Measured

UNLEARNT = -100  # what transformers' losses leave out
Row = list[int]  # examples, one after the other


class ExampleTask:
    """The `Task` of fine-tuning."""

    def __init__(self, spec: TrainingSpec, directory: Path, rank: int, device: torch.device) -> None:
        meta = json.loads((directory / META).read_text())
        self.prepared = Prepared(directory, meta)
        self.training, self.held_out = training_of(dataset_of(spec), meta["examples"], meta["validation"])
        self._spec, self._rank, self._device = spec, rank, device
        self._masks = False
        self._packing, self._limit = dataset_of(spec).packing, spec.dataset.sequence_length
        assert spec.optimisation.micro_batch is not None
        self._micro = spec.optimisation.micro_batch
        self._order = Order(spec.optimisation.seed, len(self.training))
        lengths = self.prepared.lengths[self.training.start : self.training.stop]
        self.training_tokens = int(lengths.sum())
        self.tokens_per_step = round(self.training_tokens / len(self.training) * spec.optimisation.global_batch)

    def examples_of(self, step: int) -> list[int]:
        batch = self._spec.optimisation.global_batch
        first, end = (self._spec.batches_before(t) * batch for t in (step, step + 1))
        return [self._order[index] for index in range(first, end)]

    def tokens_before(self, step: int) -> int:
        first = self._spec.batches_before(step) * self._spec.optimisation.global_batch
        epoch, position = divmod(first, len(self.training))
        part = self._order.of_epoch(epoch)[:position]
        return epoch * self.training_tokens + int(self.prepared.lengths[part].sum())

    def micro_batches(self, step: int) -> list[Batch]:
        chosen = self.examples_of(step)
        ranks = self._spec.resources.ranks
        mine = deal(self._rows(chosen), ranks, self._micro)[self._rank]
        # n·R·M/N; engines average over R ranks and M batches.
        share = ranks * len(mine) / int(self.prepared.marked[chosen].sum())
        return [self._batch(rows, share) if rows else self._filling() for rows in mine]

    def check(self, model: Any) -> None:
        check_causal(model, self._limit, self._device)
        if self._packing:
            self._masks = needs_mask(model, self._limit, self._device)

    def evaluate(self, model: Any) -> Measured | None:
        chosen = list(self.held_out[: self._spec.optimisation.evaluation_sequences])
        if not chosen:
            return None

        def figures(rows: list[Row]) -> tuple[float, float, float]:
            batch = self._batch(rows, 1.0)
            output = model(**batch.inputs)
            assert batch.right is not None
            return float(output.loss) * batch.targets, batch.targets, float(batch.right(output))

        losses, targets, right = heldout.totals(list(groups(self._rows(chosen), self._micro)), figures, self._device)
        return Measured(losses / targets, len(chosen), accuracy=right / targets)

    def held_out_answers(self, count: int) -> list[tuple[list[int], list[int]]]:
        """(tokens before the first that is learnt, the learnt ones that follow) of the first held-out examples."""
        found = []
        for number in self.held_out[:count]:
            ids, marks = self.prepared[number]
            begin = int(np.argmax(marks))
            end = begin + int(np.argmin(np.append(marks[begin:], 0)))
            found.append((ids[:begin].tolist(), ids[begin:end].tolist()))
        return found

    def _rows(self, chosen: Sequence[int]) -> list[Row]:
        """The longest first."""
        lengths = [int(self.prepared.lengths[number]) for number in chosen]
        places = pack(lengths, self._limit) if self._packing else [[place] for place in range(len(chosen))]
        rows = [[chosen[place] for place in row] for row in places]
        return sorted(rows, key=lambda row: -int(self.prepared.lengths[row].sum()))

    def _batch(self, rows: Sequence[Row], share: float) -> Batch:
        inputs = collate(([self.prepared[number] for number in row] for row in rows), self._packing)
        on_device: dict[str, Any] = {name: value.to(self._device) for name, value in inputs.items()}
        if self._masks:
            on_device["attention_mask"] = border_mask(on_device["position_ids"])
        targets = sum(int(self.prepared.marked[row].sum()) for row in rows)
        right = right_of(on_device["labels"])
        return Batch(on_device | {"use_cache": False}, weight=targets * share, targets=targets, right=right)

    def _filling(self) -> Batch:
        """Two tokens that count for nothing, for a rank with fewer rows than others have batches."""
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self._device)
        return Batch(Batch.of_tokens(tokens).inputs, weight=0.0)


def collate(rows: Iterable[Iterable[tuple[Any, Any]]], packing: bool) -> dict[str, Tensor]:
    """input_ids and labels (rows, longest row), padded on the right; each row's examples as (ids, marks).

    With `packing` also position_ids, which begin anew with every example: that is how transformers is told not to let
    one attend to another. Padding goes on counting, and so is no example of its own; nothing learnt sees it.
    """
    whole: list[tuple[Any, Any, Any]] = []
    for row in rows:
        examples = list(row)
        ids, marks = (np.concatenate([example[part] for example in examples]) for part in (0, 1))
        positions = np.concatenate([np.arange(len(example[0])) for example in examples])
        whole.append((ids, np.where(marks != 0, ids, UNLEARNT), positions))
    width = max(len(ids) for ids, _, _ in whole)
    named: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
    for ids, labels, positions in whole:
        padding = width - len(ids)
        named["input_ids"].append(np.pad(ids, (0, padding)))
        named["labels"].append(np.pad(labels, (0, padding), constant_values=UNLEARNT))
        named["position_ids"].append(np.append(positions, positions[-1] + 1 + np.arange(padding)))
    if not packing:
        del named["position_ids"]
    return {name: torch.from_numpy(np.stack(values).astype(np.int64)) for name, values in named.items()}


def right_of(labels: Tensor) -> CountRight:
    """How many of the labels (batch, sequence) the logits (batch, sequence, vocabulary) before them put first."""

    def count(output: Any) -> Tensor:
        guesses: Tensor = output.logits.detach()[:, :-1].argmax(-1)
        return (guesses == labels[:, 1:]).sum()

    return count
