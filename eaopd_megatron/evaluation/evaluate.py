"""`eaopd evaluate`: a model's responses to benchmarks, kept in a folder, and what they come to."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.data.prompts import PromptBuilder
from eaopd_megatron.data.sources import FieldNames
from eaopd_megatron.data.types import SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation import generate as local_generation
from eaopd_megatron.evaluation import tables
from eaopd_megatron.evaluation.benchmarks import check_golds, load_benchmark
from eaopd_megatron.evaluation.folder import (
    EvaluationFolder,
    SampleIndex,
    prompts_digest,
    read_prompts,
    weights_fingerprint,
    write_prompts,
)
from eaopd_megatron.evaluation.generate import ServerChoice, generate_on_servers
from eaopd_megatron.evaluation.grading import sources_by_name
from eaopd_megatron.evaluation.results import EvaluationResult
from eaopd_megatron.utils.log import log_rank0

SUFFIX = "Please reason step by step, and put your final answer within \\boxed{}."
"""Of mathematical benchmarks, whose answers are looked for in a box."""
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")
"""What a chat template ends a turn with, which is not always among a base model's own end tokens."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What is evaluated, and by what."""

    model: str  # a Hugging Face folder, a hub id, a run's folder or one of its checkpoints
    benchmarks: Sequence[str]
    samples: int = 8
    problems: int | None = None  # the first so many; None: all
    temperature: float = 1.0
    top_p: float = 0.8
    max_response_tokens: int = 8192
    seed: int = 1234
    template: Literal["chat", "base", "raw"] | None = None  # None: chat where the tokenizer has a chat template
    suffix: str | None = None  # None: `SUFFIX`, and nothing for Countdown
    fields: FieldNames | None = None  # of files that are no named benchmarks
    engine: Literal["local", "sglang"] = "local"
    tensor_parallel: int = 1  # ranks of the local engine
    batch_size: int = 256  # sequences that it generates together
    servers: ServerChoice = field(default_factory=ServerChoice)
    out: Path | None = None  # None: evaluations/ and the model's name


def run_evaluation(request: EvaluationRequest, *, regrade: bool = False, compare: Path | None = None) -> int:
    """Generates what is not there yet, grades, writes and prints the table. The exit code.

    regrade: nothing is generated. compare: another evaluation's folder, from which the change is printed, too.
    """
    folder = EvaluationFolder(request.out or _default_folder(request.model))
    before = None if compare is None else EvaluationResult.read(EvaluationFolder(compare).results_file)
    if not regrade:
        if not request.benchmarks:
            raise UserError("no benchmark is named; say which with --benchmarks, for example --benchmarks countdown")
        if code := _generate(request, folder):
            return code
    result = folder.grade()
    folder.write(result)
    print(tables.results_markdown(result))
    if before is not None:
        print(tables.changes_markdown(tables.paired_changes(before, result)))
    print(f"written: {folder.path}")
    return 0


def _generate(request: EvaluationRequest, folder: EvaluationFolder) -> int:
    """Everything up to the last response. The exit code."""
    path, exported = _weights(request.model, folder)
    model = HfFolder.open(str(path), "MODEL")
    names = sources_by_name(request.benchmarks)
    _begin(request, folder, model, names)
    missing: dict[str, list[SampleIndex]] = {}
    for name in names:
        count = len(read_prompts(folder.prompts(name)))
        store = folder.response_file(name)
        store.mend()
        if places := store.missing(count, request.samples):
            missing[name] = places
            log_rank0(f"{name}: {len(places)} of {count * request.samples} responses are to be generated")
    code = 0
    if missing and request.engine == "local":
        code = local_generation.generate_on_ranks(
            folder, model.path, missing, request.tensor_parallel, request.batch_size
        )
    elif missing:
        generate_on_servers(folder, model, missing, request.servers, log_rank0)
    if exported and not code:
        shutil.rmtree(path)
    return code


def _begin(request: EvaluationRequest, folder: EvaluationFolder, model: HfFolder, names: dict[str, str]) -> None:
    """Loads and checks the benchmarks, and writes what the responses depend on."""
    tokenizer = model.tokenizer()
    template = request.template or ("chat" if tokenizer.chat_template else "raw")
    longest = local_generation.check_length(model.config.max_position_embeddings, request.max_response_tokens)
    stops = {*model.eos_ids, *(tokenizer.get_vocab()[token] for token in END_OF_TURN if token in tokenizer.get_vocab())}
    sampling = SamplingParams(request.temperature, request.top_p, request.max_response_tokens, tuple(sorted(stops)))
    suffixes = {}
    prompts = {}
    for name, source in names.items():
        problems = load_benchmark(source, request.fields)[: request.problems]
        check_golds(source, problems, log_rank0)
        suffixes[name] = ("" if name == "countdown" else SUFFIX) if request.suffix is None else request.suffix
        builder = PromptBuilder(
            tokenizer,
            template=template,
            suffix=suffixes[name],
            field="problem",
            max_tokens=longest,
            limit="the model's positions less --max-response-tokens",
        )
        prompts[name], dropped = builder.build(problems, source)
        if dropped:
            log_rank0(f"{name}: {dropped} problems are longer than {longest} tokens and left out")
    folder.begin(
        {
            "model": weights_fingerprint(model.path),
            "benchmarks": names,
            "problems": {name: len(some) for name, some in prompts.items()},
            "samples": request.samples,
            "sampling": sampling.to_json(),
            "seed": request.seed,
            "template": template,
            "suffixes": suffixes,
            "engine": request.engine,
            "prompts": {name: prompts_digest(some) for name, some in prompts.items()},
        }
    )
    for name, some in prompts.items():
        write_prompts(folder.prompts(name), some)


def _weights(model: str, folder: EvaluationFolder) -> tuple[Path, bool]:
    """The Hugging Face folder to evaluate, and whether it was made for this evaluation from a checkpoint."""
    path = Path(model).expanduser()
    if (path / "student" / "config.json").is_file():
        return path / "student", False
    if (path / "checkpoints").is_dir():
        from eaopd_megatron.checkpoint.store import CheckpointStore

        latest = CheckpointStore(path / "checkpoints", keep=1).latest()
        if latest is None:
            raise UserError(f"MODEL: {model} is a run without a checkpoint yet")
        path = latest
    if not (path / "sharded").is_dir():
        return HfFolder.open(model, "MODEL").path, False
    made = folder.path / "model"
    if not made.exists():
        from eaopd_megatron.checkpoint.convert import export_checkpoint

        folder.path.mkdir(parents=True, exist_ok=True)
        export_checkpoint(path, made, verify=False, say=log_rank0)
    return made, True


def _default_folder(model: str) -> Path:
    path = Path(model)
    parts = [part for part in path.parts if part not in ("checkpoints", "/", "..", ".")]
    return Path("evaluations") / "-".join(parts[-2:])
