"""The one check of what a model may be and of what its sizes must divide by.

It reads a parsed config.json, needs neither torch nor transformers, and is called before a rank starts by `train`,
`teach`, `evaluate`, `plan`, `doctor`, tools/hf_to_mcore.py and a Slurm job, and once more on the ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import teacher_key
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.digest import HUB_ID, local_folder, split_revision
from eaopd_megatron.models.mapping import config_values
from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.utils.files import read_json

if TYPE_CHECKING:
    from eaopd_megatron.config import Recipe

AnyLayout = TypeVar("AnyLayout", bound=ParallelLayout)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary position types whose frequencies do not depend on the sequence length."""
_HUB_TIMEOUT = 10.0  # seconds


def check_supported(hf_config: Any, layout: ParallelLayout, label: str) -> None:
    """Raise UserError, starting with `label`, for a model that this version or this layout cannot hold.

    hf_config: a parsed config.json, or transformers' configuration.
    """
    values = config_values(hf_config)
    check_model(values, label)
    for reason in layout_reasons(ModelShape.of(values, label), layout):
        raise UserError(f"{label}: {reason}")


def check_model(hf_config: Mapping[str, Any], label: str) -> None:
    """Raise UserError, starting with `label`, for a model that no layout can hold."""
    shape = ModelShape.of(hf_config, label)
    for reason in _model_reasons(hf_config, shape):
        raise UserError(f"{label}: {reason}")


def _model_reasons(values: Mapping[str, Any], shape: ModelShape) -> Iterator[str]:
    for key, required in shape.family.required.items():
        value = values.get(key)
        if value is not None and value != required:
            yield (
                f"{key}={json.dumps(value)} is not supported; "
                f"{shape.architecture} is supported with {key}={json.dumps(required)}"
            )
    quantization = values.get("quantization_config")
    if isinstance(quantization, Mapping) and (method := quantization.get("quant_method")) != "fp8":
        yield (
            f"quantization_config says that its weights are quantised by {method!r}, of which only 'fp8' is read; use "
            "the unquantised model, or remove the key if the weights are not quantised"
        )
    if (activation := values.get("hidden_act", "silu")) != "silu":
        yield f"hidden_act {activation!r} is not supported; supported: silu"
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if (rope_type := rope.get("rope_type") or rope.get("type") or "default") not in ROPE_TYPES:
        yield f"rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
    if (factor := rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1.0) != 1.0:
        yield f"partial_rotary_factor={factor} is not supported, only 1 is"
    if shape.heads % shape.kv_heads:
        yield f"num_key_value_heads={shape.kv_heads} does not divide num_attention_heads={shape.heads}"
    if shape.experts:
        if shape.experts_per_token > shape.experts:
            yield f"num_experts_per_tok={shape.experts_per_token} is not between 1 and num_experts={shape.experts}"
        if shape.experts_per_token == 1 and values.get("norm_topk_prob"):
            yield "num_experts_per_tok=1 with norm_topk_prob gives the router no gradient"


def layout_reasons(shape: ModelShape, layout: ParallelLayout) -> Iterator[str]:
    """Yield why a layout cannot hold a model: a size that does not divide, or a key that the model cannot use."""

    def must_divide(size: int, name: str, *parts: str) -> Iterator[str]:
        factors = {part: getattr(layout, part) for part in parts}
        if size % math.prod(factors.values()):
            product = " x ".join(f"{part}={factor}" for part, factor in factors.items() if factor > 1)
            yield f"{product} does not divide {name}={size}"

    experts = layout.expert_parallel * layout.expert_tensor_parallel > 1
    if experts and not shape.experts:
        yield f"{shape.architecture} has no experts; set expert_parallel and expert_tensor_parallel to 1"
    if layout.virtual_pipeline > 1 and layout.pipeline_parallel == 1:
        yield f"virtual_pipeline={layout.virtual_pipeline} needs pipeline_parallel of 2 or more"
    yield from must_divide(shape.heads, "num_attention_heads", "tensor_parallel")
    yield from must_divide(shape.kv_heads, "num_key_value_heads", "tensor_parallel")
    if not shape.experts:
        yield from must_divide(shape.intermediate, "intermediate_size", "tensor_parallel")
    yield from must_divide(shape.layers, "num_hidden_layers", "pipeline_parallel", "virtual_pipeline")
    if shape.experts:
        yield from must_divide(shape.experts, "num_experts", "expert_parallel")
        yield from must_divide(shape.expert_intermediate, "moe_intermediate_size", "expert_tensor_parallel")
        if layout.tensor_parallel > 1 and not layout.sequence_parallel:
            yield (
                f"experts under tensor_parallel={layout.tensor_parallel} need sequence_parallel=true, "
                "or every rank would send the same tokens to them"
            )


