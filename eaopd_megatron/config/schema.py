"""The recipe: every section but those of the models, and the rules that hold between sections."""

# ruff: noqa: RUF012  (pydantic copies mutable defaults)

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from eaopd_megatron.config.model_schema import (
    AtResume,
    FilePath,
    Free,
    Logged,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    ObjectiveConfig,
    PositiveFloat,
    PositiveInt,
    Section,
    StudentConfig,
    TeacherConfig,
    UnitFraction,
)
from eaopd_megatron.errors import RecipeError

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class RunConfig(Section):
    """The run's folder and its checkpoints."""

    at_resume = AtResume.FREE

    folder: FilePath
    """Folder of the run; an unfinished run in it is resumed."""
    continue_from: Annotated[FilePath | None, AtResume.NEVER] = None
    """Run, or checkpoint in it, whose student is trained on in place of `student.model`, in a run of its own."""
    save_interval: NonNegativeInt = 50
    """Iterations between checkpoints. 0: only at the end. [iterations]"""
    keep_checkpoints: PositiveInt = 2
    """Number of latest checkpoints that are kept."""
    async_save: bool = True
    """Write checkpoints in the background from a copy in host memory, while training goes on."""
    on_corrupt_checkpoint: Literal["refuse", "fall_back"] = "refuse"
    """What to do if the latest checkpoint is corrupt. fall_back: resume from the latest valid one."""
    log_rollouts: NonNegativeInt = 4
    """Responses recorded per iteration."""


class DataConfig(Section):
    """The prompts."""

    source: NonEmptyStr = "countdown"
    """`countdown`, a .jsonl or .parquet file, or `hub:owner/name[:config][@revision]`."""
    split: NonEmptyStr = "train"
    """Split of a hub data set."""
    prompt_field: NonEmptyStr = "problem"
    """Field that holds the prompt."""
    teacher_field: NonEmptyStr = "teacher"
    """Field that names the prompt's teacher, if there are several."""
    decontaminate: list[NonEmptyStr] = []
    """Benchmarks whose problems are removed from the training data."""
    decontaminate_ngram: PositiveInt = 13
    """Problems that share this many consecutive words with a benchmark's problem are removed too. [words]"""
    template: Literal["chat", "base", "raw"] = "chat"
    """chat: the tokenizer's chat template, thinking off; base: question and answer as plain text; raw: the prompt."""
    suffix: str = ""
    """Line appended to each problem."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt; longer ones are left out. [tokens]"""
    shuffle: bool = True
    """Shuffle the prompts in every epoch."""
    last_batch: Literal["drop", "keep"] = "drop"
    """What to do with the incomplete last batch of an epoch."""


class ServersConfig(Section):
    """The SGLang servers of `rollout.engine=sglang`: started and stopped by the trainer, or given by their URLs."""

    at_resume = AtResume.FREE

    count: PositiveInt = 1
    """Servers that the trainer starts on its own host."""
    urls: list[NonEmptyStr] = []
    """URLs of servers that run already; none are started then."""
    router: NonEmptyStr | None = None
    """URL of an sglang-router whose servers run already; none are started then."""
    tensor_parallel: PositiveInt = 1
    """Tensor-parallel size of a server. [GPUs]"""
    placement: Literal["separate", "colocated"] = "separate"
    """colocated: on the trainer's own GPUs, taking turns with it."""
    mem_fraction_static: UnitFraction = 0.8
    """Share of a GPU's memory for weights and KV cache (SGLang's option of the same name)."""
    max_concurrent_requests: PositiveInt = 64
    """Responses that a server generates at the same time."""
    api_key_file: FilePath | None = None
    """File with the API key of servers that run already (mode 0600); servers started here get a generated one."""
    startup_timeout_minutes: PositiveFloat = 15.0
    """Longest wait until the servers are ready. [minutes]"""
    unavailable_timeout_minutes: PositiveFloat = 10.0
    """Time without any server after which the run saves its state and stops. [minutes]"""

    @property
    def launched_by_trainer(self) -> bool:
        """Whether the trainer starts and stops the servers."""
        return not self.urls and self.router is None

    @model_validator(mode="after")
    def _check_one_way_to_find_servers(self) -> Self:
        if self.urls and self.router is not None:
            raise ValueError("servers.urls and servers.router are both given; a router knows its servers")
        if not self.launched_by_trainer and self.placement == "colocated":
            raise ValueError("servers.placement=colocated is for servers that the trainer starts: no URLs")
        if self.launched_by_trainer and self.api_key_file is not None:
            raise ValueError("servers.api_key_file is for servers that run already; those started here get a key")
        return self


