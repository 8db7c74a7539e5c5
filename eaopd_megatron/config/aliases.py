"""Names of the recipe's keys: the dotted keys, those of earlier releases and of other frameworks, and close matches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from eaopd_megatron.config.model_schema import AtResume, Section
from eaopd_megatron.config.schema import Recipe

RENAMED_SINCE, RENAMED_UNTIL = "0.2", "0.3"
"""Release that renamed the keys of RENAMED, and the first one that no longer accepts the old names."""
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

# A clause that names our key, and the names for it in slime, verl, NeMo-RL, TRL and Megatron-LM: a key, or section.key.
# Of keys separated by | the one of the section at hand is named.
_FOREIGN = """
the number of responses per update is train.mini_batch: batch_size global_batch_size train_global_batch_size
    mini_batch_size ppo_mini_batch_size
the number of prompts per iteration is train.prompts_per_iteration: rollout_batch_size train_batch_size prompts_per_step
    num_prompts_per_step num_prompts generation_batch_size
each prompt gets one response; the number of prompts per iteration is train.prompts_per_iteration: rollout.n num_samples
    num_generations num_generations_per_prompt n_samples_per_prompt num_return_sequences rollouts_per_example group_size
an iteration has train.prompts_per_iteration / train.mini_batch updates: steps_per_generation num_steps_per_rollout
the number of responses per problem is evaluation.samples: evaluation.n evaluation.num_samples n_samples_per_eval_prompt
micro-batches are packed; their size in tokens is train.micro_batch_tokens: micro_batch_size train_micro_batch_size
    ppo_micro_batch_size ppo_micro_batch_size_per_gpu per_device_train_batch_size max_tokens_per_gpu sequence_packing
    ppo_max_token_len_per_gpu use_dynamic_bsz use_dynamic_batch_size
it follows from train.mini_batch (responses per update) and train.micro_batch_tokens (tokens per micro-batch):
    gradient_accumulation_steps gradient_accumulation
the number of iterations is train.iterations: epochs total_epochs num_train_epochs num_epochs max_num_epochs max_steps
    max_num_steps train_steps total_training_steps num_rollout train_iters num_steps ppo_epochs
the learning rate is optimizer.lr: learning_rate
the learning-rate schedule is optimizer.schedule: lr_scheduler lr_scheduler_type lr_decay_style scheduler
the warmup, in updates, is optimizer.warmup_updates: warmup_steps lr_warmup_steps warmup_iters lr_warmup_iters
    num_warmup_steps warmup_ratio lr_warmup_steps_ratio lr_warmup_fraction
the lowest learning rate, as a fraction of optimizer.lr, is optimizer.min_lr_ratio: min_lr
the weight decay is optimizer.weight_decay: wd
the largest gradient norm is optimizer.clip_grad: grad_clip max_grad_norm gradient_clipping
Adam's decay rates are optimizer.beta1 and optimizer.beta2: betas optimizer.beta adam_beta1 adam_beta2
Adam's epsilon is optimizer.eps: adam_eps adam_epsilon optimizer.epsilon
the sharded optimizer is optimizer.distributed: use_distributed_optimizer zero zero_stage
moments go to host memory with optimizer.offload=moments: optimizer_cpu_offload cpu_offload optimizer_offload
the longest response, in tokens, is rollout.max_response_tokens|evaluation.max_response_tokens: max_new_tokens
    max_tokens max_response_length max_completion_length rollout_max_response_len response_length eval_max_response_len
the longest prompt, in tokens, is data.max_prompt_tokens: max_prompt_length rollout_max_prompt_len prompt_length
    data.max_tokens data.max_length
a sequence has up to data.max_prompt_tokens + rollout.max_response_tokens tokens: seq_length seq_len max_seq_length
    max_total_sequence_length max_length max_model_len context_length
responses are sampled at rollout.temperature, benchmarks at evaluation.temperature: temperature rollout_temperature
nucleus sampling is rollout.top_p, which must be 1.0, and evaluation.top_p: top_p rollout_top_p
further end tokens are rollout.stop_token_ids: stop_token_id eos_token_id eos_token_ids
the tensor-parallel size is student.tensor_parallel|teacher.tensor_parallel|servers.tensor_parallel: tp tp_size
    tensor_model_parallel_size tensor_parallel_size rollout_num_gpus_per_engine
the pipeline-parallel size is student.pipeline_parallel|teacher.pipeline_parallel: pp pp_size
    pipeline_model_parallel_size pipeline_parallel_size
the number of model chunks per rank is student.virtual_pipeline: vpp virtual_pipeline_model_parallel_size
the context-parallel size is student.context_parallel: cp cp_size context_parallel_size
the expert-parallel size is student.expert_parallel|teacher.expert_parallel: ep ep_size expert_model_parallel_size
    expert_parallel_size
