"""Import and export of checkpoints as folders, the work of tools/hf_to_mcore.py and tools/mcore_to_hf.py.

An import holds `sharded/` (the weights in torch_dist format), `hf/` (configuration and tokenizer) and `import.json`.
A run's step folder holds the first two and `state.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from eaopd_megatron.checkpoint.dist_checkpoint import (
    MODEL_PREFIX,
    load_sharded,
    load_training_state,
    reading_untrusted,
    save_sharded,
    sharded_training_state,
)
from eaopd_megatron.checkpoint.hf_export import (
    HF_DTYPE_NAMES,
    NamedTensors,
    export_hf,
    gather_hf_tensors,
    run_on_main,
)
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf, shard_placement, shard_shape
from eaopd_megatron.checkpoint.store import CheckpointStore
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.distributed import parallel_state as groups
from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise, run_on_main_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.model import ModelChunks, build_model
from eaopd_megatron.megatron.pipeline import gather_logits
from eaopd_megatron.models.mapping import EMBEDDING
from eaopd_megatron.models.shapes import padded_vocab_size
from eaopd_megatron.models.supported import check_supported
from eaopd_megatron.utils.files import atomic_directory, partial_path, require_absent_or_empty, write_error_message
from eaopd_megatron.utils.ports import listening_store

_ROUNDINGS = 20
"""A right conversion's log-probs differ by a few times what rounding alone does, a wrong one's by thousands."""
_VERIFIED_TOKENS = 48
_VERIFIED_TEXT = """\
The committee met on Tuesday, 14 March 2023, to discuss whether a second bridge over the river would pay for itself: its
cost was put at 3.7 million euros, and nobody could say how many lorries would use it. Let x be a real number such that
x^2 - 5x + 6 = 0; then (x - 2)(x - 3) = 0, and therefore x = 2 or x = 3. def mean(values): return sum(values) / n
if n else None  # no values, no mean. Die Katze schläft auf dem Sofa, während es draußen regnet. Le lendemain,
elle partit sans dire un mot à personne; son frère la retrouva à la gare, assise près du kiosque à journaux.
"""
LogFunction = Callable[[str], None]


def check_import(hf: str, layout: ParallelLayout) -> HfFolder:
    """Open the folder and raise UserError if it cannot be imported at this layout. Reads headers only."""
    folder = HfFolder.open(hf, "--hf")
    check_supported(folder.config, layout, folder.label)
    folder.check_tensors()
    return folder


def describe_conversion(folder: HfFolder, layout: ParallelLayout) -> Iterator[str]:
    """Yield a line per parameter: stage, Megatron name, shape of a shard, mapping, and Hugging Face tensors."""
    tied = folder.config.tie_word_embeddings
    placement = shard_placement(folder, layout)
    dtype = HF_DTYPE_NAMES[folder.dtype]
    padded = padded_vocab_size(folder.vocab_size, layout.tensor_parallel)
    vocabulary = f"vocabulary {folder.vocab_size}, padded to {padded}"
    embeddings = "embeddings tied" if tied else "embeddings not tied"
    yield f"{folder.path}: {folder.family.architecture}, {dtype}, {vocabulary}, {embeddings}"
    yield "pipeline stage, expert-parallel rank: parameter [its shape on a rank] x ranks that share it = cut(tensors)"
    for param in folder.family.params(folder.config, own_output=not tied or layout.pipeline_parallel > 1):
        expert_rank = placement.expert_rank(param)
        where = f"stage {placement.stage(param)}" + ("" if expert_rank is None else f", expert rank {expert_rank}")
        shape = f"{list(shard_shape(param, placement))} x {placement.num_shards(param)}"
        made_of = ", ".join(f"{name} {list(shape)}" for name, shape in param.hf_tensors)
        yield f"{where}: {param.megatron_name} {shape} = {param.mapping.name}({made_of})"


def import_folder(hf: str, out: Path, parallel: ParallelState, *, verify: bool, log: LogFunction) -> None:
    """Write the Hugging Face folder's weights as a distributed checkpoint, in their own dtype. Collective.

    `out` appears when it is complete and, with verify, equals the folder (see `verify_model`).
    """
    run_on_all_or_raise(parallel, lambda: require_absent_or_empty(out, "--out"))
    folder = check_import(hf, parallel.layout)
    model = build_model(folder.config, parallel.layout, folder.dtype)
    load_hf(model, folder, parallel)
    count = sum(parameter.numel() for parameter in model.parameters())
    log(f"loaded {folder.path}: {count:,} parameters on the first rank, {HF_DTYPE_NAMES[folder.dtype]}")
    with contextlib.ExitStack() as stack:
        run_on_main_or_raise(parallel, lambda: stack.enter_context(atomic_directory(out)))
        partial = partial_path(out)
        try:
            run_on_main_or_raise(parallel, lambda: _write_metadata(partial, folder, parallel))
            save_sharded(partial / "sharded", sharded_training_state(model), parallel)
        except OSError as error:  # on every rank
            raise UserError(write_error_message(out, error)) from error
        if verify:
            del model
            written = build_model(folder.config, parallel.layout, folder.dtype)
            load_training_state(
                written, None, load_sharded(partial / "sharded", sharded_training_state(written), parallel)
            )
            verify_model(written, folder, parallel, log)
    run_on_all_or_raise(parallel, lambda: None)  # wait until the folder is renamed
    log(f"wrote {out}")


def export_checkpoint(checkpoint: Path, out: Path, *, verify: bool, log: LogFunction) -> None:
    """Write an import or a run's step folder, saved at any layout, as a Hugging Face folder of the same dtype.

    Needs a single process. A folder that fails `verify` (UserError) is left for inspection.
    """
    require_absent_or_empty(out, "--out")
    source = open_checkpoint(checkpoint)
    with single_process_group() as parallel:
        check_supported(source.config, parallel.layout, source.label)
        model = build_model(source.config, parallel.layout, stored_dtype(checkpoint))
        load_training_state(model, None, load_sharded(checkpoint / "sharded", sharded_training_state(model), parallel))
        log(f"loaded {checkpoint}: {sum(p.numel() for p in model.parameters()):,} parameters")
        export_hf(model, parallel, source, out)
        log(f"wrote {out}")
        if verify:
            verify_model(model, HfFolder.open(str(out), "--out"), parallel, log)


def open_checkpoint(checkpoint: Path) -> HfFolder:
    """Open configuration and tokenizer of an import or a step folder. Raises UserError for other folders."""
    if not checkpoint.is_dir():
        raise UserError(f"--checkpoint: there is no folder {checkpoint}")
    imported, saved = ((checkpoint / file).is_file() for file in ("import.json", "state.json"))
    if not (imported or saved) or not (checkpoint / "sharded").is_dir():
        raise UserError(
            f"--checkpoint: {checkpoint} is neither an import nor a run's step folder "
            "(checkpoints/step_...): it needs sharded/ and import.json or state.json"
        )
    if saved:
        CheckpointStore.verify(checkpoint)
    return HfFolder.open(str(checkpoint / "hf"), "--checkpoint")


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """Return the dtype of a checkpoint's weights. Raises UserError if it has no model or cannot be read."""
    try:
        with reading_untrusted(checkpoint / "sharded"):
            stored = dist_checkpointing.load_tensors_metadata(str(checkpoint / "sharded"))
    except UserError:
        raise
    except Exception as error:  # what a damaged pickle or JSON raises
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"--checkpoint: {checkpoint}/sharded cannot be read: {reason}") from error
    if MODEL_PREFIX + EMBEDDING not in stored:
        raise UserError(f"--checkpoint: {checkpoint}/sharded holds no model ({MODEL_PREFIX}{EMBEDDING} is missing)")
    return stored[MODEL_PREFIX + EMBEDDING].dtype


