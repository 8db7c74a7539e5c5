"""Names of other packages that this project uses though they are private, or undocumented and known to move.

A release that moved one fails here, with the file of ours that must follow; so does a private name that is not listed.
Read from the sources, since some modules cannot be imported on a CPU.

Looked at: megatron-core 0.16.1, 0.17.0, 0.17.1, 0.18.0, 0.18.1, 0.19.0 and 0.19.2, torch 2.11.0, 2.12.1, 2.13.0 and
2.14.1, transformers 5.12.1 and 5.19.0. None of these releases moved a name, or changed the parameters of one that we
call, but torch 2.14, which gave `_new_process_group_helper` a further one (`enable_reconfigure=False`).
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "eaopd_megatron"
CORE, C10D = "megatron.core.", "torch.distributed.distributed_c10d"
USED = {
    # our file: {module of the package: names, or Class.attribute of its instances}
    "distributed/parallel_state.py": {
        CORE + "parallel_state": ["_global_process_group_list"],
        CORE + "models.common.embeddings.rotary_pos_embedding": ["RotaryEmbedding.forward"],  # a cache: cache_clear()
    },
    "distributed/cpu_compat.py": {
        CORE + "tensor_parallel.random": ["_set_cuda_rng_state"],
        CORE + "pipeline_parallel.schedules": ["torch"],  # replaced in it
        CORE + "transformer.moe.token_dispatcher": ["maybe_move_tensor_to_cpu"],
    },
    "checkpoint/dist_checkpoint.py": {
        CORE + "dist_checkpointing.core": ["CONFIG_FNAME", "CheckpointingConfig", "CheckpointingException"],
        CORE + "dist_checkpointing.dict_utils": ["extract_matching_values", "nested_values"],
        CORE + "dist_checkpointing.state_dict_utils": ["save_preprocess"],
        CORE + "dist_checkpointing.strategies.common": ["COMMON_STATE_FNAME"],
        CORE + "dist_checkpointing.strategies.torch": ["MCoreSavePlanner", "mcore_to_pyt_state_dict"],
        "torch.distributed.checkpoint.filesystem": ["FileSystem"],
        "torch.distributed.checkpoint.staging": ["BlockingAsyncStager"],
    },
    "megatron/optimizer_state.py": {
        CORE + "dist_checkpointing.optimizer": ["make_sharded_optimizer_tensor"],
        CORE + "dist_checkpointing.utils": ["extract_sharded_tensors_and_factories"],
        CORE + "optimizer.distrib_optimizer": [
            *("DistributedOptimizer.gbuf_ranges", "DistributedOptimizer._get_main_param_and_optimizer_states"),
        ],
        CORE + "optimizer.optimizer": [
            *("Float16OptimizerWithFloat16Params.float16_groups", "MegatronOptimizer.init_state_fn"),
            "Float16OptimizerWithFloat16Params.fp32_from_float16_groups",
            "Float16OptimizerWithFloat16Params.fp32_from_fp32_groups",
            "ChainedOptimizer.chained_optimizers",
        ],
    },
    "megatron/optimizer.py": {
        CORE + "optimizer.clip_grads": ["clip_grad_by_total_norm_fp32"],
        CORE + "optimizer.optimizer": [
            *("ChainedOptimizer.prepare_grads", "ChainedOptimizer.step_with_ready_grads"),
            *("ChainedOptimizer.get_grad_norm", "ChainedOptimizer.model_chunks"),
        ],
    },
    "megatron/offload.py": {
        CORE + "distributed.distributed_data_parallel": [
            *("DistributedDataParallel.offload_grad_buffers", "DistributedDataParallel.restore_grad_buffers"),
        ],
    },
    "megatron/model.py": {
        CORE + "distributed.distributed_data_parallel": [
            *("DistributedDataParallel.param_to_bucket_group", "DistributedDataParallel.start_param_sync"),
        ],
        CORE + "distributed.param_and_grad_buffer": [
            *("_ParamAndGradBucketGroup.param_gather_handle", "_ParamAndGradBucketGroup.finish_param_sync"),
        ],
        CORE + "transformer.transformer_layer": ["get_transformer_layer_offset"],
    },
    "megatron/layers.py": {
        CORE + "fp8_utils": ["prepare_model_for_fp8_inference"],
        CORE + "models.gpt.gpt_layer_specs": ["HAVE_TE"],
        CORE + "transformer.moe.moe_utils": ["te_general_gemm"],
        CORE + "transformer.transformer_block": ["get_num_layers_to_build"],
    },
    "rollout/weight_sync/distributed_transport.py": {
        C10D: ["GroupName", "_abort_process_group", "_new_process_group_helper", "_world"],
    },
    "distributed/heartbeat.py": {"torch._C._distributed_c10d": ["_dump_fr_trace", "_dump_nccl_trace"]},  # a C module
    "checkpoint/hf_folder.py": {"transformers.models.auto.modeling_auto": ["AutoModelForCausalLM._model_mapping"]},
    "rollout/weight_sync/local_transports.py": {"torch.multiprocessing.reductions": ["reduce_tensor"]},
}
WITH_NCCL = {"_dump_nccl_trace"}
"""What torch has in its CUDA builds alone."""
PLACES = [(ours, module, name) for ours, modules in USED.items() for module, names in modules.items() for name in names]
STANDARD = {"_exit", "_asdict", "_distributed_c10d"}
"""Of Python's own library, and a module of which a name is listed."""