def colocated_layouts(layout: ParallelLayout, has_experts: Sequence[bool]) -> list[ParallelLayout]:
    """Return the layout of each model on the same ranks: expert parallelism applies to those that have experts."""
    if not any(has_experts):  # what cannot be used is refused, not ignored
        return [layout] * len(has_experts)
    return [layout if experts else layout.without_experts() for experts in has_experts]


def check_recipe_models(recipe: Recipe) -> None:
    """Check the student and the teachers of a recipe with their layouts, without network. Raises UserError.

    A hub id that is not in the local cache is left to the ranks, which download it.
    """
    ours = [("student.model", recipe.student.model)]
    for name, teacher in recipe.named_teachers().items():
        key = f"{teacher_key(name)}.model"
        if teacher.placement == "colocated":
            ours.append((key, teacher.model))
        elif teacher.placement == "separate":
            check_local_model(teacher.model, teacher.parallel_layout, key)
    configs = {f"{key}: {model}": config for key, model in ours if (config := local_config(model, key))}
    for label, config in configs.items():
        check_model(config, label)
        if label.startswith("student.model") and recipe.rollout.engine == "sglang" and "quantization_config" in config:
            raise UserError(
                f"{label}: config.json has a quantization_config, by which SGLang would serve the student, which is "
                "trained without; write it anew by tools/hf_to_mcore.py and tools/mcore_to_hf.py"
            )
    experts = [bool(ModelShape.of(config, label).experts) for label, config in configs.items()]
    layout = recipe.student.parallel_layout
    if len(configs) < len(ours) and not any(experts):  # expert parallelism may be for a model that is not here
        layout = layout.without_experts()
    for (label, config), its in zip(configs.items(), colocated_layouts(layout, experts), strict=True):
        check_supported(config, its, label)
    check_recipe_context(recipe)


