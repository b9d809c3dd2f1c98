"""Seconds that one rank spends on a piece of the model for one micro-batch: every product, attention, pass over memory and collective, forward and backward.

With N tokens of a tensor-parallel group and T = N / tp of a rank, H hidden, A = heads * head_dim, G = key/value heads * head_dim, F inner widths, b bytes of a
number in the compute precision, R rows of routed experts on a rank (assignments that capacity keeps; a balanced router):

    attention       [N, H] x [H, (A + 2 G) / tp], causal attention of heads / tp, [N, A / tp] x [A / tp, H]
    feed-forward    [N, H] x [H, 2 F / tp], SwiGLU, [N, F / tp] x [F / tp, H]
    experts         gate (a pass over its tokens; its product is small), rows out (all-to-all), [R, H] x [H, 2 F / etp] and back for E / ep experts, rows in
    output, loss    [N, H] x [H, V / tp], four passes over logits; backward two products, three where logits are not kept
    context parallel  keys and values of a rank sent cp - 1 times to the next one (a ring, as Transformer Engine has it), in backward with their gradients
    backward        both products of each, one for inputs and one for weights; weights' gradients are added to fp32 buffers: 8 bytes a parameter
    recomputed      a layer, or the modules named, once more forward, collectives included
    elementwise     passes over memory: norms, residuals, rotary positions, SwiGLU, gathering and summing of rows, as the product's kernels read and write

Overlap: none inside a layer, but for keys and values that travel beside attention (what is longer counts). megatron-core runs backward's all-gather and
reduce-scatter beside products; but they take processors and memory bandwidth from them, and published runs come out nearer when they are waited for in full
(docs/planning.md), so that is what is counted.
Collectives' sizes are those of communication.py; a test holds their sums equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_skywork.config.schema import Config
from megatron_skywork.plan.collective_time import Network
from megatron_skywork.plan.communication import COMPUTE_BYTES, FP32, routed_rows, router_buffers
from megatron_skywork.plan.flops import attention_width
from megatron_skywork.plan.kernels import Kernels
from megatron_skywork.plan.parameters import expert_width
from megatron_skywork.plan.simulation import PieceCost

# Read and written for every parameter when its gradient is added to its fp32 buffer.
_GRADIENT_BYTES = 8


class Seconds(dict[str, float]):
    """Seconds by what they are spent on; a kind that is not there has none."""

    def __missing__(self, kind: str) -> float:
        return 0.0

    def total(self) -> float:
        return sum(self.values())


def added(*parts: Seconds) -> Seconds:
    """Kind by kind."""
    return Seconds({kind: sum(part[kind] for part in parts) for part in parts for kind in part})


@dataclass(frozen=True)
class Part:
    """Seconds of a part of the model for one micro-batch, by kind: products, attention, elementwise, tp, cp, ep.

    Args:
        forward, backward: backward without recomputation.
        weights: of `backward`, what only weights' gradients need.
    """

    forward: Seconds = field(default_factory=Seconds)
    backward: Seconds = field(default_factory=Seconds)
    weights: float = 0.0

    def __add__(self, other: Part) -> Part:
        return Part(added(self.forward, other.forward), added(self.backward, other.backward), self.weights + other.weights)


class _Sizes:
    """A model's sizes on one rank, as the docstring above names them."""

    def __init__(self, config: Config):
        m, p, t = config.model, config.parallel, config.train
        self.tp = p.tp
        self.group_tokens = t.micro_batch_size * config.data.seq_length // p.cp
        self.rank_tokens = self.group_tokens / p.tp
        self.hidden, self.attention = m.hidden_size, attention_width(config)
        self.keys_values = 2 * m.resolved_query_groups * m.resolved_head_dim
        self.vocab = m.padded_vocab_size // p.tp
        self.number_bytes = COMPUTE_BYTES[t.precision]
        self.activations = self.group_tokens * self.hidden * self.number_bytes


