"""Configurations → Megatron-Core's, what is refused, and the names that do not depend on Transformer Engine."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine_spec_provider
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import attention
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from transformers import AutoConfig

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron import layers
from eaopd_megatron.megatron.model import global_param_name
from eaopd_megatron.models.families import FAMILIES, family_of
from eaopd_megatron.models.supported import check_supported
from eaopd_megatron.models.transformer_config import rotary_base, set_attention_factor, transformer_config
from tests import tiny_models

CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
CLASSES["qwen3_moe"] = "Qwen3MoeForCausalLM"


def config(kind: str, **changes: Any) -> Any:
    """A tiny configuration as config.json gives it."""
    shape = {**tiny_models.SHAPE, "rope_parameters": tiny_models.ROPE["default"], "vocab_size": 112}
    experts = tiny_models.EXPERTS if kind == "qwen3_moe" else {}
    return AutoConfig.for_model(kind, **{**shape, **experts, "architectures": [CLASSES[kind]], **changes})


def refusal(hf: Any, **layout: Any) -> str:
    with pytest.raises(UserError) as refused:
        check_supported(hf, ParallelLayout(**layout), "student.model: folder")
    line = str(refused.value)
    assert line.startswith("student.model: folder: ")
    assert "\n" not in line
    return line


def test_an_architecture_without_mapping_names_the_others_and_where_one_is_added() -> None:
    with pytest.raises(UserError) as refused:
        family_of(["MambaForCausalLM"], "teacher.model: folder")
    line = str(refused.value)
    assert "MambaForCausalLM" in line
    assert all(name in line for name in CLASSES.values())
    assert "eaopd_megatron/models/" in line


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias=true"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is not between 1 and num_experts=4"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok=1"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
    ],
)
def test_what_a_mapping_does_not_hold_for_is_refused(kind: str, changes: dict[str, Any], named: str) -> None:
    """It would be trained as another model, in silence."""
    assert named in refusal(config(kind, **changes))


@pytest.mark.parametrize(
    ("kind", "layout", "named"),
    [
        ("qwen3", {"tensor_parallel": 3}, "tensor_parallel=3 does not divide num_attention_heads=8"),
        ("qwen3", {"tensor_parallel": 8}, "tensor_parallel=8 does not divide num_key_value_heads=4"),
        ("qwen3", {"pipeline_parallel": 3}, "pipeline_parallel=3 does not divide num_hidden_layers=2"),
        (
            "qwen3",
            {"pipeline_parallel": 2, "virtual_pipeline": 2},
            "pipeline_parallel=2 x virtual_pipeline=2 does not divide num_hidden_layers=2",
        ),
        ("qwen3", {"virtual_pipeline": 2}, "virtual_pipeline=2 needs pipeline_parallel"),
        ("qwen3", {"expert_parallel": 2}, "has no experts"),
        ("qwen3_moe", {"expert_parallel": 3}, "expert_parallel=3 does not divide num_experts=4"),
        (
            "qwen3_moe",
            {"expert_tensor_parallel": 5},
            "=5 does not divide moe_intermediate_size=24",
        ),
        ("qwen3_moe", {"tensor_parallel": 2}, "sequence_parallel=true"),
    ],
)
def test_a_layout_that_cannot_work_says_what_must_divide_what(kind: str, layout: dict[str, Any], named: str) -> None:
    assert named in refusal(config(kind), **layout)


def test_a_cut_of_experts_that_gloo_cannot_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail in the middle of the first forward pass."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    layout = ParallelLayout(expert_parallel=2, expert_tensor_parallel=2)
    with pytest.raises(UserError, match="needs CUDA"):
        transformer_config(config("qwen3_moe"), layout, torch.float32)


def test_a_feed_forward_size_is_refused_by_its_number() -> None:
    hf = config("llama", intermediate_size=81)
    assert "tensor_parallel=2 does not divide intermediate_size=81" in refusal(hf, tensor_parallel=2)
    check_supported(
        config("qwen3_moe", intermediate_size=81), ParallelLayout(2, sequence_parallel=True), "no layer is dense"
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_a_family_sets_what_its_layers_have(kind: str) -> None:
    """A norm or bias that the mapping fills must be there, and no other."""
    found = transformer_config(config(kind), ParallelLayout(), torch.float32)
    rules = {rule.megatron_name.rpartition("}.")[2] for rule in FAMILIES[CLASSES[kind]].rules}
    assert found.qk_layernorm == ("self_attention.q_layernorm.weight" in rules)
    assert found.add_qkv_bias == ("self_attention.linear_qkv.bias" in rules)
    assert bool(found.num_moe_experts) == ("mlp.router.weight" in rules)
    assert not found.add_bias_linear


@pytest.mark.parametrize("normalised", [True, False])
def test_the_router_weighs_as_the_configuration_says(normalised: bool) -> None:
    found = transformer_config(config("qwen3_moe", norm_topk_prob=normalised), ParallelLayout(), torch.float32)
    assert found.moe_router_pre_softmax == (not normalised)
    assert (found.moe_router_topk, found.num_moe_experts, found.moe_ffn_hidden_size) == (2, 4, 24)
    assert found.moe_aux_loss_coeff == 0


def test_a_head_dimension_may_be_left_to_the_hidden_size() -> None:
    hf = config("qwen2")
    del hf.head_dim
    assert transformer_config(hf, ParallelLayout(), torch.float32).kv_channels == 48 // 8


@pytest.mark.parametrize("theta", [1e6, 12345.5])
def test_a_fractional_base_is_not_cut(theta: float) -> None:
    assert rotary_base(config("qwen3", rope_parameters={"rope_type": "default", "rope_theta": theta})) == theta


def test_published_configurations_in_the_old_spelling_keep_their_scaling() -> None:
    """`rope_scaling` with `type` and a `rope_theta` beside it; the factor must reach Megatron-Core's attention."""
    old = {"factor": 4.0, "original_max_position_embeddings": 8, "type": "yarn"}
    hf = AutoConfig.for_model("qwen2", architectures=["Qwen2ForCausalLM"], rope_theta=1e6, rope_scaling=old)
    check_supported(hf, ParallelLayout(), "folder")
    assert rotary_base(hf) == 1e6
    found = transformer_config(hf, ParallelLayout(), torch.float32)
    assert _yarn_get_concentration_factor_from_config(found) == 1
    set_attention_factor(found, hf)
    assert _yarn_get_concentration_factor_from_config(found) == pytest.approx(0.1 * math.log(4) + 1)
    assert "_yarn_get_concentration_factor_from_config(self.config)" in inspect.getsource(attention)