the experts' tensor-parallel size is student.expert_tensor_parallel: etp expert_tensor_parallel_size
the data-parallel size is student.data_parallel: dp dp_size data_parallel_size
activation recomputation is student.recompute: gradient_checkpointing activation_checkpointing recompute_granularity
the precision is student.precision|teacher.precision: bf16 fp16 dtype torch_dtype params_dtype
ranks are started by torchrun, srun or the launcher; copies of the student are student.data_parallel: num_nodes nnodes
    gpus_per_node n_gpus_per_node num_gpus actor_num_nodes actor_num_gpus_per_node
the student's folder or hub id is student.model: model_name_or_path model_name model_path hf_checkpoint
the teacher's folder or hub id is teacher.model: teacher_model_name_or_path teacher_model ref_load ref_model
the training data is data.source: dataset dataset_name train_files prompt_data train_data
the benchmarks are evaluation.benchmarks: val_files eval_data eval_prompt_data test_files
the field that holds the prompt is data.prompt_field: input_key prompt_key
the prompt's template is data.template: apply_chat_template chat_template
the run's folder is run.folder: output_dir checkpoint_dir save_dir default_local_dir log_dir
the number of iterations between checkpoints is run.save_interval: save_steps save_freq save_period
the number of checkpoints to keep is run.keep_checkpoints: save_total_limit keep_top_k max_actor_ckpt_to_keep
the number of iterations between evaluations is evaluation.interval: eval_steps test_freq val_period eval_interval
metrics go to reporting.tensorboard and reporting.wandb: report_to logger use_wandb use_tensorboard
the project's name is reporting.wandb_project: project_name wandb_project
the run's name is reporting.wandb_name: experiment_name run_name wandb_run_name
a run resumes by itself from the last checkpoint in run.folder: resume resume_mode resume_from_checkpoint load
the KL terms' weights are objective.reverse_weight and objective.forward_weight: kl_coef kl_loss_coef mixed_kl_weight
    reference_policy_kl_penalty kl_penalty beta lmbda alpha
the objective is objective.preset: loss_type loss_fn kl_type adv_estimator
the size of the teacher's top-k is objective.top_k: topk_logits_k topk teacher_top_k distillation_top_k
the importance weights' bound is rollout.importance_clip, the log-ratio's objective.clip: clip_ratio eps_clip
    clip_range cliprange epsilon ratio_clip_min ratio_clip_max
the entropy gate's threshold, in nats, is objective.threshold: entropy_coef entropy_coeff entropy_threshold
a server's share of GPU memory is servers.mem_fraction_static|teacher.mem_fraction_static: gpu_memory_utilization
    vllm_gpu_memory_utilization sglang_mem_fraction_static
the number of requests per server is servers.max_concurrent_requests|teacher.max_concurrent_requests: max_num_seqs
    max_running_requests sglang_server_concurrency
the rollout engine is rollout.engine: use_vllm backend vllm_mode
servers and teacher share the student's GPUs with servers.placement and teacher.placement=colocated: colocate colocated
the largest staleness, in iterations, is rollout.max_staleness: staleness max_off_policy_steps async_level
    max_async_level max_trajectory_age_steps
"""
FOREIGN = {
    name: answer
    for answer, _, names in (line.rpartition(":") for line in _FOREIGN.replace("\n    ", " ").splitlines())
    for name in names.split()
}
"""Another framework's name -> a clause that names our key."""
_TEACHER_NAME = re.compile(r"[A-Za-z0-9_-]+")  # part of keys, metric names and file names


def foreign_answer(key: str) -> str | None:
    """Return a clause that says what our key for another framework's dotted `key` is; None if the table has none."""
    name = key.lower().replace("-", "_")
    answer = FOREIGN.get(".".join(name.split(".")[-2:])) or FOREIGN.get(name.rpartition(".")[2])
    if answer is None or "|" not in answer:
        return answer
    meaning, _, keys = answer.rpartition(" ")
    section = key.rpartition(".")[0]
    kind = "teacher" if section.startswith("teachers.") else section
    own = [f"{section}.{ours.partition('.')[2]}" for ours in keys.split("|") if ours.startswith(f"{kind}.")]
    return f"{meaning} {' or '.join(own or keys.split('|'))}"


def teacher_schema_key(key: str) -> str:
    """Return `teacher.x` for `teachers.NAME.x`, and any other dotted key unchanged."""
    return re.sub(r"^teachers\.[^.]+\.", "teacher.", key)


def current_key(key: str) -> str:
    """Return the current name of a dotted key: the same unless it was renamed."""
    new = RENAMED.get(teacher_schema_key(key))
    return f"{key.rpartition('.')[0]}.{new.rpartition('.')[2]}" if new else key