@contextlib.contextmanager
def single_process_group() -> Iterator[ParallelState]:
    """Initialize Megatron's process groups for this process alone."""
    store = listening_store()
    before = dict(os.environ)
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    try:
        yield groups.init_distributed(ParallelLayout())[0]
    finally:
        groups.shutdown_distributed()
        os.environ.clear()
        os.environ |= before


def verify_model(model: ModelChunks, reference: HfFolder, parallel: ParallelState, log: LogFunction) -> None:
    """Compare the model with a folder: tensor by tensor, bit for bit, and its log-probs with transformers'. Collective.

    Converts the model to fp32. Raises UserError for the first difference, or if the log-probs differ by more than
    transformers' own rounding accounts for.
    """
    tensors = gather_hf_tensors(dict(model.global_parameters()), reference, parallel)
    run_on_main(tensors, parallel, lambda found: _compare_tensors(found, reference, log))
    tokens = _text_tokens(reference).to(parallel.device)
    logits = gather_logits(_as_fp32(model).eval(), tokens, parallel)
    run_on_main_or_raise(parallel, lambda: _compare(logits, tokens, reference, log))


def _compare_tensors(tensors: NamedTensors, reference: HfFolder, log: LogFunction) -> None:
    count = 0
    for name, tensor in tensors:
        if not torch.equal(tensor, reference.tensor(name).to(tensor.dtype)):
            raise UserError(f"{reference.label}: verify failed: tensor {name} is not that of the folder")
        count += 1
    log(f"verify: {count} tensors equal the folder's bit for bit")


