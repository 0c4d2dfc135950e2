"""Whole values out of, and into, an engine that shards them: the same verbs at every ZeRO stage.

Everything is addressed by parameter and by part: its value, or one of the optimizer's moments. A rank holds a
*fragment* of each, a run of the flattened whole. Reading puts fragments together and is collective: every rank must
call it for the same parameter in the same order. Writing is local: every rank is given the same whole value and
copies its own run out of it, so no rank waits for another.

The traps that live here, so that nobody else meets them (DeepSpeed 0.19):
- `safe_set_full_fp32_param` does nothing at stage 0, and at stages 1 and 2 writes the fp32 master only; what the next
  forward pass reads is another copy. `write` sets both.
- Before the first step there is no optimizer state, and asking for it makes the owning rank raise while the others
  wait. `create_state` makes it right after the engine.
- At stage 3 the full-value functions need a size that divides by the number of ranks; only the local ones pad.
- At stage 3 a small parameter is *persisted*: a full copy stays beside the shard and must be written too.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from trainer.optimizer import MOMENTS, Rules
from trainer.swapped import group_in_memory, shard_in_memory


def shape_of(parameter: Any) -> torch.Size:
    """The whole's shape, also where stage 3 has left an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


class Shards:
    """The one way to the values of an engine whose optimizer is `Rules`. Groups are addressed by their names.

    A frozen parameter may be given a master too (`keep_master`): each rank holds a flat fp32 run of it.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._stage: int = engine.zero_optimization_stage()
        self._world = dist.get_world_size()
        self._rank = dist.get_rank()
        self._frozen_masters: dict[Any, Tensor] = {}
        self._create_state()

    @property
    def device(self) -> torch.device:
        device: torch.device = torch.device(self._engine.device)
        return device

    @property
    def example(self) -> Tensor:
        """An empty tensor of the masters' type on the engine's device."""
        for parameter in self._inner().group_of:
            return torch.empty(0, dtype=torch.promote_types(parameter.dtype, torch.float32), device=self.device)
        raise AssertionError("an engine without parameters")

    # ------------------------------------------------------------------------------------------------- read, write

    def read(self, parameter: Any) -> Tensor:
        """The whole value: of a trained parameter the fp32 master, of a frozen one what the forward pass uses.

        Collective. The result is a copy on the engine's device.
        """
        if parameter in self._frozen_masters:
            return self._gather(parameter, self._frozen_masters[parameter])
        if self._stage == 3:
            if parameter.requires_grad:
                return self._gather(parameter, safe_get_local_fp32_param(parameter))
            with shard_in_memory(parameter) as shard:
                return self._gather(parameter, shard)
        if self._stage == 0 or not parameter.requires_grad:
            whole: Tensor = parameter.detach().clone()
            return whole
        return self._sum_fragments(parameter, self._fragment(parameter, None))

    def write(self, parameter: Any, value: Tensor) -> None:
        """Set the whole value, master and forward copy alike. `value` must be equal on all ranks."""
        flat = value.detach().reshape(-1)
        if parameter in self._frozen_masters:
            master = self._frozen_masters[parameter]
            master.copy_(self._part(flat, master.numel()))
        if self._stage == 3:
            mine = self._own_part(parameter, flat)
            with shard_in_memory(parameter, change=True) as shard:
                shard.copy_(mine)
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.data.copy_(value)
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, mine.float())
            return
        parameter.data.copy_(value)
        if self._stage > 0 and parameter.requires_grad and (found := self._fragment(parameter, None)):
            start, fragment = found
            fragment.copy_(flat[start : start + fragment.numel()])

    def current(self, parameter: Any) -> Tensor:
        """The whole value as the forward pass reads it, and not a copy where it is whole here. Collective."""
        here: Tensor = self.read(parameter) if self._stage == 3 else parameter.detach()
        return here

    def clear(self, parameter: Any) -> None:
        """Every element of a trained parameter becomes 0, of master and forward copy."""
        if self._stage == 3:
            self.write(parameter, torch.zeros(shape_of(parameter), device=self.device))
            return
        parameter.data.zero_()
        if self._stage > 0 and (found := self._fragment(parameter, None)):
            found[1].zero_()

    def add_product(self, parameter: Any, keep: float, left: Any, right: Any) -> None:
        """A frozen matrix W ← keep·W + left·right, in its own type: of parameters, or of tensors that are equal on all
        ranks. Collective. At stage 3 each rank computes its own shard alone.
        """
        left, right = self._factor(left), self._factor(right)
        if self._stage < 3:
            parameter.data.addmm_(left.to(parameter), right.to(parameter), beta=keep)
            return
        columns = int(right.shape[1])

        def run(start: int, stop: int) -> Tensor:
            first, last = start // columns, -(-stop // columns)
            rows: Tensor = left[first:last] @ right
            return rows.flatten()[start - first * columns : stop - first * columns]

        self._change_shard(parameter, keep, run)

    def add_entries(self, parameter: Any, keep: float, places: Any, values: Any) -> None:
        """A frozen matrix W ← keep·W + scatter(places, values). As `add_product`."""
        places, values = self._factor(places).long(), self._factor(values)
        if self._stage < 3:
            if keep != 1.0:
                parameter.data.mul_(keep)
            parameter.data.view(-1).index_add_(0, places, values.to(parameter))
            return

        def run(start: int, stop: int) -> Tensor:
            inside = (places >= start) & (places < stop)
            found: Tensor = values.new_zeros(stop - start)
            return found.index_add_(0, places[inside] - start, values[inside])

        self._change_shard(parameter, keep, run)

    def _factor(self, value: Any) -> Tensor:
        """The whole, in float32 where stage 3 adds with it."""
        factor: Tensor = self.current(value) if isinstance(value, torch.nn.Parameter) else value
        return factor.float() if self._stage == 3 and factor.is_floating_point() else factor

    def _change_shard(self, parameter: Any, keep: float, run: Callable[[int, int], Tensor]) -> None:
        """Stage 3: W ← keep·W + change; `run` makes the elements of the change from one to another."""
        total, size = shape_of(parameter).numel(), parameter.ds_tensor.ds_numel
        start, stop = (min(total, index * size) for index in (self._rank, self._rank + 1))
        if stop > start:
            with shard_in_memory(parameter, change=True) as shard:
                mine = shard.view(-1)[: stop - start]
                # Rounded once, where the shard is narrower than its change.
                mine.copy_(mine.float() * keep + run(start, stop).to(mine.device))
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            parameter.data.copy_(self.read(parameter).to(parameter))

    def has_frozen_master(self, parameter: Any) -> bool:
        return parameter in self._frozen_masters

    def keep_master(self, parameter: Any, device: torch.device) -> None:
        """Keep a frozen parameter in fp32 too, this rank's run of it, on `device`."""
        flat = self.read(parameter).reshape(-1).float()
        size = -(-flat.numel() // self._world)
        self._frozen_masters[parameter] = self._part(flat, size).to(device, copy=True)

    def frozen_master_bytes(self) -> int:
        """Of this rank's."""
        return sum(master.numel() * master.element_size() for master in self._frozen_masters.values())

    def read_moment(self, parameter: Any, key: str) -> Tensor:
        """One of the parameter's moments, whole, fp32. Collective."""
        if self._stage == 3:
            return self._gather(parameter, safe_get_local_optimizer_state(parameter, key))
        if self._stage == 0:
            whole: Tensor = self._engine.optimizer.state[parameter][key].clone()
            return whole
        return self._sum_fragments(parameter, self._fragment(parameter, key))

    def write_moment(self, parameter: Any, key: str, value: Tensor) -> None:
        """Set one of the parameter's moments. `value` must be equal on all ranks."""
        flat = value.detach().reshape(-1)
        if self._stage == 3:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, flat).float(), key)
        elif self._stage == 0:
            self._engine.optimizer.state[parameter][key].copy_(value)
        elif found := self._fragment(parameter, key):
            start, fragment = found
            fragment.copy_(flat[start : start + fragment.numel()])

    # ------------------------------------------------------------------------------------------------ the optimizer

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def group(self, name: str) -> dict[str, Any]:
        return next(group for group in self.parameter_groups if group["name"] == name)

    def has_master(self, parameter: Any) -> bool:
        """Whether there is a value of the parameter in more digits than the forward pass reads."""
        return bool(parameter.requires_grad) or parameter in self._frozen_masters

    def moments_of(self, parameter: Any) -> tuple[str, ...]:
        """Which moments the parameter's rule keeps; none for a frozen one."""
        name = self._inner().group_of.get(parameter)
        return MOMENTS[self.group(name)["rule"]] if name is not None else ()

    def count(self, name: str) -> int:
        """Updates of the group that its bias correction counts; equal on all ranks."""
        return next((int(state["step"]) for group, state in self._states() if group["name"] == name), 0)

    def set_count(self, name: str, count: int) -> None:
        for group, state in self._states():
            if group["name"] == name:
                state["step"].fill_(count)

    def forget(self, name: str, parameters: Iterable[Any]) -> None:
        """All moments of `parameters`, which are the whole of the group, and its count become 0."""
        for parameter in parameters:
            for key in self.moments_of(parameter):
                self.write_moment(parameter, key, torch.zeros(shape_of(parameter), device=self.device))
        self.set_count(name, 0)

    def counts(self) -> dict[str, int]:
        return {group["name"]: self.count(group["name"]) for group in self.parameter_groups}

    def state_bytes(self) -> int:
        """Bytes of one copy of the moments, counted on live tensors and summed over shards. Collective."""
        mine = 0
        for (group, master), numel in zip(self._masters(), self._master_sizes(), strict=True):
            state = self._inner().state[master]
            for key in MOMENTS[group["rule"]]:
                # One that lies in a file is empty.
                mine += (state[key].numel() or numel) * state[key].element_size()
        if self._stage == 0:
            return mine  # every rank holds all of it
        total = torch.tensor(mine, dtype=torch.int64, device=self._engine.device)
        dist.all_reduce(total)
        return int(total)

    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the trained parameters, before clipping.

        At stage 0 to be asked before the step, which frees the gradients; at the others after it, which computes it.
        """
        if self._stage > 0:
            return float(self._engine.get_global_grad_norm())
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    @property
    def norm_is_known_before_step(self) -> bool:
        return self._stage == 0

    # ------------------------------------------------------------------------------------------------------ private

    def _inner(self) -> Rules:
        """Our optimizer inside DeepSpeed's, which is itself at stage 0."""
        inner: Rules = self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer
        return inner

    def _masters(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """(group, tensor) for each tensor that our optimizer steps: parameters, or flat shards of many."""
        optimizer, groups = self._engine.optimizer, self.parameter_groups
        if self._stage == 0:
            yield from ((group, p) for group in groups for p in group["params"])
        elif self._stage == 3:
            for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                yield groups[optimizer.sub_group_to_group_id[index]], flat
        else:
            yield from zip(groups, optimizer.single_partition_of_fp32_groups, strict=True)

    def _master_sizes(self) -> list[int]:
        """Elements of each of `_masters`, which is itself empty while it lies in a file."""
        if self._stage == 3:
            return [int(numel) for numel in self._engine.optimizer.fp16_partitioned_groups_flat_numel]
        return [master.numel() for _, master in self._masters()]

    def _states(self) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        state = self._inner().state
        return [(group, state[master]) for group, master in self._masters()]

    def _create_state(self) -> None:
        """What the first step would create, so that it can be read and written from the start."""
        for index, (group, master) in enumerate(self._masters()):
            with group_in_memory(self._engine.optimizer, index):
                self._inner().create_state(master, group["rule"])
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _fragment(self, parameter: Any, key: str | None) -> tuple[int, Tensor] | None:
        """Stages 1 and 2: (start in the flattened whole, view of this rank's run), or None where it has no part."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).detach().view(-1)

    def _sum_fragments(self, parameter: Any, found: tuple[int, Tensor] | None) -> Tensor:
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=self._engine.device)
        if found:
            start, fragment = found
            whole[start : start + fragment.numel()] = fragment.to(whole.device)
        dist.all_reduce(whole)
        return whole.view(parameter.shape)

    def _gather(self, parameter: Any, shard: Tensor) -> Tensor:
        """Stage 3: the whole from equal shards, the last of them padded."""
        mine = shard.detach().reshape(-1).to(self._engine.device)
        whole = torch.empty(self._world * mine.numel(), dtype=mine.dtype, device=mine.device)
        dist.all_gather(list(whole.chunk(self._world)), mine)
        shape = shape_of(parameter)
        return whole[: shape.numel()].view(shape)

    def _own_part(self, parameter: Any, flat: Tensor) -> Tensor:
        """Stage 3: this rank's shard of a flattened whole."""
        return self._part(flat, parameter.ds_tensor.ds_numel)

    def _part(self, flat: Tensor, size: int) -> Tensor:
        """This rank's run of a flattened whole that is cut into runs of `size`, padded with zeros."""
        mine = flat[self._rank * size : (self._rank + 1) * size]
        return torch.nn.functional.pad(mine, (0, size - mine.numel()))
