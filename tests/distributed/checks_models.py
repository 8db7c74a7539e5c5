"""Checks of test_models.py: Megatron-Core's models against what transformers said of the same folder, on four ranks."""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from eaopd_megatron.checkpoint.convert import import_folder
from eaopd_megatron.checkpoint.dist_checkpoint import sharded_training_state
from eaopd_megatron.checkpoint.hf_export import export_hf, gather_hf_tensors
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.checkpoint.store import CheckpointStore
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import OptimizerConfig
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron import model as megatron_model
from eaopd_megatron.megatron.forward import response_logits, stage_output
from eaopd_megatron.megatron.generation import Decoder, decode_mode
from eaopd_megatron.megatron.model import ModelChunks, build_model
from eaopd_megatron.megatron.optimizer import build_optimizer, finalize_gradients, optimizer_step, wrap_ddp
from eaopd_megatron.megatron.pipeline import gather_logits, run_forward_backward, single_batch
from eaopd_megatron.models.supported import check_supported
from tests.distributed.groups import model_parallel
from tests.emulated_varlen import emulated

LIMIT = 1e-5


def loaded(folder: HfFolder, parallel: ParallelState, *, swaps: dict[int, int] | None = None) -> ModelChunks:
    model = build_model(folder.config, parallel.layout, folder.dtype, untie=swaps is not None)
    load_hf(model, folder, parallel, row_map=swaps)
    return model


def check_varlen_logits_and_gradients(group: dist.ProcessGroup, folder: str, layout: dict[str, Any]) -> None:
    """Through torch's variable-length attention, whose kernel alone is emulated."""
    with emulated() as stands:
        check_logits_and_gradients(group, folder, layout)
    assert stands.called


def check_logits_and_gradients(group: dist.ProcessGroup, folder: str, layout: dict[str, Any]) -> None:
    """The loss is Σ weight · logits² / 2: linear in nothing, and blind to the padding's logits, which are zero."""
    expected = load_file(Path(folder) / "expected" / "values.safetensors")
    with model_parallel(ParallelLayout(**layout)) as parallel:
        source = HfFolder.open(folder)
        check_supported(source.config, parallel.layout, folder)
        model = loaded(source, parallel)
        ddp = wrap_ddp(model)
        optimizer = build_optimizer(
            ddp,
            OptimizerConfig.model_construct(lr=0, weight_decay=0, beta1=0.9, beta2=0.9, eps=1, clip_grad=0),
        )
        ddp.zero_grad_buffer()

        logits = gather_logits(model, expected["tokens"], parallel)
        assert logits.shape[-1] % (128 * parallel.tp_size) == 0
        close(logits[..., : source.vocab_size], expected["logits"], "logits")
        assert not logits[..., source.vocab_size :].any(), "the padding's rows are not zero"

        batch = single_batch(expected["tokens"], parallel)
        weight = torch.nn.functional.pad(expected["weight"], (0, logits.shape[-1] - source.vocab_size)).flatten(0, 1)
        weight = weight if batch.cp_local_indices is None else weight[batch.cp_local_indices]
        weight = weight.chunk(parallel.tp_size, dim=-1)[parallel.tp_rank]
        batches = [batch] * parallel.pp_size  # as the interleaved schedule wants
        run_forward_backward(ddp, batches, lambda index, rows: (weight * response_logits(model, rows) ** 2 / 2).sum())
        finalize_gradients(ddp, torch.tensor(len(batches) / parallel.cp_size))

        gradients = {name: getattr(p, "main_grad") for name, p in model.global_parameters().items()}  # noqa: B009
        theirs = {name[5:]: gradient for name, gradient in expected.items() if name.startswith("grad.")}
        seen = set()
        for name, gradient in gather_hf_tensors(gradients, source, parallel):
            close(gradient, theirs[name], f"gradient of {name}")
            seen.add(name)
        assert seen == (theirs.keys() if parallel.is_main else set())
        norm = torch.stack([gradient.norm() for gradient in theirs.values()]).norm().item()
        _, found = optimizer_step(optimizer)
        assert math.isclose(found, norm, rel_tol=LIMIT), f"norm of the gradient: {found}, not {norm}"


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference <= LIMIT, f"{what}: {difference:.2e} apart, the largest is {theirs.abs().max().item():.2e}"


HOST_READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu")