def _text_tokens(reference: HfFolder) -> torch.Tensor:
    """Return [2, tokens] ids of text, on which a model is calmer than on random ids, or random ids where the folder has
    no tokenizer that knows such text."""
    length = min(_VERIFIED_TOKENS, reference.config.max_position_embeddings)
    if reference.has_tokenizer:
        ids = reference.tokenizer().encode(_VERIFIED_TEXT, add_special_tokens=False)
        ids = [token for token in ids if token < reference.vocab_size]
        if len(set(ids)) >= length:
            return torch.tensor([ids[:length], ids[-length:]])
    return torch.randint(reference.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def _as_fp32(model: ModelChunks) -> ModelChunks:
    """Convert the weights, and the activations exchanged by pipeline stages, to fp32."""
    config = model.config
    config.params_dtype = config.pipeline_dtype = torch.float32
    config.bf16 = False
    return model.float()


def _compare(logits: torch.Tensor, tokens: torch.Tensor, reference: HfFolder, log: LogFunction) -> None:
    logprobs = torch.log_softmax(logits[..., : reference.vocab_size].double(), -1)
    expected, rounding = _reference_logprobs(reference, tokens)
    difference = _distance(logprobs, expected)
    limit = _ROUNDINGS * rounding + torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
    divergence = (expected.exp() * (expected - logprobs)).sum(-1).max().item()
    found = (
        f"largest difference to transformers' log-probs over {tokens.numel()} tokens: {difference:.1e} nats "
        f"(KL {divergence:.1e})"
    )
    log(f"verify: {found} (limit {limit:.1e}, {_ROUNDINGS} times transformers' rounding)")
    if not difference <= limit:  # also for NaN
        raise UserError(f"{reference.label}: verify failed: {found}, more than {limit:.1e}")


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest root mean square difference over the vocabulary of two tensors [..., tokens, vocabulary]."""
    return (left - right).square().mean(-1).sqrt().max().item()


@torch.no_grad()
def _reference_logprobs(reference: HfFolder, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return transformers' log-probs in fp32 arithmetic [..., vocabulary], and how far rounding may move them.

    The latter is measured: in a second pass every linear layer's output gets noise of fp32's relative precision, which
    the model amplifies as it does rounding errors.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = reference.transformers_model(torch.float32).to(tokens.device).eval()
    exact = torch.log_softmax(model(tokens).logits.double(), -1)
    generator = torch.Generator(tokens.device).manual_seed(0)

    def perturb(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator, device=output.device)
        return output + noise * output.square().mean(-1, keepdim=True).sqrt() * torch.finfo(torch.float32).eps

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(perturb)
    return exact, _distance(exact, torch.log_softmax(model(tokens).logits.double(), -1))


def _write_metadata(out: Path, folder: HfFolder, parallel: ParallelState) -> None:
    (out / "hf").mkdir()
    (out / "sharded").mkdir()
    folder.copy_config_and_tokenizer(out / "hf")
    record = {
        "architecture": folder.family.architecture,
        "layout": {
            kind: getattr(parallel.layout, kind) for kind in ("tensor_parallel", "pipeline_parallel", "expert_parallel")
        },
        "vocab_size": folder.vocab_size,
        "padded_vocab_size": padded_vocab_size(folder.vocab_size, parallel.tp_size),
        "dtype": HF_DTYPE_NAMES[folder.dtype],
    }
    (out / "import.json").write_text(json.dumps(record, indent=2) + "\n")
