"""`eaopd evaluate`: sample a model on benchmarks into a folder, grade the responses and write the results."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import ServersConfig
from eaopd_megatron.data.prompts import PromptBuilder
from eaopd_megatron.data.sources import FieldNames
from eaopd_megatron.data.types import Prompt, SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation import generate as local_generation
from eaopd_megatron.evaluation.benchmarks import is_countdown, load_benchmark, load_prompts, sources_by_name
from eaopd_megatron.evaluation.comparison import compare_results, numbered, require_common
from eaopd_megatron.evaluation.folder import (
    EvaluationFolder,
    SampleIndex,
    prompts_digest,
    read_prompts,
    weights_fingerprint,
    write_prompts,
)
from eaopd_megatron.evaluation.generate import generate_on_servers
from eaopd_megatron.evaluation.results import EvaluationResult, results_markdown
from eaopd_megatron.models.supported import check_local_model
from eaopd_megatron.utils.log import log_rank0

_MATH_SUFFIX = "Please reason step by step, and put your final answer within \\boxed{}."
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>")
"""Tokens that end a turn of a chat template; a base model's own end tokens may lack them."""


@dataclass(frozen=True)
class EvaluationRequest:
    """Options of `eaopd evaluate`."""

    model: str  # a Hugging Face folder, a hub id, a run's folder or one of its checkpoints
    benchmarks: Sequence[str]
    samples: int = 8  # responses per problem
    problems: int | None = None  # only the first N problems; None: all
    temperature: float = 1.0
    top_p: float = 0.8
    max_response_tokens: int = 8192
    seed: int = 1234
    template: Literal["chat", "base", "raw"] | None = None  # None: chat if the tokenizer has a chat template, else raw
    suffix: str | None = None  # None: asks for a boxed answer, except for Countdown
    fields: FieldNames | None = None  # field names of files and datasets without a name of their own
    engine: Literal["local", "sglang"] = "local"
    tensor_parallel: int = 1  # of the local engine
    batch_size: int = 256  # sequences that the local engine generates together
    servers: ServersConfig = field(default_factory=ServersConfig)
    out: Path | None = None  # None: evaluations/MODEL


def run_evaluation(request: EvaluationRequest, *, regrade: bool = False, compare: Path | None = None) -> int:
    """Generate the missing responses, grade all, write and print the table. Return the exit code.

    regrade: generate nothing. compare: folder of another evaluation; the change from it is printed, too.
    """
    folder = EvaluationFolder(request.out or _default_folder(request.model))
    other = None if compare is None else EvaluationFolder(compare)
    before = None if other is None else (other.read_result(), other.settings())
    if regrade:
        folder.settings()  # before the lock makes a folder
    elif not request.benchmarks:
        raise UserError("no benchmark is named; say which with --benchmarks, for example --benchmarks countdown")
    with folder.lock():
        if not regrade and (code := _generate(request, folder, None if before is None else before[0])):
            return code
        result = folder.grade()
        folder.write(result)
    print(results_markdown(result))
    if before is not None:
        print(compare_results(before[0], result, (before[1], folder.settings())).to_markdown())
    print(f"written: {folder.path}")
    return 0


def _generate(request: EvaluationRequest, folder: EvaluationFolder, before: EvaluationResult | None) -> int:
    """Generate the missing responses and return the exit code. before: what is compared; checked at the start."""
    path, exported = _hf_folder(request.model, folder)
    if request.engine == "local":
        check_local_model(str(path), ParallelLayout(request.tensor_parallel), "MODEL")
    model = HfFolder.open(str(path), "MODEL")
    sources = sources_by_name(request.benchmarks)
    _begin(request, folder, model, sources)
    if before is not None:
        require_common(before, {name: numbered(folder.digests(name)) for name in sources})
    missing: dict[str, list[SampleIndex]] = {}
    for name in sources:
        count = len(read_prompts(folder.prompts(name)))
        file = folder.response_file(name)
        file.remove_incomplete_line()
        if indices := file.missing(count, request.samples):
            missing[name] = indices
            log_rank0(f"{name}: {len(indices)} of {count * request.samples} responses are to be generated")
    code = 0
    if missing and request.engine == "local":
        ranks, batch_size = request.tensor_parallel, request.batch_size
        code = local_generation.generate_on_ranks(folder, model.path, missing, ranks, batch_size)
    elif missing:
        generate_on_servers(folder, model, missing, request.servers, log_rank0)
    if exported and not code:
        shutil.rmtree(path)
    return code


def _begin(request: EvaluationRequest, folder: EvaluationFolder, model: HfFolder, sources: dict[str, str]) -> None:
    """Load and check the benchmarks, then write their prompts and the settings that the responses depend on."""
    tokenizer = model.tokenizer()
    vocabulary = tokenizer.get_vocab()
    template = request.template or ("chat" if tokenizer.chat_template else "raw")
    longest = local_generation.check_length(model.max_positions, request.max_response_tokens)
    stops = {*model.eos_ids, *(vocabulary[token] for token in _END_OF_TURN if token in vocabulary)}
    sampling = SamplingParams(request.temperature, request.top_p, request.max_response_tokens, tuple(sorted(stops)))
    suffixes = {}
    prompts = {}
    for name, source in sources.items():
        problems = load_benchmark(source, request.fields)
        default = "" if is_countdown(source, problems) else _MATH_SUFFIX
        suffixes[name] = default if request.suffix is None else request.suffix
        limit = "the model's positions less --max-response-tokens"
        builder = PromptBuilder(
            tokenizer, template=template, suffix=suffixes[name], field="problem", max_tokens=longest, limit=limit
        )
        prompts[name] = load_prompts(source, builder, first=request.problems, problems=problems, report=log_rank0)
        _check_vocabulary(prompts[name], source, model)
    folder.begin(
        {
            "model": weights_fingerprint(model.path),
            "benchmarks": sources,
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


def _check_vocabulary(prompts: Sequence[Prompt], source: str, model: HfFolder) -> None:
    """Raise UserError for a prompt with a token that the model has no embedding for."""
    for prompt in prompts:
        largest = max(prompt.token_ids, default=0)
        if largest >= model.vocab_size:
            raise UserError(
                f"{source}, problem {prompt.id}: the tokenizer of {model.path} gives token id {largest}, and the model "
                f"has {model.vocab_size} embeddings: tokenizer and weights do not belong together"
            )


def _hf_folder(model: str, folder: EvaluationFolder) -> tuple[Path, bool]:
    """Return the Hugging Face folder to evaluate, and whether it was exported here from a checkpoint."""
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
    exported = folder.path / "-".join(["model", *path.resolve().parts[-3:]])  # an interrupted evaluation leaves its own
    if not exported.exists():
        from eaopd_megatron.checkpoint.convert import export_checkpoint

        folder.path.mkdir(parents=True, exist_ok=True)
        export_checkpoint(path, exported, verify=False, log=log_rank0)
    return exported, True


def _default_folder(model: str) -> Path:
    path = Path(model)
    parts = [part for part in path.parts if part not in ("checkpoints", "/", "..", ".")]
    return Path("evaluations") / "-".join(parts[-2:])