def check_no_host_reads(group: dist.ProcessGroup, folder: str, layout: dict[str, Any]) -> None:
    """No layer but the first reads a tensor's values on the host, which would wait for the GPU."""
    found: list[str] = []

    def reading(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **options: Any) -> Any:
            stack = traceback.format_stack(limit=4)[:-1]
            if not any("te_cpu" in frame for frame in stack):  # what stands for a kernel
                found.append(f"{name}\n{''.join(stack)}")
            return real(*args, **options)

        return method

    with model_parallel(ParallelLayout(**layout)) as parallel, torch.no_grad():
        model = loaded(HfFolder.open(folder), parallel)
        batch = single_batch(torch.zeros(3, 8, dtype=torch.long), parallel)
        layers = model.gpts[0].decoder.layers
        seen: list[str] = []
        layers[0].register_forward_hook(lambda *_: found.clear())  # an index of the micro-batch is computed there
        layers[-1].register_forward_hook(lambda *_: seen.extend(found))
        with contextlib.ExitStack() as patches:
            for name in HOST_READS:
                patches.enter_context(mock.patch.object(torch.Tensor, name, reading(name, getattr(torch.Tensor, name))))
            stage_output(model[0], batch)
        assert len(layers) > 1
        assert not seen, f"{len(seen)} reads in {len(layers) - 1} layers, the first one {seen[0]}"


def check_round_trip(
    group: dist.ProcessGroup, folder: str, out: str, layout: dict[str, Any], shard_bytes: int, files: int
) -> None:
    """Import, export: the same names, dtypes and bits."""
    with model_parallel(ParallelLayout(**layout)) as parallel:
        source = HfFolder.open(folder)
        export_hf(loaded(source, parallel), parallel, source, Path(out), max_shard_bytes=shard_bytes)
        if parallel.is_main:
            same_tensors(Path(folder), Path(out))
            assert len(list(Path(out).glob("*.safetensors"))) == files
            assert not list(Path(out).parent.glob(f".{Path(out).name}*")), "something was left beside the folder"
        dist.barrier()


def check_export_waits_for_gathers(group: dist.ProcessGroup, folder: str, out: str) -> None:
    """After an update other ranks' weights may still be on their way."""
    with model_parallel(ParallelLayout(2)) as parallel:
        source = HfFolder.open(folder)
        model = loaded(source, parallel)
        with torch.no_grad():
            for parameter in model.parameters():
                arriving = parameter.clone()
                parameter.zero_()
                setattr(parameter, megatron_model._WAIT, functools.partial(parameter.data.copy_, arriving))
        export_hf(model, parallel, source, Path(out))
        if parallel.is_main:
            same_tensors(Path(folder), Path(out))
        dist.barrier()


def check_import(group: dist.ProcessGroup, folder: str, out: str, layout: dict[str, Any]) -> None:
    """What was written has transformers' logits."""
    said: list[str] = []
    with model_parallel(ParallelLayout(**layout)) as parallel:
        import_folder(folder, Path(out), parallel, verify=True, log=said.append)
        assert any(line.startswith("verify: largest difference") for line in said) == parallel.is_main


def same_tensors(one: Path, other: Path) -> None:
    found = []
    for folder in (one, other):
        tensors: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        found.append(tensors)
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert tensor.dtype == found[1][name].dtype, name
        assert torch.equal(tensor, found[1][name]), name


def check_export_in_another_dtype(group: dist.ProcessGroup, folder: str, out: str) -> None:
    with model_parallel(ParallelLayout(2)) as parallel:
        source = HfFolder.open(folder)
        export_hf(loaded(source, parallel), parallel, source, Path(out), torch.bfloat16)
        if parallel.rank == 0:
            written = HfFolder.open(out)
            assert written.dtype == torch.bfloat16 == written.config.dtype
            assert torch.equal(written.tensor("model.norm.weight"), source.tensor("model.norm.weight").bfloat16())
        dist.barrier()


def check_swapped_rows(group: dist.ProcessGroup, folder: str, tp: int) -> None:
    """The two ids exchange their logits; what a token means on the input side stays."""
    expected = load_file(Path(folder) / "expected" / "values.safetensors")
    with model_parallel(ParallelLayout(tp)) as parallel:
        source = HfFolder.open(folder)
        one, other = 3, source.vocab_size - 1  # on different ranks where a rank's rows end between them
        theirs = expected["logits"].clone()
        theirs[..., [one, other]] = theirs[..., [other, one]]
        with torch.no_grad():
            for swaps in ({one: other, other: one}, {one: other}):
                logits = gather_logits(loaded(source, parallel, swaps=swaps), expected["tokens"], parallel)
                close(logits[..., : source.vocab_size], theirs, "swapped logits")
        for wrong in ({one: source.vocab_size}, {1: 2, 3: 2}):
            with raises(ValueError, "is not a swap of ids"):
                loaded(source, parallel, swaps=wrong)
        if source.config.tie_word_embeddings:
            with raises(ValueError, "untie=True"):
                load_hf(build_model(source.config, parallel.layout, torch.float32), source, parallel, row_map={1: 2})