def test_fused_names_are_those_of_megatrons_transformer_engine_layers() -> None:
    """Megatron-Core's local layers write their norms to checkpoints under the fused layers' names."""
    written = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    for own, fused in written.items():
        name = global_param_name(f"decoder.layers.0.{fused}weight", first_layer=3)
        assert name == f"decoder.layers.3.{own}weight"
    assert len(written) == 2


def test_grouped_experts_names_are_those_of_megatrons_grouped_layer() -> None:
    """TEGroupedMLP numbers a rank's experts in its weights; SequentialMLP in its modules."""
    grouped, sequential = (inspect.getsource(kind) for kind in (TEGroupedMLP, SequentialMLP))
    assert "f'{name}.weight{i}'" in grouped
    assert "self.linear_fc1 = " in grouped
    assert "self.local_experts = " in sequential
    name = global_param_name("decoder.layers.1.mlp.experts.linear_fc2.weight3", first_layer=2, first_expert=8)
    assert name == "decoder.layers.3.mlp.experts.local_experts.11.linear_fc2.weight"


class Placed:
    """Stands for a class of Transformer Engine."""


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_transformer_engines_layers_are_taken_where_it_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms are fused into the layers that follow, but not into experts, and experts are grouped."""
    TESpecProvider = transformer_engine_spec_provider.TESpecProvider
    found = transformer_config(config(kind), ParallelLayout(), torch.float32)
    found.moe_grouped_gemm = kind == "qwen3_moe"
    monkeypatch.setattr(layers, "uses_transformer_engine", lambda: True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", TESpecProvider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", Placed, raising=False)
    monkeypatch.setattr(transformer_engine_spec_provider, "TEColumnParallelGroupedLinear", Placed)
    monkeypatch.setattr(TESpecProvider, "layer_norm", lambda self, rms_norm=False, for_qk=False: Placed)
    monkeypatch.setattr(layers, "get_num_layers_to_build", lambda config, vp_stage=None: 2)
    block = layers.layer_spec(found)
    parts = block.layer_specs[0].submodules
    assert block.layer_norm is Placed
    assert parts.self_attention.module is SelfAttention
    assert parts.input_layernorm is IdentityOp
    assert parts.pre_mlp_layernorm is (Placed if kind == "qwen3_moe" else IdentityOp)
    assert parts.self_attention.submodules.q_layernorm is Placed
    if kind == "qwen3_moe":
        assert parts.mlp.submodules.experts.module is TEGroupedMLP


def test_the_local_layers_write_an_experts_norm_as_transformer_engines_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a mixture of experts from one kind of layers would miss its norms in the other."""
    monkeypatch.setattr(layers, "get_num_layers_to_build", lambda config, vp_stage=None: 1)
    maps = {}
    for kind in ("qwen3", "qwen3_moe"):
        block = layers.layer_spec(transformer_config(config(kind), ParallelLayout(), torch.float32))
        maps[kind] = set(block.layer_specs[0].submodules.sharded_state_dict_keys_map)
    assert maps["qwen3"] - maps["qwen3_moe"] == {"pre_mlp_layernorm."}


def test_what_the_project_takes_from_megatron_by_name_is_there() -> None:
    """Private names: a release that moves them must fail here, and not in a run."""
    assert isinstance(gpt_layer_specs.HAVE_TE, bool)
    assert "te_general_gemm is not None" in inspect.getsource(layers.moe_utils)