def names_in(module: str) -> set[str]:
    """Return what a module defines or imports, its classes' methods and the attributes that they have."""
    package = module.partition(".")[0]
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    files = [Path(folder).parent / f"{module.replace('.', '/')}.py" for folder in spec.submodule_search_locations]
    file = next((file for file in files if file.exists()), None)
    return set(dir(importlib.import_module(module))) if file is None else names_of(file)


@cache
def names_of(file: Path, *, imported: bool = True) -> set[str]:
    tree = ast.parse(file.read_text())
    found = set(_assigned(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias) and imported:
            found.add(node.asname or node.name)
        if isinstance(node, ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef):
                    found.add(f"{node.name}.{part.name}")
                elif isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                    found.add(f"{node.name}.{part.attr}")
            found |= {f"{node.name}.{name}" for name in _assigned(node)}
    return found


def _assigned(node: ast.AST) -> Iterator[str]:
    """Yield the names that are assigned anywhere in the node."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id


@pytest.mark.parametrize(("ours", "module", "name"), PLACES, ids=lambda value: value.replace(CORE, ""))
def test_a_release_moved_a_name(ours: str, module: str, name: str) -> None:
    if name in WITH_NCCL and name not in names_in(module):
        pytest.skip("torch without NCCL")
    package = {"megatron": "megatron-core"}.get(first := module.partition(".")[0], first)
    assert name in names_in(module), f"{package} {version(package)} has no {module}.{name}: adapt {ours}"


def private_names(file: Path) -> Iterator[str]:
    """Yield the private names that a file of ours imports from other packages, or reads of another's objects."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("eaopd_megatron"):
            yield from (alias.name for alias in node.names if re.match("_[^_]", alias.name))
        elif isinstance(node, ast.Attribute) and re.match(
            r"(?!(self|cls)\.\w+$).*\._[^_]\w*$", ast.unparse(node), re.S
        ):
            yield node.attr


def test_a_private_name_is_used_without_being_listed() -> None:
    listed = {(ours, name.rpartition(".")[2]) for ours, _, name in PLACES}
    files = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("*.py")}
    found = {(ours, name) for ours, file in files.items() for name in private_names(file)}
    own = {name.rpartition(".")[2] for file in files.values() for name in names_of(file, imported=False)}
    found = {(ours, name) for ours, name in found if name not in own | STANDARD}
    assert len(found) >= 9
    assert found <= listed, f"list them in {Path(__file__).name}: {sorted(found - listed)}"
    for ours, _, name in PLACES:
        assert name.rpartition(".")[2] in (PACKAGE / ours).read_text(), f"{ours} no longer uses {name}: remove it here"