@contextlib.contextmanager
def raises(kind: type[Exception], text: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert text in str(error), error
        assert "\n" not in str(error)
        return
    raise AssertionError(f"nothing was raised, {kind.__name__} {text!r} was expected")


def check_decoding(group: dist.ProcessGroup, folder: str, tp: int, sp: bool) -> None:
    """Greedy tokens, prompts of unequal lengths padded on the left."""
    expected = load_file(Path(folder) / "expected" / "values.safetensors")
    tokens, lengths, new = expected["tokens"], expected["lengths"].tolist(), expected["generated"].shape[1]
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    with model_parallel(ParallelLayout(tp, sp)) as parallel:
        source = HfFolder.open(folder)
        model = loaded(source, parallel)
        for rows in (slice(0, len(prompts)), slice(0, 1)):  # with padding, and without
            with decode_mode(model):
                decoder = Decoder(model, prompts[rows], new, parallel)
                found = [greedy(decoder.prefill(), source)]
                while len(found) < new:
                    found.append(greedy(decoder.step(found[-1]), source))
            assert torch.equal(torch.stack(found, dim=1), expected["generated"][rows])
        assert model.config.sequence_parallel == (sp and tp > 1)


def greedy(logits: torch.Tensor | None, source: HfFolder) -> torch.Tensor:
    assert logits is not None
    return logits[:, : source.vocab_size].argmax(-1)


def check_step_folder(group: dist.ProcessGroup, folder: str, out: str) -> None:
    """Save a training checkpoint: weights and optimiser at TP2 × DP2."""
    with model_parallel(ParallelLayout(2)) as parallel:
        source = HfFolder.open(folder)
        model = loaded(source, parallel)
        optimizer = build_optimizer(
            wrap_ddp(model), OptimizerConfig(lr=1, weight_decay=0, beta1=0.9, beta2=0.9, eps=1, clip_grad=0)
        )

        def companions(step: Path) -> None:
            (step / "hf").mkdir()
            source.copy_config_and_tokenizer(step / "hf")

        CheckpointStore(Path(out), 1).save(7, sharded_training_state(model, optimizer), {}, companions, parallel)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this rank may grow beyond 20 kB: a write fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_full_disk(group: dist.ProcessGroup, folder: str, out: str) -> None:
    """One rank writes and fails, while another gathers for it."""
    with model_parallel(ParallelLayout(2)) as parallel:
        source = HfFolder.open(folder)
        model = loaded(source, parallel)
        export_hf(model, parallel, source, Path(out))
        before = sorted((file.name, file.read_bytes()) for file in Path(out).iterdir())
        for target in (out, out + "_new"):
            with small_files(), raises(UserError, f"{target}: writing failed"):
                export_hf(model, parallel, source, Path(target))
        assert sorted((file.name, file.read_bytes()) for file in Path(out).iterdir()) == before
        assert [path.name for path in Path(out).parent.iterdir()] == [Path(out).name]
        dist.barrier()


def check_import_on_a_full_disk(group: dist.ProcessGroup, folder: str, out: str) -> None:
    with model_parallel(ParallelLayout(2)) as parallel:
        with small_files(), raises(UserError, f"{out}: writing failed"):
            import_folder(folder, Path(out), parallel, verify=False, log=print)
        dist.barrier()
        assert not list(Path(out).parent.iterdir())


def check_no_room(group: dist.ProcessGroup, folder: str, out: str) -> None:
    """Where the disk is known to be too small no tensor is gathered for nothing."""
    from eaopd_megatron.checkpoint import hf_export

    with model_parallel(ParallelLayout(2)) as parallel:
        source = HfFolder.open(folder)
        model = loaded(source, parallel)
        real = hf_export.shutil.disk_usage
        hf_export.shutil.disk_usage = lambda path: real(path)._replace(free=1000)
        try:
            with raises(UserError, "bytes, the disk has 1000 left"):
                export_hf(model, parallel, source, Path(out))
        finally:
            hf_export.shutil.disk_usage = real
        assert not Path(out).exists()


def check_every_parameter_is_filled(group: dist.ProcessGroup, folder: str) -> None:
    """A parameter that the mapping forgets would keep whatever its memory held."""
    with model_parallel(ParallelLayout(2)) as parallel:
        source = HfFolder.open(folder)
        model = build_model(source.config, parallel.layout, torch.float32)
        model.gpts[0].register_parameter("forgotten", torch.nn.Parameter(torch.ones(1)))
        with raises(ValueError, "leaves forgotten unfilled"):
            load_hf(model, source, parallel)