class LayerCost:
    """Costs of each part of a model under one layout.

    Args:
        config: checked for its world size.
    """

    def __init__(self, config: Config, kernels: Kernels, network: Network):
        self._config, self._kernels, self._network, self._sizes = config, kernels, network, _Sizes(config)
        self._attention, self._norms = self._attention_part(), self._norms_part()
        self._core = self._core_part()
        self._dense = self._linear_pair(config.model.ffn_hidden_size)
        self._moe = self._router = self._shared = Part()
        if config.moe is not None:
            self._router, self._moe = self._router_part(), self._experts_part()
            if config.moe.shared_expert_ffn_hidden_size:
                self._shared = self._linear_pair(config.moe.shared_expert_ffn_hidden_size)

    def layer(self, layer: int) -> Part:
        """Of one layer (from 0), nothing recomputed."""
        is_sparse = layer in set(self._config.moe_layers)
        feed_forward = self._router + self._moe + self._shared if is_sparse else self._dense
        return self._norms + self._attention + self._core + feed_forward

    def recomputed(self, layer: int, *, whole: bool) -> Seconds:
        """What backward computes again of one layer: all of its forward, or the modules that recompute=selective names."""
        p = self._config.parallel
        if whole:
            return self.layer(layer).forward
        if p.recompute != "selective":
            return Seconds()
        is_sparse, modules = layer in set(self._config.moe_layers), set(p.recompute_modules)
        parts = [self._core] * ("core_attn" in modules) + [self._norms] * ("layernorm" in modules)
        if is_sparse and "moe" in modules:
            parts += [self._router, self._moe, self._shared]
        elif is_sparse:
            parts += [self._router] * ("router" in modules) + [self._shared] * ("shared_experts" in modules)
        elif "mlp" in modules:
            parts.append(self._dense)
        return added(*(part.forward for part in parts))

    def embedding(self) -> Part:
        """Look-up, scattered over the sequence."""
        s = self._sizes
        looked_up = self._elementwise(2 * s.activations)
        return Part(
            added(looked_up, self._tp("reduce_scatter", s.activations)),
            added(looked_up, self._elementwise(s.activations), self._tp("all_gather", s.activations)),
        )

    def output(self) -> Part:
        """Final norm, output layer and loss."""
        s, kernels = self._sizes, self._kernels
        product = kernels.matmul(s.group_tokens, s.hidden, s.vocab)
        logits = s.group_tokens * s.vocab * s.number_bytes
        again = self._config.train.precision == "fp32" or not self._config.train.keep_logits
        statistics = self._tp("all_gather", s.tp * 3 * s.group_tokens * FP32)
        weights = product + kernels.memory(s.vocab * s.hidden * _GRADIENT_BYTES)
        forward = added(Seconds(products=product), self._elementwise(2 * logits), self._tp("all_gather", s.activations), statistics, self._norm(2))
        # The inputs' gradient is summed up in fp32 over blocks of the vocabulary, then scattered once.
        scattered = self._tp("reduce_scatter", s.activations)
        backward = added(Seconds(products=product * (1 + again) + weights), self._elementwise(2 * logits), scattered, self._norm(3))
        return Part(forward, backward, weights)

    # ------------------------------------------------------------------------------------------------------------------------ parts

    def _norm(self, passes: int) -> Seconds:
        return self._elementwise(passes * self._sizes.activations / self._sizes.tp)

    def _norms_part(self) -> Part:
        """Both norms of a layer, and its two residual sums: reads and writes of a rank's part of the sequence."""
        return Part(self._norm(2 * (2 + 3)), self._norm(2 * (3 + 1)))

    def _attention_part(self) -> Part:
        """Both projections and the rotation of queries and keys."""
        s, m = self._sizes, self._config.model
        rotated = self._elementwise(2 * s.group_tokens * (s.attention + s.keys_values / 2) / s.tp * s.number_bytes * (1 + m.qk_norm))
        queries = self._split_columns((s.attention + s.keys_values) // s.tp)
        return queries + self._split_rows(s.attention // s.tp) + Part(rotated, rotated)

    def _core_part(self) -> Part:
        """Attention proper."""
        m, p, t = self._config.model, self._config.parallel, self._config.train
        heads, groups = m.num_attention_heads // p.tp, max(m.resolved_query_groups // p.tp, 1)

        def seconds(backward: bool) -> Seconds:
            # Context parallelism deals each rank its share of every sequence's work.
            work = self._kernels.attention(t.micro_batch_size / p.cp, self._config.data.seq_length, heads, groups, m.resolved_head_dim, backward=backward)
            # Keys and values go round among the ranks, in backward with their gradients, beside the products of those that came before.
            around = (1 + backward) * (p.cp - 1) * self._sizes.group_tokens * self._sizes.keys_values / p.tp * self._sizes.number_bytes
            passed = self._network.sent("cp", "send", around, calls=p.cp - 1)
            return Seconds(attention=work, cp=max(passed - work, 0.0))

        return Part(seconds(False), seconds(True))

    def _linear_pair(self, width: int) -> Part:
        """A dense feed-forward, or a shared expert."""
        s = self._sizes
        numbers = s.group_tokens * width / s.tp * s.number_bytes
        middle = Part(self._elementwise(3 * numbers), self._elementwise(6 * numbers))
        return self._split_columns(2 * width // s.tp) + middle + self._split_rows(width // s.tp)

    def _split_columns(self, columns: int) -> Part:
        """A product whose columns are split over tp: its input is gathered, and again in backward."""
        s = self._sizes
        product = self._kernels.matmul(s.group_tokens, s.hidden, columns)
        weights = product + self._kernels.memory(s.hidden * columns * _GRADIENT_BYTES)
        gathered, scattered = (self._network.collective("tp", name, s.activations) for name in ("all_gather", "reduce_scatter"))
        return Part(Seconds(products=product, tp=gathered), Seconds(products=product + weights, tp=gathered + scattered), weights)

    def _split_rows(self, inner: int) -> Part:
        """A product whose inner dimension is split over tp: its result is summed and scattered, in backward the gradient gathered first."""
        s = self._sizes
        product = self._kernels.matmul(s.group_tokens, inner, s.hidden)
        weights = product + self._kernels.memory(s.hidden * inner * _GRADIENT_BYTES)
        gathered, scattered = (self._network.collective("tp", name, s.activations) for name in ("all_gather", "reduce_scatter"))
        return Part(Seconds(products=product, tp=scattered), Seconds(products=product + weights, tp=gathered), weights)

    def _router_part(self) -> Part:
        """Gate in fp32 over a rank's tokens, with what it takes to choose; passes over [T, E] are small beside those over [T, H]."""
        s, moe = self._sizes, self._config.moe
        assert moe is not None
        tokens = self._elementwise(s.rank_tokens * (s.hidden * s.number_bytes + 12 * moe.num_experts * FP32))
        told = sum(self._network.collective("tp_cp", buffer.operation, buffer.num_bytes) for buffer in router_buffers(self._config))
        return Part(added(tokens, Seconds(tp=told)), added(tokens, tokens))

    def _experts_part(self) -> Part:
        """Routed experts: rows to their experts, two grouped products, rows back."""
        s, p, moe = self._sizes, self._config.parallel, self._config.moe
        assert moe is not None
        experts, width = moe.num_experts // p.ep, expert_width(self._config) // p.etp
        rank_rows = routed_rows(self._config, int(s.rank_tokens)).balanced
        rows = rank_rows * p.etp  # expert tensor parallelism gathers them
        row_bytes = s.hidden * s.number_bytes
        into = self._kernels.grouped_matmul(experts, rows, s.hidden, 2 * width)
        out = self._kernels.grouped_matmul(experts, rows, width, s.hidden)
        weights = into + out + self._kernels.memory(experts * 3 * s.hidden * width * _GRADIENT_BYTES)
        inner = rows * width * s.number_bytes
        # Rows are gathered, sorted again where they come from several ranks, and summed up into tokens; each the other's gradient.
        moved = rank_rows * row_bytes * (2 + 2 * (2 if p.ep * p.etp > 1 else 0) + 1) + s.rank_tokens * row_bytes
        forward, backward = self._dispatch(rank_rows, row_bytes)
        return Part(
            added(Seconds(products=into + out), self._elementwise(3 * inner + moved), forward),
            added(Seconds(products=into + out + weights), self._elementwise(6 * inner + moved), backward),
            weights,
        )

    def _dispatch(self, rank_rows: float, row_bytes: float) -> tuple[Seconds, Seconds]:
        """Seconds of the experts' collectives, forward and backward."""
        s, p, moe = self._sizes, self._config.parallel, self._config.moe
        assert moe is not None
        fp32_row, ranks, network = s.hidden * FP32, p.etp * p.ep, self._network
        if moe.dispatcher == "allgather":
            tokens = ranks * s.rank_tokens

            def seconds(operation: str, *row: float) -> float:
                return sum(network.collective("etp_ep", operation, tokens * num_bytes) for num_bytes in row)

            gate = moe.num_experts * FP32
            there = seconds("all_gather", row_bytes, gate, moe.num_experts) + seconds("reduce_scatter", fp32_row)
            back = seconds("all_gather", fp32_row) + seconds("reduce_scatter", row_bytes, gate)
            return Seconds(ep=there), Seconds(ep=back)
        leaving = rank_rows * (p.ep - 1) / p.ep
        exchanged = 2 * network.all_to_all("ep", leaving * row_bytes) + network.all_to_all("ep", leaving * FP32)
        sizes = 0.0 if moe.pad_to_capacity else network.collective("etp_ep", "all_gather", ranks * moe.num_experts * 8)
        rows = p.etp * rank_rows

        def within_experts(gathers: tuple[float, ...], scatters: tuple[float, ...]) -> float:
            gathered = sum(network.collective("etp", "all_gather", rows * num_bytes) for num_bytes in gathers)
            return gathered + sum(network.collective("etp", "reduce_scatter", rows * num_bytes) for num_bytes in scatters)

        there, back = within_experts((row_bytes, FP32), (fp32_row,)), within_experts((fp32_row,), (row_bytes, FP32))
        return Seconds(ep=exchanged + there + sizes), Seconds(ep=exchanged + back)

    def _elementwise(self, num_bytes: float) -> Seconds:
        return Seconds(elementwise=self._kernels.memory(num_bytes))

    def _tp(self, operation: str, num_bytes: float) -> Seconds:
        return Seconds(tp=self._network.collective("tp", operation, num_bytes))


@dataclass(frozen=True)
class Piece:
    """One of the pp * vpp pieces of the model, for one micro-batch.

    Args:
        forward, backward, recomputed: seconds by kind; `backward` without `recomputed`.
        weights: seconds of `backward` that only weights' gradients need.
    """

    forward: Seconds
    backward: Seconds
    recomputed: Seconds
    weights: float

    def cost(self, send_seconds: float, kept_bytes: float) -> PieceCost:
        """As the simulation takes it."""
        backward = self.backward.total() + self.recomputed.total()
        return PieceCost(self.forward.total(), backward, self.weights, send_seconds, kept_bytes)


def piece(cost: LayerCost, layers: list[int], num_recomputed: int, *, first: bool, last: bool) -> Piece:
    """Cost of consecutive layers, the first `num_recomputed` of which are computed again as a whole.

    Args:
        first, last: whether the embedding, and the output layer with the loss, stand here.
    """
    total = Part()
    recomputed: list[Seconds] = []
    for number, layer in enumerate(layers):
        total += cost.layer(layer)
        recomputed.append(cost.recomputed(layer, whole=number < num_recomputed))
    ends: list[Callable[[], Part]] = [cost.embedding] * first + [cost.output] * last
    for end in ends:
        total += end()
    return Piece(total.forward, total.backward, added(*recomputed), total.weights)

