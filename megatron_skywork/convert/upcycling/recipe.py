"""The recipe of an upcycling: which dense tensors an expert, a shared expert or a router is made from, and how.

Order of the steps for one matrix of an expert: the columns a shared expert takes are left out, the rest is a copy (with noise, or with columns drawn anew), the
copy is cut into pieces, the pieces of `up` and `down` are scaled. Every random number depends on (seed, what it is for, layer, copy) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from megatron_skywork.config.schema import Model
from megatron_skywork.convert.layouts import Piece
from megatron_skywork.convert.source import Source
from megatron_skywork.convert.streaming.units import Ref, Unit
from megatron_skywork.convert.table import Weight
from megatron_skywork.convert.upcycling.methods import blend, granular, router_init, shared
from megatron_skywork.convert.upcycling.methods.drop import dropped_columns, reinitialize
from megatron_skywork.convert.upcycling.methods.moments import moments
from megatron_skywork.convert.upcycling.methods.noise import with_noise
from megatron_skywork.convert.upcycling.methods.row_chunks import row_chunks, scaled
from megatron_skywork.convert.upcycling.methods.seeds import generator
from megatron_skywork.convert.upcycling.options import UpcycleOptions

# Of a feed-forward's matrices by the kind of our tensor: their dense names, in the order of its parts, and the axis of the inner columns.
_MATRICES = {"fc1": (("gate_proj", "up_proj"), 0), "fc2": (("down_proj",), 1)}


class UpcycleRecipe:
    """As `streaming.units.Recipe`.

    Args:
        sources: the dense model, then those of `options.expert_sources`.
        routers: for router_init text the rows of each MoE layer's copies.
    """

    def __init__(self, sources: Sequence[Source], model: Model, options: UpcycleOptions, routers: Mapping[int, torch.Tensor]):
        self._sources, self._model, self._options, self._routers = sources, model, options, routers
        self._source_of = dict.fromkeys(range(options.num_copies), 0)
        for number, (_, copies) in enumerate(options.expert_sources, start=1):
            self._source_of.update(dict.fromkeys(copies, number))

    def sources(self, weight: Weight, piece: Piece) -> tuple[Ref, ...]:
        """Dense tensors for experts and shared experts, nothing for routers, one of each model for what is a mean."""
        if weight.kind in ("router", "shared_gate"):
            return ()
        if weight.kind.startswith(("expert_", "shared_")):
            number = self._source_of[self._copy(piece)] if weight.kind.startswith("expert_") else 0
            return ((number, self._dense_name(weight, piece)),)
        numbers = range(len(self._sources)) if self._options.trunk == "mean" else (0,)
        return tuple((number, weight.theirs[index]) for index in piece.parts for number in numbers)

    def dtype(self, weight: Weight) -> torch.dtype:
        """The dense model's; a new router is fp32, whose precision decides which expert a token goes to."""
        if weight.kind == "router":
            return torch.float32
        if weight.kind == "shared_gate":
            return self._sources[0].dtype
        if weight.kind.startswith(("expert_", "shared_")):
            names = tuple(f"model.layers.{weight.layer}.mlp.{name}.weight" for name in self._matrices(weight)[0])
            return self._sources[0].dtype_of(replace(weight, theirs=names))
        return self._sources[0].dtype_of(weight)

    def make(self, unit: Unit, tensors: list[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        """As `Recipe.make`."""
        weight, layer = unit.weight, unit.weight.layer
        if weight.kind == "router":
            assert layer is not None
            return iter([[granular.virtual_groups(self._router_rows(layer), self._options.granularity)]])
        if weight.kind == "shared_gate":
            return iter([[shared.gate_row(self._model.hidden_size, unit.dtype)]])
        if weight.kind.startswith("shared_"):
            return self._shared(unit, tensors)
        if weight.kind.startswith("expert_"):
            return self._experts(unit, tensors[0])
        return ([part.to(unit.dtype) for part in self._trunk(tensors, len(piece.parts))] for piece in unit.pieces)

    def _trunk(self, tensors: list[torch.Tensor], num_parts: int) -> list[torch.Tensor]:
        if self._options.trunk == "dense" or not num_parts:
            return tensors
        each = len(tensors) // num_parts
        return [blend.mean(tensors[start : start + each]) for start in range(0, len(tensors), each)]

    def _router_rows(self, layer: int) -> torch.Tensor:
        """Rows [copies, H] of a new router."""
        count, hidden, std = self._options.num_copies, self._model.hidden_size, self._options.router_init_std
        draw = generator(self._options.seed, "router", layer)
        if self._options.router_init == "text":
            return self._routers[layer]
        if self._options.router_init == "orthogonal":
            return router_init.orthogonal(count, hidden, std, draw)
        return router_init.zero(count, hidden) if self._options.router_init == "zero" else router_init.normal(count, hidden, std, draw)

    def _shared(self, unit: Unit, tensors: list[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        _, axis = self._matrices(unit.weight)
        assert self._options.shared_expert_ffn is not None
        for _ in unit.pieces:
            part = shared.shared_part(tensors[0], self._options.shared_expert_ffn, axis)
            yield [shared.behind_gate(part) if self._options.shared_expert_gate and axis == 1 else part]

    def _experts(self, unit: Unit, matrix: torch.Tensor) -> Iterator[Sequence[torch.Tensor]]:
        """One matrix of every expert of the unit, piece by piece of copy by copy."""
        options = self._options
        _, axis = self._matrices(unit.weight)
        name = self._dense_name(unit.weight, unit.pieces[0]).rpartition(".")[0].rpartition(".")[2]
        matrix = matrix.to(unit.dtype)
        if options.shared_expert_ffn is not None:
            matrix = shared.routed_part(matrix, options.shared_expert_ffn, axis)
        std = moments(row_chunks(matrix))[1] if options.noise else None
        made: tuple[int, torch.Tensor] | None = None
        cut: dict[int, torch.Tensor] = {}
        for piece in unit.pieces:
            copy, index = divmod(piece.offset[0], options.granularity)
            if options.noise or options.drop_ratio:
                if made is None or made[0] != copy:
                    made, cut = (copy, self._changed(matrix, unit.weight.layer, copy, name, axis, std)), {}
            elif made is None:
                made = (copy, matrix)
            if index not in cut:
                cut[index] = self._piece(made[1], index, name, axis)
            yield [cut[index]]

    def _changed(self, matrix: torch.Tensor, layer: int | None, copy: int, name: str, axis: int, std: float | None) -> torch.Tensor:
        options = self._options
        draw = generator(options.seed, "expert", layer, copy, name)
        if options.noise:
            return with_noise(matrix, options.noise, draw, std)
        columns = dropped_columns(matrix.shape[axis], options.drop_ratio, generator(options.seed, "columns", layer, copy))
        return reinitialize(matrix, columns, axis, draw)

    def _piece(self, matrix: torch.Tensor, index: int, name: str, axis: int) -> torch.Tensor:
        part = granular.piece(matrix, index, self._options.granularity, axis) if self._options.granularity > 1 else matrix
        up, down = granular.scales(self._options.output_factor())
        return scaled(part, {"up_proj": up, "down_proj": down}.get(name, 1.0))

    def _copy(self, piece: Piece) -> int:
        return piece.offset[0] // self._options.granularity

    def _matrices(self, weight: Weight) -> tuple[tuple[str, ...], int]:
        return _MATRICES[weight.kind.rpartition("_")[2]]

    def _dense_name(self, weight: Weight, piece: Piece) -> str:
        names, _ = self._matrices(weight)
        return f"model.layers.{weight.layer}.mlp.{names[piece.parts[0] % len(names)]}.weight"

