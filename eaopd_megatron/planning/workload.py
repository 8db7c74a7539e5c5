"""What a plan takes from a recipe: layout, batch sizes, teachers, servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from eaopd_megatron.config.parallel import ParallelLayout, Recompute
from eaopd_megatron.config.schema import teacher_key
from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.models.supported import ModelInfo, find_model, layout_reasons, separate_layout
from eaopd_megatron.teacher.payload import hidden_state_bytes, top_k_bytes

if TYPE_CHECKING:
    from eaopd_megatron.config import Recipe, StudentConfig

GPUS_PER_HOST = 8
BYTES_PER_NUMBER = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Bytes of an activation, and of a weight that is not fp8."""
FP8_BYTES = 1
"""Bytes of an fp8 layer's weights; its norms are counted with them."""


@dataclass(frozen=True)
class PlannedLayout(ParallelLayout):
    """A model-parallel layout with its number of data-parallel copies."""

    data_parallel: int = 1

    @classmethod
    def of(cls, student: StudentConfig, gpus: int | None) -> PlannedLayout:
        """Return the recipe's layout with as many copies as `gpus` hold; None: as in the recipe, or on one host."""
        layout = student.parallel_layout
        copies = (gpus or GPUS_PER_HOST) // layout.model_parallel_size
        if gpus is None and student.data_parallel:
            copies = student.data_parallel
        return cls(**asdict(layout), data_parallel=max(1, copies))

    @property
    def gpus(self) -> int:
        return self.model_parallel_size * self.data_parallel

    @property
    def generating_replicas(self) -> int:
        """Number of TP x PP groups that generate distinct sequences."""
        return self.data_parallel * self.context_parallel

    @property
    def expert_data_parallel(self) -> int:
        """Number of ranks with the same experts."""
        return self.gpus // self.expert_model_parallel_size

    @property
    def sequence_shards(self) -> int:
        """Number of ranks that share the tokens between matrices (sequence parallelism)."""
        return self.tensor_parallel if self.sequence_parallel else 1

    def in_flight(self, stage: int, micro_batches: int) -> float:
        """Return how many micro-batches' activations a stage holds at once, in units of all of the stage's layers."""
        pp, vp = self.pipeline_parallel, self.virtual_pipeline
        if vp == 1:
            return min(pp - stage, micro_batches)
        return min(2 * (pp - stage - 1) + (vp - 1) * pp + 1, micro_batches * vp) / vp


def layout_refusals(shape: ModelShape, layout: PlannedLayout, label: str = "student.model") -> list[str]:
    """Return why a layout cannot hold a model, each starting with `label`; empty where it can."""
    found = [f"{label}: {reason}" for reason in layout_reasons(shape, layout)]
    if layout.gpus % layout.expert_model_parallel_size:
        found.append(
            f"{label}: expert_parallel x expert_tensor_parallel x pipeline_parallel="
            f"{layout.expert_model_parallel_size} does not divide the {layout.gpus} GPUs"
        )
    return found