class WeightSyncConfig(Section):
    """How the servers get the student's weights."""

    at_resume = AtResume.FREE

    transport: Literal["distributed", "disk", "tensor"] = "distributed"
    """distributed: broadcast; tensor: in requests, on the same host; disk: through a shared folder."""
    bucket_mib: PositiveInt = 512
    """Bytes sent at once; two such buckets are allocated. [MiB]"""
    timeout_seconds: PositiveFloat = 300.0
    """Longest transfer of one bucket; a server that takes longer counts as lost. [seconds]"""
    address: NonEmptyStr | None = None
    """The trainer's address as the servers reach it. null: detected."""
    verify: Literal["version", "probe", "checksum"] = "version"
    """What is compared on every server after an update. probe: log-probs of a prompt; checksum: of every tensor."""


class RolloutConfig(Section):
    """How the student generates the responses it is trained on."""

    engine: Literal["local", "sglang"] = "local"
    """local: on the student's own ranks; sglang: by the servers of `servers`."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: generate the next iteration's responses while this one trains, with weights one iteration old. [iterations]"""
    importance_clip: Logged[PositiveFloat] = 2.0
    """Largest importance weight π_old/π_rollout of a token that older weights generated."""
    warn_logprob_gap: Free[PositiveFloat | None] = 0.1
    """Mean difference of the rollout's and the trainer's log-probs that raises a warning. null: no warning. [nats]"""
    warn_truncated: Free[Annotated[float, Field(gt=0, lt=1)] | None] = 0.5
    """Share of truncated responses that raises a warning. null: no warning."""
    temperature: float = 1.0
    """Sampling temperature. It must be 1: the objective is an expectation over the student's own distribution."""
    top_p: float = 1.0
    """Nucleus sampling. It must be 1, for the same reason."""
    max_response_tokens: Logged[PositiveInt] = 4096
    """Longest response; longer ones are truncated. [tokens]"""
    batch_size: Free[PositiveInt] = 128
    """Sequences that a rank generates together (local engine)."""
    stop_token_ids: Logged[list[NonNegativeInt]] = []
    """End tokens beside the model's own."""

    @field_validator("temperature", "top_p")
    @classmethod
    def _check_unmodified_sampling(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError(
                "it must be 1.0: the objective is an expectation over the student's own distribution, and with "
                "anything else it would be another objective (evaluation.temperature and evaluation.top_p are free)"
            )
        return value


class TrainConfig(Section):
    """Batch sizes and number of iterations (Algorithm 1). Each prompt gets one response."""

    iterations: Logged[PositiveInt]
    """Length of the run. It may be raised after the end, too. [iterations]"""
    prompts_per_iteration: PositiveInt = 128
    """Prompts, and so responses, per iteration. [responses]"""
    mini_batch: PositiveInt = 32
    """Responses per update, over all data-parallel ranks. [responses]"""
    micro_batch_tokens: Free[PositiveInt] = 16384
    """Size of a packed micro-batch, which context-parallel ranks share. [tokens]"""

    @property
    def updates_per_iteration(self) -> int:
        """Updates of a full iteration."""
        return -(-self.prompts_per_iteration // self.mini_batch)


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule, whose steps are completed updates."""

    at_resume = AtResume.LOGGED

    lr: PositiveFloat = 3.0e-6
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    beta1: DecayRate = 0.9
    """Decay rate of the first moment."""
    beta2: DecayRate = 0.999
    """Decay rate of the second moment."""
    eps: PositiveFloat = 1.0e-8
    """Adam's epsilon."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest gradient norm. 0: not clipped."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warmup."""
    warmup_updates: NonNegativeInt = 0
    """Length of the linear warmup. [updates]"""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final learning rate as a share of `lr`."""
    distributed: Free[bool] = False
    """Megatron's distributed optimizer: each data-parallel rank stores and updates its shard of the states."""
    overlap: Free[bool] = False
    """Reduce gradients during backward and gather weights during forward; needs `distributed`."""
    offload: Free[Literal["none", "moments"]] = "none"
    """moments: Adam's moments are in host memory between updates."""

    @model_validator(mode="after")
    def _check_overlap(self) -> Self:
        if self.overlap and not self.distributed:
            raise ValueError("optimizer.overlap is true, which needs optimizer.distributed to be true")
        return self


class EvaluationConfig(Section):
    """Benchmarks before, during and after training."""

    at_resume = AtResume.FREE

    interval: NonNegativeInt = 0
    """Iterations between evaluations. 0: before and after training only. [iterations]"""
    benchmarks: list[NonEmptyStr] = []
    """Names of benchmarks, .jsonl or .parquet files."""
    samples: PositiveInt = 8
    """Responses per problem."""
    problems: PositiveInt | None = None
    """Only the first N problems. null: all."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature. 0: greedy."""
    top_p: UnitFraction = 0.8
    """Nucleus sampling."""
    max_response_tokens: PositiveInt = 8192
    """Longest response; longer ones are truncated. [tokens]"""
    suffix: str = ""
    """Line appended to each problem."""
    seed: NonNegativeInt = 1234
    """Seed of the sampling; the same before and after training."""


class ReportingConfig(Section):
    """Where metrics go beside the run's own folder."""

    at_resume = AtResume.FREE

    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases."""
    wandb_project: NonEmptyStr = "eaopd"
    """Project in Weights & Biases."""
    wandb_name: str | None = None
    """Name of the run in Weights & Biases. null: a generated one."""
    profile_from: PositiveInt | None = None
    """First iteration under torch's profiler, whose traces go to `profile/`. null: off. [iteration]"""
    profile_iterations: PositiveInt = 1
    """Iterations under the profiler. [iterations]"""


class DistributedConfig(Section):
    """Timeouts and diagnosis of collectives."""

    at_resume = AtResume.FREE

    timeout_minutes: PositiveFloat = 10.0
    """Longest wait of a collective for other ranks. [minutes]"""
    flight_recorder: NonNegativeInt = 2000
    """Collectives that a rank remembers and writes to `failures/` if the run fails. 0: off."""


class Recipe(Section):
    """A whole recipe. Made by `load_recipe`."""

    seed: NonNegativeInt = 0
    """Seed of the prompts' order and of the sampling."""
    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig
    teachers: dict[NonEmptyStr, TeacherConfig] = {}
    """Several teachers by name; each inherits the keys of `teacher` that it does not give."""
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
        """Return every teacher under the name in the prompts' `data.teacher_field`; a single one under ''."""
        return self.teachers or {"": self.teacher}

    def model_names(self) -> dict[str, str]:
        """Return the student's and every teacher's `model` by its key in the recipe."""
        teachers = {f"{teacher_key(name)}.model": teacher.model for name, teacher in self.named_teachers().items()}
        return {"student.model": self.student.model, **teachers}

    def resolve_signal(self, teacher: TeacherConfig) -> Literal["topk", "hidden", "logits"]:
        """Return teacher.signal with auto resolved: top-k if it serves the objective, else hidden states."""
        if teacher.signal != "auto":
            return teacher.signal
        served = teacher.placement == "served"  # SGLang returns nothing else
        return "topk" if served or self.objective.build_objective().refusal("topk") is None else "hidden"

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        if self.train.mini_batch > self.train.prompts_per_iteration:
            raise ValueError(
                f"train.mini_batch is {self.train.mini_batch}, more than train.prompts_per_iteration "
                f"({self.train.prompts_per_iteration}): no update would ever be full"
            )
        if self.rollout.engine == "local":
            for name, changed in (
                ("servers", self.servers != ServersConfig()),
                ("weight_sync", self.weight_sync != WeightSyncConfig()),
                ("rollout.max_staleness", self.rollout.max_staleness > 0),
            ):
                if changed:
                    raise ValueError(f"{name} differs from its default, which needs rollout.engine=sglang")
        if self.servers.placement == "colocated":
            if self.rollout.max_staleness:
                raise ValueError("rollout.max_staleness is 1: colocated servers generate while the trainer waits")
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
