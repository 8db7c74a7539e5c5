"""Names of the recipe's keys: the dotted keys themselves, those of earlier releases, those of other frameworks, and
the closest key to a misspelt one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from pydantic import BaseModel

from eaopd_megatron.config.schema import Recipe

RENAMED_SINCE = "0.2"
"""Release in which the keys of RENAMED got their new names."""
RENAMED_UNTIL = "0.3"
"""First release that no longer accepts the old names."""
RENAMED = {
    "run.on_damaged": "run.on_corrupt_checkpoint",
    "rollout.max_lag": "rollout.max_staleness",
    "rollout.stop_ids": "rollout.stop_token_ids",
    **{
        f"{section}.{old}": f"{section}.{new}"
        for section in ("servers", "teacher")
        for old, new in (
            ("max_running", "max_concurrent_requests"),
            ("memory_fraction", "mem_fraction_static"),
            ("start_minutes", "startup_timeout_minutes"),
            ("all_down_minutes", "unavailable_timeout_minutes"),
        )
    },
}
"""Old key -> current key. The keys of `teacher` stand for those of `teachers.NAME` too."""

_FOREIGN: dict[str, str | tuple[str, ...]] = {
    # sizes of a batch: slime, verl, NeMo-RL, TRL
    "batch_size global_batch_size train_global_batch_size ppo_mini_batch_size mini_batch_size": (
        "the number of responses per update is train.mini_batch"
    ),
    "steps_per_generation num_steps_per_rollout": (
        "an iteration has train.prompts_per_iteration / train.mini_batch updates"
    ),
    "generation_batch_size": "responses per iteration are train.prompts_per_iteration; sequences that a local rank "
    "generates together, rollout.batch_size",
    "rollout_batch_size train_batch_size num_prompts_per_step prompts_per_step num_prompts": (
        "the number of prompts per iteration is train.prompts_per_iteration"
    ),
    "rollout.n num_samples num_generations num_generations_per_prompt n_samples_per_prompt num_return_sequences "
    "rollouts_per_example group_size": (
        "each prompt gets one response; the number of prompts per iteration is train.prompts_per_iteration"
    ),
    "evaluation.n evaluation.num_samples n_samples_per_eval_prompt num_tests_per_prompt": (
        "the number of responses per problem is evaluation.samples"
    ),
    "micro_batch_size train_micro_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu "
    "per_device_train_batch_size max_tokens_per_gpu ppo_max_token_len_per_gpu use_dynamic_bsz use_dynamic_batch_size "
    "sequence_packing": "micro-batches are packed; their size in tokens is train.micro_batch_tokens",
    "gradient_accumulation_steps gradient_accumulation": (
        "it follows from train.mini_batch (responses per update) and train.micro_batch_tokens (tokens per micro-batch)"
    ),
    "epochs total_epochs num_train_epochs num_epochs num_epoch max_num_epochs max_steps max_num_steps train_steps "
    "total_training_steps num_rollout train_iters num_steps": "the number of iterations is train.iterations",
    "ppo_epochs": "a response is trained on once; the number of iterations is train.iterations",
    # optimizer
    "learning_rate": "the learning rate is optimizer.lr",
    "lr_scheduler lr_scheduler_type lr_decay_style scheduler lr_schedule": (
        "the learning-rate schedule is optimizer.schedule"
    ),
    "warmup_steps lr_warmup_steps warmup_iters lr_warmup_iters num_warmup_steps warmup_ratio lr_warmup_steps_ratio "
    "lr_warmup_fraction": "the warmup, in updates, is optimizer.warmup_updates",
    "min_lr": "the lowest learning rate, as a fraction of optimizer.lr, is optimizer.min_lr_ratio",
    "grad_clip max_grad_norm gradient_clipping": "the largest gradient norm is optimizer.clip_grad",
    "betas optimizer.beta": "Adam's decay rates are optimizer.beta1 and optimizer.beta2",
    "adam_beta1": "Adam's first decay rate is optimizer.beta1",
    "adam_beta2": "Adam's second decay rate is optimizer.beta2",
    "adam_eps adam_epsilon optimizer.epsilon": "Adam's epsilon is optimizer.eps",
    "use_distributed_optimizer zero zero_stage": "the sharded optimizer is optimizer.distributed",
    "optimizer_cpu_offload cpu_offload optimizer_offload": "moments go to host memory with optimizer.offload=moments",
    # lengths and sampling
    "max_new_tokens max_tokens max_response_length max_completion_length rollout_max_response_len response_length": (
        "the longest response, in tokens,",
        "rollout.max_response_tokens",
        "evaluation.max_response_tokens",
    ),
    "eval_max_response_len": "the longest response, in tokens, is evaluation.max_response_tokens",
    "max_prompt_length rollout_max_prompt_len prompt_length data.max_tokens data.max_length": (
        "the longest prompt, in tokens, is data.max_prompt_tokens"
    ),
    "seq_length seq_len max_seq_length max_total_sequence_length max_length max_model_len context_length": (
        "a sequence has up to data.max_prompt_tokens + rollout.max_response_tokens tokens"
    ),
    "temperature rollout_temperature": "responses are sampled at rollout.temperature, benchmarks at "
    "evaluation.temperature; the objective's softmax has none",
    "top_p rollout_top_p": "nucleus sampling is rollout.top_p, which must be 1.0, and evaluation.top_p",
    "stop_token_id eos_token_id eos_token_ids stop_sequences": "further end tokens are rollout.stop_token_ids",
    # parallelism
    "tp tp_size tensor_model_parallel_size tensor_parallel_size rollout_num_gpus_per_engine": (
        "the tensor-parallel size",
        "student.tensor_parallel",
        "teacher.tensor_parallel",
        "servers.tensor_parallel",
    ),
    "pp pp_size pipeline_model_parallel_size pipeline_parallel_size": (
        "the pipeline-parallel size",
        "student.pipeline_parallel",
        "teacher.pipeline_parallel",
    ),
    "vpp virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage": (
        "the number of model chunks per rank is student.virtual_pipeline"
    ),
    "cp cp_size context_parallel_size": "the context-parallel size is student.context_parallel",
    "ep ep_size expert_model_parallel_size expert_parallel_size": (
        "the expert-parallel size",
        "student.expert_parallel",
        "teacher.expert_parallel",
    ),
    "etp expert_tensor_parallel_size": "the experts' tensor-parallel size is student.expert_tensor_parallel",
    "dp dp_size data_parallel_size": "the data-parallel size is student.data_parallel",
    "sp": "sequence parallelism is student.sequence_parallel",
    "gradient_checkpointing activation_checkpointing recompute_granularity enable_gradient_checkpointing": (
        "activation recomputation is student.recompute"
    ),
    "bf16 fp16 dtype torch_dtype params_dtype": ("the precision", "student.precision", "teacher.precision"),
    "num_nodes nnodes gpus_per_node n_gpus_per_node num_gpus actor_num_nodes actor_num_gpus_per_node": (
        "ranks are started by torchrun, srun or the launcher; copies of the student are student.data_parallel"
    ),
    # models, data, files
    "model_name_or_path model_name model_path hf_checkpoint student_model actor_model": (
        "the student's folder or hub id is student.model"
    ),
    "teacher_model_name_or_path teacher_model teacher_path ref_load ref_model": (
        "the teacher's folder or hub id is teacher.model"
    ),
    "dataset dataset_name train_files prompt_data train_data": "the training data is data.source",
    "val_files eval_data eval_prompt_data test_files": "the benchmarks are evaluation.benchmarks",
    "input_key prompt_key": "the field that holds the prompt is data.prompt_field",
    "apply_chat_template chat_template": "the prompt's template is data.template",
    "output_dir checkpoint_dir save_dir default_local_dir log_dir": "the run's folder is run.folder",
    "save_steps save_freq save_period": "the number of iterations between checkpoints is run.save_interval",
    "save_total_limit keep_top_k max_ckpt_to_keep max_actor_ckpt_to_keep": (
        "the number of checkpoints to keep is run.keep_checkpoints"
    ),
    "eval_steps test_freq val_period eval_interval eval_freq": (
        "the number of iterations between evaluations is evaluation.interval"
    ),
    "report_to logger use_wandb use_tensorboard": "metrics go to reporting.tensorboard and reporting.wandb",
    "project_name wandb_project": "the project's name is reporting.wandb_project",
    "experiment_name run_name wandb_run_name exp_name": "the run's name is reporting.wandb_name",
    "resume resume_mode resume_from_checkpoint load": (
        "a run resumes by itself from the last checkpoint in run.folder"
    ),
    # objective
    "kl_coef kl_loss_coef reference_policy_kl_penalty kl_penalty mixed_kl_weight": (
        "the weights of the two KL terms are objective.reverse_weight and objective.forward_weight"
    ),
    "beta lmbda alpha": "which KL is minimised is objective.preset; the weights of its terms are "
    "objective.reverse_weight and objective.forward_weight",
    "loss_type loss_fn kl_type adv_estimator": "the objective is objective.preset",
    "topk_logits_k topk teacher_top_k distillation_top_k": "the size of the teacher's top-k is objective.top_k",
    "clip_ratio eps_clip clip_range cliprange epsilon ratio_clip_min ratio_clip_max": (
        "the importance weights' bound is rollout.importance_clip, the log-ratio's objective.clip"
    ),
    "entropy_coef entropy_coeff entropy_threshold": "the entropy gate's threshold, in nats, is objective.threshold",
    # rollout servers
    "gpu_memory_utilization vllm_gpu_memory_utilization sglang_mem_fraction_static mem_fraction": (
        "a server's share of GPU memory",
        "servers.mem_fraction_static",
        "teacher.mem_fraction_static",
    ),
    "max_num_seqs max_running_requests sglang_server_concurrency": (
        "the number of requests a server runs at once",
        "servers.max_concurrent_requests",
        "teacher.max_concurrent_requests",
    ),
    "use_vllm backend vllm_mode": "the rollout engine is rollout.engine",
    "colocate colocated": "colocation is servers.placement=colocated and teacher.placement=colocated",
    "staleness max_off_policy_steps async_level max_async_level max_trajectory_age_steps": (
        "the largest staleness, in iterations, is rollout.max_staleness"
    ),
}
FOREIGN = {name: answer for names, answer in _FOREIGN.items() for name in names.split()}
"""Name in slime, verl, NeMo-RL, TRL or Megatron-LM (a key, or section.key) -> a clause that names our key, or a tuple
of a meaning and our keys, of which those in the same section are named."""


def foreign_answer(key: str) -> str | None:
    """Return a clause that says what our key for another framework's dotted `key` is; None if the table has none."""
    name = key.lower().replace("-", "_")
    answer = FOREIGN.get(".".join(name.split(".")[-2:])) or FOREIGN.get(name.rpartition(".")[2])
    if not isinstance(answer, tuple):
        return answer
    meaning, *choices = answer
    section = key.rpartition(".")[0]
    kind = "teacher" if section.startswith("teachers.") else section
    own = [f"{section}.{choice.partition('.')[2]}" for choice in choices if choice.startswith(f"{kind}.")]
    return f"{meaning} is {' or '.join(own or choices)}"