def enumerate_layouts(gpus: int, *, experts: bool) -> Iterator[PlannedLayout]:
    """Yield the layouts of `gpus` GPUs; tensor parallelism within a host and with sequence parallelism.

    experts: whether a model has any, which may be sharded over ranks of their own.
    """
    for tp in _divisors(gpus, GPUS_PER_HOST):
        for pp in _divisors(gpus // tp, 16):
            for cp in _divisors(gpus // tp // pp, 8):
                stage = gpus // pp
                for etp in sorted({1, tp}) if experts else [1]:
                    for ep in _divisors(stage // etp, stage) if experts else [1]:
                        yield PlannedLayout(tp, tp > 1, pp, 1, cp, ep, etp, gpus // (tp * pp * cp))


def _divisors(number: int, most: int) -> list[int]:
    return [i for i in range(1, min(number, most) + 1) if number % i == 0]


@dataclass(frozen=True)
class PlannedMicroBatch:
    """Packed sequences, before context parallelism. padded: tokens if all were as long as the longest."""

    tokens: int
    padded: int


@dataclass(frozen=True)
class Workload:
    """The recipe's sizes that memory, traffic and time depend on; lengths in tokens."""

    prompts: int  # per iteration
    mini_batch: int  # samples per update
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
        """Updates per iteration."""
        return -(-self.prompts // self.mini_batch)

    def samples(self, layout: PlannedLayout) -> int:
        """Return the samples of an update on the data-parallel rank that has most."""
        return -(-self.mini_batch // layout.data_parallel)

    def generated(self, layout: PlannedLayout) -> int:
        """Return the sequences that a rank generates together; context-parallel ranks generate their own."""
        return min(self.rollout_batch, -(-self.prompts // layout.generating_replicas))

    def micro_batch(self, layout: PlannedLayout) -> PlannedMicroBatch:
        """Return the largest micro-batch."""
        tokens = max(self.longest, min(self.micro_batch_tokens, self.samples(layout) * self.longest))
        return PlannedMicroBatch(tokens, tokens)

    def micro_batches(self, layout: PlannedLayout, sequence: float | None = None) -> int:
        """Return the micro-batches of an update on a rank, for sequences of `sequence` tokens (None: the longest)."""
        per = max(1, int(self.micro_batch_tokens // (sequence or self.longest)))
        return -(-self.samples(layout) // per)

    def response_rows(self, batch: PlannedMicroBatch, layout: PlannedLayout) -> float:
        """Return the positions of a micro-batch that have a loss, per context-parallel rank."""
        return batch.tokens * self.longest_response / self.longest / layout.context_parallel


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher. key: its section of the recipe. The last three fields are for one that is not colocated."""

    model: ModelInfo
    key: str = "teacher"
    placement: Literal["colocated", "separate", "served"] = "colocated"
    signal: Literal["topk", "hidden", "logits"] = "topk"
    top_k: int = 16
    element: int = 2  # bytes of an activation, and of a weight that is not fp8
    fp8: bool = False
    swapped_rows: bool = False  # the output layer has its own rows and is not tied to the embedding
    offloaded: bool = False  # weights are in host memory unless it scores
    layout: PlannedLayout = field(default_factory=PlannedLayout)
    replicas: int = 1
    mem_fraction_static: float = 1.0

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> tuple[PlannedTeacher, ...]:
        """Return the recipe's teachers. Raises UserError for a model that is unknown or not supported."""
        found = []
        for name, options in recipe.named_teachers().items():
            key = teacher_key(name)
            model = find_model(options.model, f"{key}.model", served=options.placement == "served")
            layout = separate_layout(options.parallel_layout, has_experts=bool(model.shape.experts))
            teacher = cls(
                model=model,
                key=key,
                placement=options.placement,
                signal=recipe.resolve_signal(options),
                top_k=recipe.objective.build_objective().top_k,
                element=BYTES_PER_NUMBER[options.precision],
                fp8=options.precision == "fp8",
                swapped_rows=options.terminal_map == "swap",  # at most: if the EOS ids differ
                offloaded=options.offload == "weights",
                layout=PlannedLayout(**asdict(layout), data_parallel=layout.min_data_parallel_size),
                replicas=options.replicas,
                mem_fraction_static=options.mem_fraction_static,
            )
            found.append(teacher)
        return tuple(found)

    def on_own_gpus(self) -> PlannedTeacher:
        """Return the same teacher on GPUs of its own."""
        return replace(self, placement="separate", signal="hidden", offloaded=False) if self.colocated else self

    @property
    def role(self) -> str:
        """teacher, or teacher NAME."""
        return self.key.replace("teachers.", "teacher ")

    @property
    def label(self) -> str:
        """How errors about the model start."""
        return f"{self.key}.model: {self.model.name}"

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    @property
    def colocated(self) -> bool:
        return self.placement == "colocated"

    @property
    def bytes_per_token(self) -> int:
        """Bytes of teacher output per response token."""
        if self.signal == "topk":
            return top_k_bytes(self.top_k, entropy=self.placement != "served")
        return hidden_state_bytes(self.shape.hidden, self.element)

    def weights(self, layout: PlannedLayout, stage: int, output_vocab: int | None = None) -> float:
        """Return the bytes of its weights on a rank. output_vocab: as in `ModelShape.rank_parameters`."""
        shape = replace(self.shape, tied=False) if self.swapped_rows else self.shape
        held = shape.rank_parameters(layout, stage, output_vocab).total
        if not self.fp8:
            return held * self.element
        layers = (shape.layer_parameters(layout) * len(layout.layers_of(stage, shape.layers))).total
        return layers * FP8_BYTES + (held - layers) * self.element


@dataclass(frozen=True)
class PlannedServers:
    """The SGLang servers of rollout.engine=sglang; the trainer's layout does not apply to them."""

    count: int = 1
    tensor_parallel: int = 1
    placement: Literal["separate", "colocated"] = "separate"
    mem_fraction_static: float = 0.8
    max_concurrent_requests: int = 64  # concurrent requests
    ahead: bool = False  # the next iteration's responses are generated while this one trains

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PlannedServers | None:
        """Return the recipe's servers; None if the trainer generates."""
        if recipe.rollout.engine == "local":
            return None
        options = recipe.servers
        return cls(
            count=len(options.urls) or options.count,
            tensor_parallel=options.tensor_parallel,
            placement=options.placement,
            mem_fraction_static=options.mem_fraction_static,
            max_concurrent_requests=options.max_concurrent_requests,
            ahead=recipe.rollout.max_staleness > 0,
        )

    @property
    def colocated(self) -> bool:
        return self.placement == "colocated"

    @property
    def layout(self) -> PlannedLayout:
        """The layout of one server."""
        return PlannedLayout(self.tensor_parallel)

    @property
    def gpus(self) -> int:
        """GPUs of all servers."""
        return self.count * self.tensor_parallel

    def weights(self, student: ModelShape, element: int) -> float:
        """Return the bytes of the weights on a GPU."""
        return student.rank_parameters(self.layout, 0).total * element

    def cached_tokens(self, student: ModelShape, element: int, limit: float) -> float:
        """Return the tokens that fit in a server's KV cache for GPUs of `limit` bytes; negative if weights do not."""
        free = self.mem_fraction_static * limit - self.weights(student, element)
        return free / kv_cache_bytes(student, student.layers, self.layout, element)


def kv_cache_bytes(shape: ModelShape, layers: int, layout: PlannedLayout, element: int) -> float:
    """Return the bytes of one token's keys and values in `layers` layers on a rank."""
    return layers * 2 * shape.kv_width / layout.tensor_parallel * element
