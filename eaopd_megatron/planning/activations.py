"""Bytes that autograd keeps of a micro-batch until its backward, part by part.

`path` says whose layers run. "torch": this project's norms and torch's attention, as on a CPU; tested against the bytes
of saved tensors without context and expert parallelism. "fused": Transformer Engine's norms, which keep their input and
output, and flash attention on packed sequences; written from its code, not measured. MLPs keep the same on both.

S tokens, T = S / tp under sequence parallelism (else S), e bytes an element, widths already divided by tp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.planning.layouts import PlannedLayout

LayerPath = Literal["torch", "fused"]
Recompute = Literal["none", "selective", "full"]
FP32_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True)
class PlannedMicroBatch:
    """Packed sequences, before context parallelism cuts them."""

    tokens: int
    padded: int  # positions when all are as long as the longest, as torch's attention takes them


@dataclass(frozen=True)
class Activations:
    """What a micro-batch's activations depend on besides its size."""

    shape: ModelShape
    layout: PlannedLayout
    element: int = 2
    path: LayerPath = "fused"
    recompute: Recompute = "none"

    def of_stage(self, batch: PlannedMicroBatch, stage: int) -> float:
        """One micro-batch's, kept by a pipeline stage: its layers' and, at the ends, the ids and the final norm."""
        kept = len(self.layout.layers_of(stage, self.shape.layers)) * self.kept(batch)
        if self.recompute == "full":
            kept += self._tokens(batch) * self.shape.head_dim * FP32_BYTES  # the rotations' angles
        last = stage == self.layout.pipeline_parallel - 1
        indices = 1 + (stage == 0) + last  # where tokens are when padded; token ids; rows of the loss
        return kept + self._tokens(batch) * INDEX_BYTES * indices + (self.norm(batch) if last else 0)

    def peak(self, batch: PlannedMicroBatch, stage: int, micro_batches: int) -> float:
        """Of a stage: the micro-batches that are in flight there, and what backward makes anew of one layer."""
        again = self.layer(batch) if self.recompute == "full" else 0.0
        return self.layout.in_flight(stage, micro_batches) * self.of_stage(batch, stage) + again

    def kept(self, batch: PlannedMicroBatch) -> float:
        """Of a layer, under the chosen recompute: full keeps the layer's input alone."""
        if self.recompute == "full":
            return self._between(batch) * self.shape.hidden * self.element
        return self.layer(batch)

    def layer(self, batch: PlannedMicroBatch) -> float:
        """Of a whole layer."""
        mlp = self.experts(batch) if self.shape.experts else self.mlp(batch)
        return 2 * (self.norm(batch) + self._normed(batch)) + self.attention(batch) + mlp

    def norm(self, batch: PlannedMicroBatch) -> float:
        """A norm over the hidden size: its input and, of torch's, the normalised fp32 copy; the deviations."""
        return self._between(batch) * (self.shape.hidden * self._norm_element + FP32_BYTES)

    def attention(self, batch: PlannedMicroBatch) -> float:
        """From the product that makes queries, keys and values to the input of the one that ends the attention."""
        shape, tp, e = self.shape, self.layout.tensor_parallel, self.element
        cp = self.layout.context_parallel
        q, kv, heads = shape.query_width / tp, shape.kv_width / tp, shape.heads / tp
        kept = (q + 2 * kv) * e  # the product, of which the values are a part
        if shape.qk_norm:
            copies = self._norm_element  # queries are copied before their norm
            kept += q * copies + (kv * (copies - e) if self._fp32_or_fused else kv * copies)
            kept += (heads + shape.kv_heads / tp) * FP32_BYTES
        kept += (q + kv) * e + 4 * shape.head_dim * e  # queries and keys, rotated; sine and cosine of each
        kept += q * e  # the output
        sums = heads * FP32_BYTES  # of the softmax
        if self.recompute == "selective":
            return self._tokens(batch) * kept
        if self.path == "fused":
            return self._tokens(batch) * (kept + sums)
        # the same once more, padded; keys and values of all context-parallel ranks, as gathered and in order
        padded = batch.padded / cp * (2 * q * e + sums + 2 * kv * cp * e)
        gathered = batch.tokens * 2 * kv * e if cp > 1 else 0
        return self._tokens(batch) * kept + padded + gathered

    def mlp(self, batch: PlannedMicroBatch) -> float:
        """The two products' inputs are counted elsewhere and here; SiLU, gate and their product between."""
        return self._tokens(batch) * 5 * self.shape.intermediate / self.layout.tensor_parallel * self.element

    def experts(self, batch: PlannedMicroBatch) -> float:
        """Router, and the experts' rows where every expert gets as many: permuted inputs, and an MLP's parts."""
        shape, etp, chosen = self.shape, self.layout.expert_tensor_parallel, self.shape.experts_per_token
        router = chosen * (2 * INDEX_BYTES + FP32_BYTES) + shape.experts * (
            FP32_BYTES + 1
        )  # choices, order, weights; map of all experts
        row = (shape.hidden + 6 * shape.expert_intermediate / etp) * self.element + FP32_BYTES
        return self._between(batch) * (router + chosen * etp * row)

    def workspace(self, batch: PlannedMicroBatch) -> float:
        """The largest tensors that live together in one layer of a forward pass that keeps nothing."""
        shape, tp = self.shape, self.layout.tensor_parallel
        mlp = 5 * shape.intermediate / tp
        if shape.experts:
            mlp = shape.experts_per_token * (2 * shape.hidden + 5 * shape.expert_intermediate)
            mlp /= 1 if not self.layout.sequence_parallel else tp / self.layout.expert_tensor_parallel
        attention = (3 * shape.query_width + 4 * shape.kv_width) / tp
        return self._tokens(batch) * (3 * shape.hidden + max(mlp, attention)) * self.element

    def _tokens(self, batch: PlannedMicroBatch) -> float:
        """Of this context-parallel rank."""
        return batch.tokens / self.layout.context_parallel

    def _between(self, batch: PlannedMicroBatch) -> float:
        """Tokens that a rank holds between the matrices."""
        return self._tokens(batch) / self.layout.sequence_shards

    def _normed(self, batch: PlannedMicroBatch) -> float:
        """A norm's output, which the product behind it keeps."""
        return self._between(batch) * self.shape.hidden * self.element

    @property
    def _norm_element(self) -> int:
        """Bytes an element that a norm keeps besides its output."""
        return 2 * FP32_BYTES if self.path == "torch" else self.element

    @property
    def _fp32_or_fused(self) -> bool:
        """Whether the keys' norm keeps its input as a part of the product, not as a copy in fp32."""
        return self.path == "fused" or self.element == FP32_BYTES
