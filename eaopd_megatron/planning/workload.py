"""A recipe's teacher as a plan sees it: its sizes, where it is, and what it hands over."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.models.supported import ModelInfo, find_model
from eaopd_megatron.planning.activations import PlannedMicroBatch, Recompute
from eaopd_megatron.planning.layouts import PlannedLayout
from eaopd_megatron.teacher.payload import hidden_state_bytes, top_k_bytes

if TYPE_CHECKING:
    from eaopd_megatron.config import Recipe


BYTES_PER_NUMBER = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Of an activation, and of weights but fp8's."""


@dataclass(frozen=True)
class Workload:
    """The recipe's sizes that memory, traffic and time depend on."""

    prompts: int  # an iteration
    mini_batch: int  # samples an update
    micro_batch_tokens: int
    rollout_batch: int
    longest_prompt: int
    longest_response: int
    student_element: int = 2  # bytes of a weight
    recompute: Recompute = "none"
    distributed_optimizer: bool = False
    offloaded_moments: bool = False  # in host memory between updates

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Workload:
        return cls(
            prompts=recipe.train.prompts_per_iteration,
            mini_batch=recipe.train.mini_batch,
            micro_batch_tokens=recipe.train.micro_batch_tokens,
            rollout_batch=recipe.rollout.batch_size,
            longest_prompt=recipe.data.max_prompt_tokens,
            longest_response=recipe.rollout.max_response_tokens,
            student_element=BYTES_PER_NUMBER[recipe.student.precision],
            recompute=recipe.student.recompute,
            distributed_optimizer=recipe.optimizer.distributed,
            offloaded_moments=recipe.optimizer.offload == "moments",
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.longest_prompt + self.longest_response

    @property
    def updates(self) -> int:
        """An iteration."""
        return -(-self.prompts // self.mini_batch)

    def samples(self, layout: PlannedLayout) -> int:
        """Of an update, on the data-parallel rank that has most."""
        return -(-self.mini_batch // layout.data_parallel)

    def generated(self, layout: PlannedLayout) -> int:
        """Sequences that a rank generates together; context-parallel ranks have sequences of their own."""
        return min(self.rollout_batch, -(-self.prompts // layout.generating_replicas))

    def micro_batch(self, layout: PlannedLayout) -> PlannedMicroBatch:
        """The largest one."""
        whole = self.samples(layout) * self.longest
        tokens = max(self.longest, min(self.micro_batch_tokens, whole))
        return PlannedMicroBatch(tokens, tokens)

    def micro_batches(self, layout: PlannedLayout, sequence: float | None = None) -> int:
        """Of an update on a rank, whose sequences have so many tokens (none: the most)."""
        per = max(1, int(self.micro_batch_tokens // (sequence or self.longest)))
        return -(-self.samples(layout) // per)

    def response_rows(self, batch: PlannedMicroBatch, layout: PlannedLayout) -> float:
        """Positions of a micro-batch that have a loss."""
        return batch.tokens * self.longest_response / self.longest / layout.context_parallel


FP8 = 1  # bytes of a weight in the layers' matrices; norms are counted with them


@dataclass(frozen=True)
class PlannedTeacher:
    """key: its section in the recipe. layout, replicas, memory_fraction: of its own GPUs, where it is not colocated."""

    model: ModelInfo
    key: str = "teacher"
    placement: Literal["colocated", "separate", "served"] = "colocated"
    signal: Literal["topk", "hidden", "logits"] = "topk"
    top_k: int = 16
    element: int = 2  # bytes of an activation, and of a weight that is not fp8
    fp8: bool = False
    swapped_rows: bool = False  # of the output layer, which is then no part of the embedding
    offloaded: bool = False  # weights in host memory while it does not score
    layout: PlannedLayout = field(default_factory=PlannedLayout)
    replicas: int = 1
    memory_fraction: float = 1.0

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> tuple[PlannedTeacher, ...]:
        """The recipe's teachers. UserError for a model whose sizes cannot be found."""
        found = []
        for name, options in recipe.named_teachers().items():
            key = f"teachers.{name}" if name else "teacher"
            scorer = cls(
                model=find_model(options.model, f"{key}.model", served=options.placement == "served"),
                key=key,
                placement=options.placement,
                signal=recipe.resolve_signal(options),
                top_k=recipe.objective.build_objective().top_k,
                element=BYTES_PER_NUMBER[options.precision],
                fp8=options.precision == "fp8",
                swapped_rows=options.terminal_map == "swap",  # at most: where the end tokens differ
                offloaded=options.offload == "weights",
                layout=PlannedLayout(
                    **asdict(options.parallel_layout), data_parallel=options.parallel_layout.min_data_parallel_size
                ),
                replicas=options.replicas,
                memory_fraction=options.mem_fraction_static,
            )
            found.append(scorer)
        return tuple(found)

    def on_own_gpus(self) -> PlannedTeacher:
        """The same teacher, on GPUs of its own."""
        return replace(self, placement="separate", signal="hidden", offloaded=False) if self.colocated else self

    @property
    def role(self) -> str:
        """teacher, or teacher NAME."""
        return self.key.replace("teachers.", "teacher ")

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    @property
    def colocated(self) -> bool:
        return self.placement == "colocated"

    @property
    def bytes_per_token(self) -> int:
        """Of what it hands over of a response token; elsewhere than on the student's GPUs these travel."""
        if self.signal == "topk":
            return top_k_bytes(self.top_k, entropy=self.placement != "served")
        return hidden_state_bytes(self.shape.hidden, self.element)

    def weights(self, layout: PlannedLayout, stage: int, output_vocab: int | None = None) -> float:
        """Bytes of its weights on a rank. output_vocab: as `ModelShape.on_rank`."""
        shape = replace(self.shape, tied=False) if self.swapped_rows else self.shape
        held = shape.rank_parameters(layout, stage, output_vocab).total
        if not self.fp8:
            return held * self.element
        layers = (shape.layer_parameters(layout) * len(layout.layers_of(stage, shape.layers))).total
        return layers * FP8 + (held - layers) * self.element