def rename_old_keys(tree: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[str, str]]:
    """Return a copy of an unchecked tree with current names, also in `${section.key}`, and what was renamed (old: new).

    Raises ValueError if a key is given under both names.
    """
    used: dict[str, str] = {}

    def current(key: str) -> str:
        if (new := current_key(key)) != key:
            used[key] = new
        return new

    def renamed(prefix: str, value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(r"\$\{([\w.-]+)\}", lambda reference: f"${{{current(reference[1])}}}", value)
        if isinstance(value, list):
            return [renamed(prefix, item) for item in value]
        if not isinstance(value, Mapping):
            return value
        result: dict[Any, Any] = {}
        for name, inner in value.items():
            key = f"{prefix}{name}"
            leaf = name if (new := current(key)) == key else new.rpartition(".")[2]
            if new != key and leaf in value:
                raise ValueError(f"{key} is the old name of {new}, which is given too: remove {key}")
            result[leaf] = renamed(f"{key}.", inner)
        return result

    return renamed("", tree), used


@cache
def section_models() -> dict[str, type[Section]]:
    """Return each section's model under its name in the recipe."""
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}


@cache
def section_keys() -> dict[str, tuple[str, ...]]:
    """Return each section's keys; those of the recipe's top level are under ''."""
    return {"": tuple(Recipe.model_fields)} | {
        name: tuple(kind.model_fields) for name, kind in section_models().items()
    }


def default_values() -> dict[str, Any]:
    """Return the tree of all keys that have a default."""
    return {
        name: field.get_default()
        if (section := section_models().get(name)) is None
        else {key: part.get_default() for key, part in section.model_fields.items() if not part.is_required()}
        for name, field in Recipe.model_fields.items()
    }


@cache
def value_keys() -> tuple[str, ...]:
    """Return every dotted key that holds a value: 'seed', 'run.folder', ..."""
    top = tuple(key for key in section_keys()[""] if key not in section_keys())
    return top + tuple(f"{section}.{key}" for section, keys in section_keys().items() if section for key in keys)


def at_resume(key: str) -> AtResume:
    """Return whether the value of a dotted key may change when a run is resumed."""
    section, _, name = teacher_schema_key(key).rpartition(".")
    model: type[Section] = section_models().get(section, Recipe)
    marks = model.model_fields[name].metadata if name in model.model_fields else ()
    return next((mark for mark in marks if isinstance(mark, AtResume)), model.at_resume)


def flatten_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf. Lists and empty mappings are leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def key_error(tree: Mapping[Any, Any]) -> str | None:
    """Return a message for the first key of an unchecked tree that does not exist, or None if all of them do."""
    for name, value in tree.items():
        if name not in section_keys()[""]:
            foreign = (key for key, _ in flatten_keys({str(name): value}) if foreign_answer(key))
            return unknown_key_message(next(foreign, str(name)))
        if name != "teachers":
            parts = {name: value} if name in section_keys() else {}
        elif not isinstance(value, Mapping):
            return f"'teachers' maps names to sections with the keys of 'teacher'; it cannot be {value!r}"
        else:
            if wrong := [key for key in value if not isinstance(key, str) or not _TEACHER_NAME.fullmatch(key)]:
                return f"a teacher is named {wrong[0]!r}; a name has letters, digits, '-' and '_'"
            parts = {f"teachers.{key}": keys for key, keys in value.items()}
        for section, keys in parts.items():
            known = section_keys()["teacher" if name == "teachers" else name]
            if not isinstance(keys, Mapping):
                return f"{section!r} is a section (keys: {', '.join(known)}), not a value such as {keys!r}"
            if unknown := [key for key in keys if key not in known]:
                return unknown_key_message(f"{section}.{unknown[0]}")
    return None


def unknown_key_message(key: str) -> str:
    """Return the message for a dotted key that does not exist: what it is called here, the closest key, or all keys."""
    if answer := foreign_answer(key):
        return f"{key}: no such key; {answer}"
    section, _, leaf = key.rpartition(".")
    kind = "teacher" if section.startswith("teachers.") else section
    if near := closest_match(leaf, section_keys().get(kind, ())):
        return f"unknown key {key!r}; did you mean {'.'.join(filter(None, (section, near)))!r}?"
    near = closest_match(leaf, (name.rpartition(".")[2] for name in value_keys()))
    if near:
        hint = next(name for name in value_keys() if name.rpartition(".")[2] == near)
        return f"unknown key {key!r}; did you mean {hint!r}?"
    place = f"of {section!r}" if section and kind in section_keys() else "at the top"
    return f"unknown key {key!r}; the keys {place} are {', '.join(section_keys().get(kind, section_keys()['']))}"


def closest_match(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice most similar to `word`, or None if none is close."""
    return next(iter(get_close_matches(word.lower().replace("-", "_"), list(choices), n=1)), None)
