"""Bytes that autograd keeps of a micro-batch until its backward pass, part by part.

`path` selects the layers. "torch": this project's norms and torch's attention on padded sequences, as on a CPU or in
fp32; "varlen": the same with torch's variable-length attention, as on GPUs without Transformer Engine; both tested
against the bytes of saved tensors without context and expert parallelism. "fused": Transformer Engine's norms, which
keep input and output, flash attention on packed sequences and Megatron-Core's fused SwiGLU; from code, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eaopd_megatron.config.parallel import Recompute
from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.planning.workload import PlannedLayout, PlannedMicroBatch

LayerPath = Literal["torch", "varlen", "fused"]
FP32_BYTES = 4
INDEX_BYTES = 8


def gpu_layer_path(element: int, *, transformer_engine: bool) -> LayerPath:
    """Return which layers a model with weights of `element` bytes has on a GPU."""
    if transformer_engine:
        return "fused"
    return "varlen" if element < FP32_BYTES else "torch"


@dataclass(frozen=True)
class Activations:
    """What a micro-batch's activations depend on besides its size. element: bytes of an activation."""

    shape: ModelShape
    layout: PlannedLayout
    element: int = 2
    path: LayerPath = "fused"
    recompute: Recompute = "none"

    def of_stage(self, batch: PlannedMicroBatch, stage: int) -> float:
        """Return one micro-batch's bytes on a pipeline stage: layers, token ids and (last stage) the final norm."""
        layers = len(self.layout.layers_of(stage, self.shape.layers))
        if self.recompute == "full":  # the layers' inputs, and the rotary angles
            kept = layers * self._between(batch) * self.shape.hidden * self.element
            kept += self._tokens(batch) * self.shape.head_dim * FP32_BYTES
        else:
            kept = layers * self.layer(batch)
        last = stage == self.layout.pipeline_parallel - 1
        indices = 1 + (stage == 0) + last  # positions of the padded tokens; token ids; rows of the loss
        return kept + self._tokens(batch) * INDEX_BYTES * indices + (self.norm(batch) if last else 0)

    def peak(self, batch: PlannedMicroBatch, stage: int, micro_batches: int) -> float:
        """Return a stage's bytes for all micro-batches in flight and for the one layer that backward recomputes."""
        recomputed = self.layer(batch) if self.recompute == "full" else 0.0
        return self.layout.in_flight(stage, micro_batches) * self.of_stage(batch, stage) + recomputed

    def layer(self, batch: PlannedMicroBatch) -> float:
        """Return the bytes of a complete layer."""
        mlp = self.experts(batch) if self.shape.experts else self.mlp(batch)
        norm_output = self._between(batch) * self.shape.hidden * self.element  # kept by the product behind it
        return 2 * (self.norm(batch) + norm_output) + self.attention(batch) + mlp

    def norm(self, batch: PlannedMicroBatch) -> float:
        """Return a norm's bytes: its input, on the torch path the normalised fp32 copy, the deviations."""
        return self._between(batch) * (self.shape.hidden * self._norm_element + FP32_BYTES)

    def attention(self, batch: PlannedMicroBatch) -> float:
        """Return the bytes from the QKV product to the input of the output projection."""
        shape, tp, e = self.shape, self.layout.tensor_parallel, self.element
        cp = self.layout.context_parallel
        q, kv, heads = shape.query_width / tp, shape.kv_width / tp, shape.heads / tp
        kept = (q + 2 * kv) * e  # the product, which contains the values
        if shape.qk_norm:
            copies = self._norm_element  # queries are copied before their norm
            shared_keys = self.path == "fused" or e == FP32_BYTES  # the keys' norm keeps a view of the product
            kept += q * copies + kv * (copies - e if shared_keys else copies)
            kept += (heads + shape.kv_heads / tp) * FP32_BYTES
        kept += (q + kv) * e + 4 * shape.head_dim * e  # rotated queries and keys; sine and cosine of each
        kept += q * e  # the output
        sums = heads * FP32_BYTES  # of the softmax
        if self.recompute == "selective":
            return self._tokens(batch) * kept
        if self.path == "fused":
            return self._tokens(batch) * (kept + sums)
        if self.path == "varlen":  # with context parallelism also the keys and values that a rank's queries see
            seen = batch.tokens * (2 * cp + 1) / (2 * cp) * 2 * kv * e if cp > 1 else 0
            return self._tokens(batch) * (kept + sums) + seen
        # the same again, padded; keys and values of all context-parallel ranks, as gathered and reordered
        padded = batch.padded / cp * (2 * q * e + sums + 2 * kv * cp * e)
        gathered = batch.tokens * 2 * kv * e if cp > 1 else 0
        return self._tokens(batch) * kept + padded + gathered

    def mlp(self, batch: PlannedMicroBatch) -> float:
        """Return the bytes of gate, up and their product; on the torch path also of SiLU and a copy of up."""
        kept = 3 if self.path == "fused" else 5
        return self._tokens(batch) * kept * self.shape.intermediate / self.layout.tensor_parallel * self.element

    def experts(self, batch: PlannedMicroBatch) -> float:
        """Return the bytes of the router and of the experts' permuted rows, equally many for each expert."""
        shape, etp, top_k = self.shape, self.layout.expert_tensor_parallel, self.shape.experts_per_token
        router = top_k * (2 * INDEX_BYTES + FP32_BYTES)  # choices, order, weights
        router += shape.experts * (FP32_BYTES + 1)  # map of all experts
        kept = 3 if self.path == "fused" else 6  # of the torch path's the last is the product times the expert's weight
        row = (shape.hidden + kept * shape.expert_intermediate / etp) * self.element + FP32_BYTES
        return self._between(batch) * (router + top_k * etp * row)

    def workspace(self, batch: PlannedMicroBatch) -> float:
        """Return the bytes of the largest tensors that live together in one layer of a forward pass without grad."""
        shape, tp = self.shape, self.layout.tensor_parallel
        mlp = 5 * shape.intermediate / tp
        if shape.experts:
            mlp = shape.experts_per_token * (2 * shape.hidden + 5 * shape.expert_intermediate)
            mlp /= 1 if not self.layout.sequence_parallel else tp / self.layout.expert_tensor_parallel
        attention = (3 * shape.query_width + 4 * shape.kv_width) / tp
        return self._tokens(batch) * (3 * shape.hidden + max(mlp, attention)) * self.element

    def _tokens(self, batch: PlannedMicroBatch) -> float:
        """Return the tokens of a context-parallel rank."""
        return batch.tokens / self.layout.context_parallel

    def _between(self, batch: PlannedMicroBatch) -> float:
        """Return the tokens that a rank holds between matrices."""
        return self._tokens(batch) / self.layout.sequence_shards

    @property
    def _norm_element(self) -> int:
        """Bytes per element that a norm keeps besides its output."""
        return self.element if self.path == "fused" else 2 * FP32_BYTES
