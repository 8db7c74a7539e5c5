"""Every key of a recipe, its type, its default and the values that it takes.

The models are strict (no silent conversion of "8" or true into a number), frozen, and refuse unknown keys. What
depends on one key stands at that key; what depends on several stands in the section's, or the recipe's, own check.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from eaopd_megatron.config.parallel import ParallelLayout, Recompute
from eaopd_megatron.errors import RecipeError

if TYPE_CHECKING:
    from eaopd_megatron.objective import Objective

PositiveInt = Annotated[int, Field(ge=1)]
"""A whole number from 1."""
NonNegativeInt = Annotated[int, Field(ge=0)]
"""A whole number from 0."""
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
FloatOrInfinity = Annotated[float, Field(allow_inf_nan=True)]
UnitFraction = Annotated[float, Field(gt=0, le=1)]
"""A share in (0, 1]."""
DecayRate = Annotated[float, Field(ge=0, lt=1)]
"""A share in [0, 1)."""
NonEmptyStr = Annotated[str, Field(min_length=1)]
Precision = Literal["fp32", "bf16"]


class Section(BaseModel):
    """What all sections share: strict types, no unknown keys, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunConfig(Section):
    """The folder of a run and what is kept in it."""

    folder: NonEmptyStr
    save_interval: NonNegativeInt = 50  # iterations between checkpoints; 0: only at the end
    keep_checkpoints: PositiveInt = 2  # the newest ones that stay on the disk
    async_save: bool = True  # checkpoints are written while training goes on, from a copy in host memory
    on_corrupt_checkpoint: Literal["refuse", "fall_back"] = (
        "refuse"  # fall_back: continue from the newest checkpoint that is whole
    )
    log_rollouts: NonNegativeInt = 4  # samples recorded an iteration