def max_positions(hf_config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a model can take, prompt and response together, as SGLang counts them; None: not known.

    hf_config: a parsed config.json. A scaling of the rotary positions counts where it does not name the original
    length, which `max_position_embeddings` then is.
    """
    positions = hf_config.get("max_position_embeddings")
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    scaled = (rope.get("rope_type") or rope.get("type")) in ("linear", "yarn")
    if positions and scaled and "original_max_position_embeddings" not in rope:
        return int(positions * rope.get("factor", 1))
    return positions


def check_context(recipe: Recipe, positions: Mapping[str, int | None], longest_prompt: int = 1) -> None:
    """Refuse responses that do not fit into the positions of the student or a teacher, with any engine.

    positions: `max_positions` by the key of the model. longest_prompt: in tokens; 1 while the prompts are not known.
    """
    response = recipe.rollout.max_response_tokens
    for key, limit in positions.items():
        if limit and longest_prompt + response > limit:
            what = "a prompt" if longest_prompt == 1 else f"the longest prompt of {longest_prompt} tokens"
            remedy = f"data.max_prompt_tokens={limit - response}" if limit > response else "a smaller one"
            raise UserError(
                f"rollout.max_response_tokens={response}: {what} and its response do not fit into the {limit} "
                f"positions of {key} (max_position_embeddings in its config.json); set {remedy}"
            )


def check_recipe_context(recipe: Recipe) -> None:
    """`check_context` of the models of a recipe that are here, while the prompts are not known."""
    found = {key: local_config(model, key) for key, model in recipe.model_names().items()}
    check_context(recipe, {key: max_positions(config) for key, config in found.items() if config})


def context_note(recipe: Recipe, positions: Mapping[str, int | None]) -> str | None:
    """Return a line where prompts as long as data.max_prompt_tokens would not fit, or None."""
    prompt, response = recipe.data.max_prompt_tokens, recipe.rollout.max_response_tokens
    key, limit = min(
        ((k, p) for k, p in positions.items() if p), key=lambda one: one[1], default=("", prompt + response)
    )
    if prompt + response <= limit:
        return None
    return (
        f"{key} has {limit} positions: prompts of more than {limit - response} tokens, which "
        f"data.max_prompt_tokens={prompt} allows, would be refused beside rollout.max_response_tokens={response}"
    )


def separate_layout(layout: AnyLayout, *, has_experts: bool) -> AnyLayout:
    """Return the layout of a model on ranks of its own: experts under tensor parallelism use sequence parallelism."""
    return replace(layout, sequence_parallel=has_experts and layout.tensor_parallel > 1)


def check_local_model(model: str, layout: ParallelLayout, key: str) -> None:
    """Check a model with ranks of its own if its config.json is here. Raises UserError, starting with `key: model`."""
    label = f"{key}: {model}"
    if config := local_config(model, key):
        experts = bool(ModelShape.of(config, label).experts)
        check_supported(config, separate_layout(layout, has_experts=experts), label)


def local_config(model: str, key: str) -> dict[str, Any] | None:
    """Return the parsed config.json of a local folder or of the hub's cache; None where neither has the model."""
    folder = local_folder(model)
    return None if folder is None else read_json(folder / "config.json", f"{key}: {folder}")


# Models that a plan names


@dataclass(frozen=True)
class ModelInfo:
    """A model's name in the recipe, its sizes, and where they were read."""

    name: str
    shape: ModelShape
    source: str


def find_model(name: str, key: str, *, served: bool = False) -> ModelInfo:
    """Return the model that a recipe's key names: a folder with config.json, or a hub id `owner/name`.

    Without the hub, a built-in table of Qwen3 models is used. Raises UserError, starting with the key, for a missing
    configuration, or for one that this version cannot hold. served: SGLang runs the model, which holds others too.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.exists() or not HUB_ID.fullmatch(name)):
        raise UserError(f"{key}: {name} is no folder with a config.json and no hub id owner/name")
    config, why = local_config(name, key), ""
    if config is None:
        config, why = _from_hub(name)
    if config is None:
        if (known := built_in_shape(name)) is None:
            raise UserError(f"{key}: there is no folder {name}, {why}, and it is not in the built-in table")
        return ModelInfo(name, known, f"built-in table: {why}")
    source = "config.json" if folder.is_dir() else "config.json from the hub"
    label = f"{key}: {name}"
    if not served:
        check_model(config, label)
    return ModelInfo(name, replace(ModelShape.of(config, label), positions=max_positions(config)), source)


_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_QWEN3: dict[str, tuple[tuple[int, ...], bool]] = {  # values of the names above; whether embeddings are tied
    "0.6B": ((28, 1024, 16, 8, 3072), True),
    "1.7B": ((28, 2048, 16, 8, 6144), True),
    "4B": ((36, 2560, 32, 8, 9728), True),
    "8B": ((36, 4096, 32, 8, 12288), False),
    "14B": ((40, 5120, 40, 8, 17408), False),
    "32B": ((64, 5120, 64, 8, 25600), False),
    "30B-A3B": ((48, 2048, 32, 4, 6144, 128, 8, 768), False),
    "235B-A22B": ((94, 4096, 64, 4, 12288, 128, 8, 1536), False),
}


def built_in_shape(name: str) -> ModelShape | None:
    """Return the sizes of Qwen/Qwen3-..., base and chat model alike; None for any other name."""
    match = re.fullmatch(r"Qwen/Qwen3-(.+?)(-Base)?", split_revision(name)[0])
    if match is None or match[1] not in _QWEN3:
        return None
    values, tied = _QWEN3[match[1]]
    config: dict[str, Any] = dict(zip((*_SIZES, *_EXPERT_SIZES), values, strict=False))
    config |= {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": tied}
    architecture = "Qwen3MoeForCausalLM" if "num_experts" in config else "Qwen3ForCausalLM"
    return ModelShape.of({"architectures": [architecture], **config}, name)


def _download(url: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Return the status and content of a GET, through the site's proxy. Raises OSError."""
    import asyncio

    import aiohttp

    async def get() -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=_HUB_TIMEOUT)
        session = aiohttp.ClientSession(trust_env=True, timeout=timeout)
        async with session, session.get(url, headers=headers) as answer:
            return answer.status, await answer.read()

    try:
        return asyncio.run(get())
    except aiohttp.ClientError as error:
        raise ConnectionError(str(error)) from None


def _from_hub(name: str) -> tuple[dict[str, Any] | None, str]:
    """Return config.json from the hub in one request; or None and the reason."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set"
    hub_id, revision = split_revision(name)
    try:
        status, content = _download(hf_hub_url(hub_id, "config.json", revision=revision), build_hf_headers())
        if status != 200:
            return None, f"the Hugging Face hub answers {status}"
        config = json.loads(content)
    except (OSError, ValueError) as error:
        return None, f"the Hugging Face hub cannot be reached ({type(error).__name__})"
    return (config, "") if isinstance(config, dict) else (None, "the Hugging Face hub's config.json is broken")