def teacher_schema_key(key: str) -> str:
    """Return `teacher.x` for `teachers.NAME.x`, and any other dotted key as it is."""
    return re.sub(r"^teachers\.[^.]+\.", "teacher.", key)


def current_key(key: str) -> str:
    """Return the current name of a dotted key: the same one unless it was renamed."""
    new = RENAMED.get(teacher_schema_key(key))
    return f"{key.rpartition('.')[0]}.{new.rpartition('.')[2]}" if new else key


def old_key(key: str) -> str | None:
    """Return the old name of a dotted key that was renamed."""
    return next((old for old, new in RENAMED.items() if new == key), None)


def rename_old_keys(tree: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, str]]:
    """Return a copy of an unchecked tree with current names, and the renamed keys that it used, old -> current.

    References (`${rollout.max_lag}`) follow. Raises ValueError if a key is given under both names.
    """
    used: dict[str, str] = {}

    def renamed(section: str, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return references(values)
        result: dict[Any, Any] = {}
        for name, value in values.items():
            key = f"{section}.{name}" if section else str(name)
            new = current_key(key)
            leaf = name if new == key else new.rpartition(".")[2]
            if leaf != name:
                used[key] = new
                if leaf in values:
                    raise ValueError(f"{key} is the old name of {new}, which is given too: remove {key}")
            result[leaf] = renamed(key, value)
        return result

    def references(value: Any) -> Any:
        if isinstance(value, list):
            return [references(item) for item in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        for old in re.findall(r"\$\{([\w.-]+)\}", value):
            if (new := current_key(old)) != old:
                used[old] = new
                value = value.replace(f"${{{old}}}", f"${{{new}}}")
        return value

    return renamed("", tree), used


def renaming_warnings(used: Mapping[str, str]) -> Iterator[str]:
    """Yield one line for each renamed key."""
    for old, new in used.items():
        yield f"{old} is now {new}; the old name works until {RENAMED_UNTIL}"


_MIN_SIMILARITY = 0.6
_TEACHER_NAME = re.compile(r"[A-Za-z0-9_-]+")  # part of keys, metric names and file names


@cache
def section_models() -> dict[str, type[BaseModel]]:
    """Return each section's model under its name in the recipe."""
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


@cache
def section_keys() -> dict[str, tuple[str, ...]]:
    """Return each section's keys; those of the recipe's top level are under ''."""
    return {
        "": tuple(Recipe.model_fields),
        **{name: tuple(kind.model_fields) for name, kind in section_models().items()},
    }


def default_values() -> dict[str, Any]:
    """Return the tree of all keys that have a default."""
    tree: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        parts = section_models()[name].model_fields if name in section_models() else None
        if parts is None:
            tree[name] = field.get_default()
        else:
            tree[name] = {key: part.get_default() for key, part in parts.items() if not part.is_required()}
    return tree


@cache
def value_keys() -> tuple[str, ...]:
    """Return every dotted key that holds a value: 'seed', 'run.folder', ..."""
    top = tuple(key for key in section_keys()[""] if key not in section_keys())
    return top + tuple(f"{section}.{key}" for section, keys in section_keys().items() if section for key in keys)


def flatten_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf. Lists and empty mappings are leaves."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten_keys(value, f"{name}.")
        else:
            yield name, value


def key_error(tree: Mapping[Any, Any]) -> str | None:
    """Return a message for the first key of an unchecked tree that does not exist, or None if all of them do."""
    for name, value in tree.items():
        if name not in section_keys()[""]:
            inner = [key for key, _ in flatten_keys({str(name): value}) if foreign_answer(key)]
            return unknown_key_message(inner[0] if inner else str(name))
        if name == "teachers":
            if not isinstance(value, Mapping):
                return f"'teachers' maps names to sections with the keys of 'teacher'; it cannot be {value!r}"
            for teacher in value:
                if not isinstance(teacher, str) or not _TEACHER_NAME.fullmatch(teacher):
                    return f"a teacher is named {teacher!r}; a name has letters, digits, '-' and '_'"
            parts = {f"teachers.{teacher}": keys for teacher, keys in value.items()}
            kind = "teacher"
        elif name in section_keys():
            parts, kind = {name: value}, name
        else:
            continue
        for section, keys in parts.items():
            if not isinstance(keys, Mapping):
                return (
                    f"{section!r} is a section (keys: {', '.join(section_keys()[kind])}), not a value such as {keys!r}"
                )
            for key in keys:
                if key not in section_keys()[kind]:
                    return unknown_key_message(f"{section}.{key}")
    return None


def unknown_key_message(key: str) -> str:
    """Return the message for a dotted key that does not exist: what it is called here, the closest key, or all keys."""
    if answer := foreign_answer(key):
        return f"{key}: no such key; {answer}"
    section, _, leaf = key.rpartition(".")
    kind = "teacher" if section.startswith("teachers.") else section
    near = closest_match(leaf, section_keys().get(kind, ()))
    hint = ".".join(filter(None, (section, near))) if near else _closest_in_any_section(leaf)
    if hint:
        return f"unknown key {key!r}; did you mean {hint!r}?"
    place = f"of {section!r}" if section and kind in section_keys() else "at the top"
    keys = section_keys().get(kind, section_keys()[""])
    return f"unknown key {key!r}; the keys {place} are {', '.join(keys)}"


def _closest_in_any_section(leaf: str) -> str | None:
    match = closest_match(leaf, {name.rpartition(".")[2] for name in value_keys()})
    return next((name for name in value_keys() if name.rpartition(".")[2] == match), None)


def closest_match(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice most similar to `word`, the first in alphabetical order among equals; None if none is close."""
    ranked = sorted((-_similarity(word, choice), choice) for choice in choices)
    return ranked[0][1] if ranked and -ranked[0][0] >= _MIN_SIMILARITY else None


def _similarity(word: str, choice: str) -> float:
    """Return 0 to 1. Initials ('learning_rate' and 'lr', 'tp' and 'tensor_parallel') count as close."""
    word, choice = word.lower().replace("-", "_"), choice.lower()
    if word == choice:
        return 1.0
    if _initials(word) == choice or _initials(choice) == word:
        return 0.95
    return SequenceMatcher(None, word, choice).ratio()


def _initials(word: str) -> str:
    return "".join(part[:1] for part in word.split("_")) if "_" in word else ""