class StudentConfig(Section):
    """The model that is trained, and how it is laid out over the ranks."""

    model: NonEmptyStr  # a Hugging Face folder, or a hub id
    tensor_parallel: PositiveInt = 1
    pipeline_parallel: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1  # model chunks a rank holds; more than 1: the interleaved schedule
    context_parallel: PositiveInt = 1
    expert_parallel: PositiveInt = 1
    expert_tensor_parallel: PositiveInt = 1  # ranks that share one expert's matrices
    data_parallel: PositiveInt | None = None  # none: what the ranks, or the devices of this host, allow
    sequence_parallel: bool = False
    precision: Precision = "bf16"
    recompute: Recompute = "none"  # activations made again in backward; selective: attention

    @model_validator(mode="after")
    def _sequence_parallel_needs_tensor_parallel(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("student.sequence_parallel is true, which needs student.tensor_parallel of 2 or more")
        return self

    @model_validator(mode="after")
    def _virtual_stages_need_a_pipeline(self) -> Self:
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            chunks = self.virtual_pipeline
            raise ValueError(
                f"student.virtual_pipeline is {chunks}, which needs student.pipeline_parallel of 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _experts_divide_the_ranks(self) -> Self:
        layout = self.parallel_layout
        ranks = layout.model_parallel_size * (self.data_parallel or 0)
        if ranks % layout.expert_model_parallel_size:
            raise ValueError(
                "student.expert_parallel x expert_tensor_parallel x pipeline_parallel is "
                f"{layout.expert_model_parallel_size}, which does not divide the {ranks} ranks that "
                f"student.data_parallel={self.data_parallel} makes"
            )
        return self

    @property
    def parallel_layout(self) -> ParallelLayout:
        """How one copy is cut over ranks."""
        return ParallelLayout(**{field.name: getattr(self, field.name) for field in fields(ParallelLayout)})


class TeacherConfig(Section):
    """The model whose distribution the student learns, and what is handed over of it."""

    model: NonEmptyStr  # a Hugging Face folder, or a hub id
    placement: Literal["colocated", "separate", "served"] = (
        "colocated"  # on the student's ranks; separate: on ranks of its own (eaopd teach); served: by SGLang
    )
    signal: Literal["auto", "topk", "hidden", "logits"] = "auto"  # what is kept of a token: topk where it serves
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"  # fp8: weights, on GPUs with Transformer Engine
    terminal_map: Literal["swap", "label", "none"] = "swap"  # how the teacher's and the student's end tokens meet
    offload: Literal["none", "weights"] = "none"  # colocated: weights are in host memory while it does not score
    tensor_parallel: PositiveInt | None = None  # none: colocated, the student's; elsewhere 1
    pipeline_parallel: PositiveInt | None = None  # none: colocated, the student's; elsewhere 1
    expert_parallel: PositiveInt | None = None  # none: colocated, the student's; elsewhere 1
    replicas: PositiveInt = 1  # separate, served: that the trainer starts on its own host
    urls: list[NonEmptyStr] = []  # of replicas that run already; none are started then
    listen: NonEmptyStr = "127.0.0.1:0"  # HOST:PORT of eaopd teach; port 0: a free one
    api_key_file: NonEmptyStr | None = None  # the replicas' key, mode 0600; none: those started here get one
    max_concurrent_requests: PositiveInt = 8  # requests that a replica has at the same time
    mem_fraction_static: UnitFraction = 0.8  # served: of a GPU's memory, for weights and cache
    startup_timeout_minutes: PositiveFloat = 30.0  # for the replicas to be there
    unavailable_timeout_minutes: PositiveFloat = 10.0  # without any replica before the run saves its state and stops

    @property
    def launched_by_trainer(self) -> bool:
        """Whether the trainer starts and ends the replicas."""
        return self.placement != "colocated" and not self.urls

    @property
    def parallel_layout(self) -> ParallelLayout:
        """Of a separate teacher's ranks, or of a served one's GPUs."""
        tp, pp, ep = self.tensor_parallel or 1, self.pipeline_parallel or 1, self.expert_parallel or 1
        return ParallelLayout(
            tensor_parallel=tp, pipeline_parallel=pp, expert_parallel=ep, sequence_parallel=tp > 1 < ep
        )

    @model_validator(mode="after")
    def _placement_has_its_own_keys(self) -> Self:
        colocated = self.placement == "colocated"
        layout = (self.tensor_parallel, self.pipeline_parallel, self.expert_parallel)
        for wrong, why in (
            (colocated and any(layout), "has the student's layout: no teacher.tensor_parallel, pipeline_, expert_"),
            (colocated and (self.urls or self.replicas > 1), "is on the student's ranks: no teacher.urls, replicas"),
            (not colocated and self.offload != "none", "is not on the student's GPUs: no teacher.offload"),
            (not colocated and self.signal == "logits", "hands over topk or hidden: no teacher.signal=logits"),
            (self.placement == "served" and self.signal == "hidden", "hands over topk: no teacher.signal=hidden"),
            (self.placement == "served" and any(layout[1:]), "has tensor_parallel alone: no pipeline_, expert_"),
            (self.placement == "served" and self.precision == "fp8", "is started in bf16 or fp32: no precision=fp8"),
        ):
            if wrong:
                raise ValueError(f"a teacher with teacher.placement={self.placement} {why}")
        return self

    @model_validator(mode="after")
    def _weights_in_fp8_stay(self) -> Self:
        if self.precision == "fp8" and self.offload == "weights":
            raise ValueError(
                "teacher.offload=weights moves weights in fp32 or bf16, not those of teacher.precision=fp8"
            )
        return self


class ObjectiveConfig(Section):
    """A preset of the objective and what differs from it (none: as the preset says)."""

    preset: NonEmptyStr = "eopd"
    reverse_kl: str | None = None
    forward_kl: str | None = None
    gate: str | None = None
    threshold: FloatOrInfinity | None = None  # nats
    gate_width: float | None = None  # nats
    forward_weight: float | None = None
    reverse_weight: float | None = None
    top_k: int | None = None
    clip: FloatOrInfinity | None = None
    threshold_end: float | None = None  # nats; threshold moves there over ramp_updates
    forward_weight_end: NonNegativeFloat | None = None  # forward_weight moves there over ramp_updates
    ramp: Literal["linear", "cosine"] = "linear"
    ramp_updates: PositiveInt | None = None  # completed updates; none: all of the run's

    def build_objective(self) -> Objective:
        """The objective itself. Raises ValueError, naming the field, for a value that it does not take."""
        from eaopd_megatron.objective import Objective

        names = {field.name for field in fields(Objective)}
        changes = {name: value for name, value in self if name in names and value is not None}
        objective = replace(Objective.preset(self.preset), **changes)
        if self.threshold_end is not None and math.isinf(objective.threshold):
            raise ValueError("threshold_end needs a finite threshold to start from")
        return objective


class DataConfig(Section):
    """The prompts."""

    source: NonEmptyStr = "countdown"  # or a .jsonl or .parquet file, or hub:owner/name[:config][@revision]
    split: NonEmptyStr = "train"
    prompt_field: NonEmptyStr = "problem"
    teacher_field: NonEmptyStr = "teacher"  # of a problem: which of several teachers it is for
    decontaminate: list[NonEmptyStr] = []  # benchmarks whose problems are left out
    decontaminate_ngram: PositiveInt = 13  # so are problems that share as many words in a row with one
    template: Literal["chat", "base", "raw"] = "chat"  # chat: thinking off; base: question and answer as plain text
    suffix: str = ""  # appended to each problem
    max_prompt_tokens: PositiveInt = 1024
    shuffle: bool = True
    last_batch: Literal["drop", "keep"] = "drop"  # a batch smaller than the others


class ServersConfig(Section):
    """The SGLang servers of rollout.engine=sglang: started and ended by the trainer, or named by their URLs."""

    count: PositiveInt = 1  # that the trainer starts on its own host
    urls: list[NonEmptyStr] = []  # of servers that run already; none are started then
    router: NonEmptyStr | None = None  # the URL of an sglang-router whose servers run already; none are started then
    tensor_parallel: PositiveInt = 1  # GPUs a server
    placement: Literal["separate", "colocated"] = "separate"  # colocated: on the trainer's own GPUs, taking turns
    mem_fraction_static: UnitFraction = 0.8  # of a GPU's memory, for weights and cache
    max_concurrent_requests: PositiveInt = 64  # responses that a server writes at the same time
    api_key_file: NonEmptyStr | None = None  # of servers that run already, mode 0600; those started here get one
    startup_timeout_minutes: PositiveFloat = 15.0  # for the servers to be there
    unavailable_timeout_minutes: PositiveFloat = 10.0  # without any server before the run saves its state and stops

    @property
    def launched_by_trainer(self) -> bool:
        """Whether the trainer starts and ends them."""
        return not self.urls and self.router is None

    @model_validator(mode="after")
    def _servers_are_found_in_one_way(self) -> Self:
        if self.urls and self.router is not None:
            raise ValueError("servers.urls and servers.router are both given; a router knows its servers")
        if not self.launched_by_trainer and self.placement == "colocated":
            raise ValueError("servers.placement=colocated is for servers that the trainer starts: no URLs")
        if self.launched_by_trainer and self.api_key_file is not None:
            raise ValueError("servers.api_key_file is for servers that run already; those started here get a key")
        return self


class WeightSyncConfig(Section):
    """How the servers get the student's weights."""

    transport: Literal["distributed", "disk", "tensor"] = "distributed"  # tensor: same host; disk: a shared folder
    bucket_mib: PositiveInt = 512  # MiB that are sent at once; two such buckets are held
    timeout_seconds: PositiveFloat = 300.0  # for one bucket to arrive; a server that takes longer is lost
    address: NonEmptyStr | None = None  # of this trainer, as the servers reach it; none: found out
    verify: Literal["version", "probe", "checksum"] = "version"  # what is compared on every server afterwards


class RolloutConfig(Section):
    """How the student writes the responses that it is trained on."""

    engine: Literal["local", "sglang"] = "local"  # local: on the student's own ranks
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0  # 1: write the next responses while this iteration trains
    importance_clip: PositiveFloat = 2.0  # largest weight π_old/π_rollout of a token that older weights wrote
    warn_logprob_gap: PositiveFloat | None = 0.1  # nats between rollout and trainer, mean over tokens; none: no warning
    warn_truncated: Annotated[float, Field(gt=0, lt=1)] | None = 0.5  # share of responses; none: no warning
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: PositiveInt = 4096
    batch_size: PositiveInt = 128  # sequences generated together on a rank
    stop_token_ids: list[NonNegativeInt] = []  # beside the model's own end ids

    @field_validator("temperature", "top_p")
    @classmethod
    def _sample_from_the_student_itself(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError(
                "it must be 1.0: the objective is an expectation over the student's own distribution, and with "
                "anything else it would be another objective (evaluation.temperature and evaluation.top_p are free)"
            )
        return value


class TrainConfig(Section):
    """Algorithm 1's sizes."""

    iterations: PositiveInt
    prompts_per_iteration: PositiveInt = 128
    mini_batch: PositiveInt = 32  # samples an update, over all data-parallel ranks
    micro_batch_tokens: PositiveInt = 16384  # packed tokens of a micro-batch, which context-parallel ranks share

    @property
    def updates_per_iteration(self) -> int:
        """Updates of a whole iteration."""
        return -(-self.prompts_per_iteration // self.mini_batch)


class OptimizerConfig(Section):
    """AdamW and its schedule, whose steps are completed updates."""

    lr: PositiveFloat = 3.0e-6
    weight_decay: NonNegativeFloat = 0.01
    beta1: DecayRate = 0.9
    beta2: DecayRate = 0.999
    eps: PositiveFloat = 1.0e-8
    clip_grad: NonNegativeFloat = 1.0  # largest gradient norm; 0: not clipped
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_updates: NonNegativeInt = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0  # the floor, as a share of lr
    distributed: bool = False  # each data-parallel rank holds and updates its part of the states
    overlap: bool = False  # gradients are reduced during backward, weights gathered during forward
    offload: Literal["none", "moments"] = "none"  # moments: Adam's, in host memory between updates

    @model_validator(mode="after")
    def _overlap_needs_distributed(self) -> Self:
        if self.overlap and not self.distributed:
            raise ValueError("optimizer.overlap is true, which needs optimizer.distributed to be true")
        return self


class EvaluationConfig(Section):
    """Benchmarks before, during and after training."""

    interval: NonNegativeInt = 0  # iterations; 0: before and after training only
    benchmarks: list[NonEmptyStr] = []  # names, .jsonl or .parquet files
    samples: PositiveInt = 8  # responses a problem
    problems: PositiveInt | None = None  # the first so many; none: all
    temperature: NonNegativeFloat = 1.0  # 0: the most probable token
    top_p: UnitFraction = 0.8
    max_response_tokens: PositiveInt = 8192
    suffix: str = ""
    seed: NonNegativeInt = 1234


class ReportingConfig(Section):
    """Where metrics go beside the run's own folder."""

    tensorboard: bool = True
    wandb: bool = False
    wandb_project: NonEmptyStr = "eaopd"
    wandb_name: str | None = None
    profile_from: PositiveInt | None = None  # first iteration under torch's profiler; none: off
    profile_iterations: PositiveInt = 1


class DistributedConfig(Section):
    """Limits on waiting for other ranks."""

    timeout_minutes: PositiveFloat = 10.0
    flight_recorder: NonNegativeInt = 2000  # collectives a rank remembers, written to failures/ when the run fails


class Recipe(Section):
    """A whole recipe. Made by `load_recipe`; the docstrings and comments of the sections say what each key means."""

    seed: NonNegativeInt = 0
    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig
    teachers: dict[NonEmptyStr, TeacherConfig] = {}  # several, each with the keys of `teacher` as defaults
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    servers: ServersConfig = ServersConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    reporting: ReportingConfig = ReportingConfig()
    distributed: DistributedConfig = DistributedConfig()

    def named_teachers(self) -> dict[str, TeacherConfig]:
        """Every teacher under the name by which prompts ask for it (`data.teacher_field`); a lone one is ''."""
        return self.teachers or {"": self.teacher}

    def resolve_signal(self, teacher: TeacherConfig) -> Literal["topk", "hidden", "logits"]:
        """teacher.signal, with auto resolved: top-k where it serves the objective, else hidden states."""
        if teacher.signal != "auto":
            return teacher.signal
        served = teacher.placement == "served"  # which can give nothing else
        return "topk" if served or self.objective.build_objective().refusal("topk") is None else "hidden"

    @model_validator(mode="after")
    def _an_update_fits_into_an_iteration(self) -> Self:
        if self.train.mini_batch > self.train.prompts_per_iteration:
            raise ValueError(
                f"train.mini_batch is {self.train.mini_batch}, more than train.prompts_per_iteration "
                f"({self.train.prompts_per_iteration}): no update would ever be full"
            )
        return self

    @model_validator(mode="after")
    def _servers_fit_the_engine(self) -> Self:
        if self.rollout.engine == "local":
            for name, given in (
                ("servers", self.servers != ServersConfig()),
                ("weight_sync", self.weight_sync != WeightSyncConfig()),
                ("rollout.max_staleness", self.rollout.max_staleness > 0),
            ):
                if given:
                    raise ValueError(f"{name} differs from its default, which needs rollout.engine=sglang")
        if self.servers.placement == "colocated":
            if self.rollout.max_staleness:
                raise ValueError(
                    "rollout.max_staleness is 1: servers.placement=colocated writes while the trainer waits"
                )
            if self.weight_sync.transport != "tensor":
                raise ValueError("servers.placement=colocated needs weight_sync.transport=tensor")
        return self


def teacher_key(name: str) -> str:
    """Return the recipe's section of a teacher, `teachers.NAME`, or `teacher` for the only one, whose name is ''."""
    return f"teachers.{name}" if name else "teacher"


def select_separate_teacher(recipe: Recipe, name: str) -> TeacherConfig:
    """Return the teacher of this name ('': the only one), which `eaopd teach` is to serve.

    Raises RecipeError if there is none of this name, or its placement is not separate.
    """
    teachers = recipe.named_teachers()
    known = ", ".join(teachers)
    if name not in teachers:
        if not name:
            raise RecipeError(f"the recipe has teachers {known}: name one with --teacher")
        remedy = f"it has {known}" if known else "leave --teacher out"
        raise RecipeError(f"the recipe has no teacher {name}; {remedy}")
    if (placement := teachers[name].placement) != "separate":
        key = teacher_key(name)
        raise RecipeError(f"{key}.placement is {placement}: eaopd teach serves a teacher with {key}.placement=separate")
    return teachers[name]
