"""Requests that the real SGLang server and its double must answer alike, and how their answers are compared."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any

import torch

STUDENT = Path(__file__).resolve().parents[2] / "recipes/countdown/student"
CONTEXT = 128


GREEDY = {"temperature": 0, "ignore_eos": True}
GENERATE = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}
LOGPROBS = {**GENERATE, "return_logprob": True}
SCORED = {
    **LOGPROBS,
    "input_ids": [3, 2, 1, 20, 109, 111, 40],
    "sampling_params": {"max_new_tokens": 0},
    "logprob_start_len": 2,
    "top_logprobs_num": 3,
}
FLAT = {**SCORED, "return_flat_raw_top_logprobs": True}
NORM = base64.b64encode(pickle.dumps([("model.norm.weight", torch.ones(64))])).decode()
EXCHANGES: list[tuple[str, str, Any]] = [
    ("GET", "/ready", None),
    ("GET", "/model_info", None),
    ("GET", "/server_info", None),
    ("POST", "/generate", LOGPROBS),
    ("POST", "/generate", GENERATE),
    ("POST", "/generate", {**LOGPROBS, "sampling_params": {"max_new_tokens": 0}, "logprob_start_len": 0}),
    ("POST", "/generate", SCORED),
    ("POST", "/generate", {**SCORED, "token_ids_logprob": [109, 3]}),
    ("POST", "/generate", FLAT),
    ("POST", "/generate", {**FLAT, "logprob_start_len": 6}),
    ("POST", "/generate", {**FLAT, "return_flat_raw_top_logprobs_b64": True, "token_ids_logprob": [3]}),
    ("POST", "/generate", {**FLAT, "return_flat_raw_top_logprobs_b64": True, "top_logprobs_num": 112}),
    ("POST", "/generate", {**LOGPROBS, "sampling_params": {"max_new_tokens": 9, "stop_token_ids": list(range(112))}}),
    ("POST", "/generate", {**LOGPROBS, "input_ids": [1] * 100, "sampling_params": {**GREEDY, "max_new_tokens": 28}}),
    ("POST", "/generate", {**LOGPROBS, "input_ids": [1] * 122, "sampling_params": {"max_new_tokens": 1}}),
    ("POST", "/generate", {**LOGPROBS, "input_ids": [1] * 121, "sampling_params": {"max_new_tokens": 1}}),
    ("POST", "/generate", {**LOGPROBS, "input_ids": [1] * 128, "sampling_params": {"max_new_tokens": 0}}),
    ("POST", "/generate", {**LOGPROBS, "input_ids": [1] * 100, "sampling_params": {"max_new_tokens": 29}}),
    ("POST", "/generate", {**LOGPROBS, "input_ids": []}),
    ("POST", "/generate", {"sampling_params": {}}),
    ("POST", "/generate", {**LOGPROBS, "sampling_params": {"temperature": -1}}),
    ("POST", "/generate", {**LOGPROBS, "sampling_params": {"no_such_key": 1}}),
    ("POST", "/generate", {**LOGPROBS, "token_ids_logprob": [-1]}),
    ("POST", "/generate", {**LOGPROBS, "token_ids_logprob": [112]}),
    ("POST", "/begin_weight_update", {}),
    ("POST", "/begin_weight_update", {}),
    ("POST", "/end_weight_update", {}),
    ("POST", "/end_weight_update", {}),
    ("POST", "/update_weights_from_tensor", {"serialized_named_tensors": []}),
    (
        "POST",
        "/update_weights_from_distributed",
        {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "g"},
    ),
    ("POST", "/begin_weight_update", {}),
    (
        "POST",
        "/update_weights_from_distributed",
        {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "g"},
    ),
    ("POST", "/update_weights_from_tensor", {"serialized_named_tensors": [NORM], "weight_version": "2"}),
    ("POST", "/end_weight_update", {}),
    ("POST", "/destroy_weights_update_group", {"group_name": "g"}),
    ("POST", "/weights_checker", {"action": "checksum"}),
    ("POST", "/update_weights_from_disk", {"model_path": str(STUDENT), "weight_version": "3"}),
    ("GET", "/model_info", None),
    ("POST", "/update_weights_from_disk", {"model_path": str(STUDENT / "missing")}),
    ("POST", "/update_weight_version", {"new_version": "0", "abort_all_requests": False}),
    ("POST", "/pause_generation", {"mode": "retract"}),
    ("GET", "/ready", None),
    ("GET", "/model_info", None),
    ("POST", "/pause_generation", {"mode": "retract"}),
    ("POST", "/pause_generation", {"mode": "wrong"}),
    ("POST", "/continue_generation", {}),
    ("POST", "/continue_generation", {}),
    ("GET", "/ready", None),
    ("POST", "/flush_cache", {}),
    ("POST", "/flush_cache?timeout=5", {}),
    ("POST", "/release_memory_occupation", {"tags": ["kv_cache", "weights"]}),
    ("POST", "/resume_memory_occupation", {"tags": ["weights"]}),
    ("POST", "/resume_memory_occupation", {"tags": ["kv_cache"]}),
    ("POST", "/generate", GENERATE),
    ("POST", "/abort_request", {"rid": "unknown"}),
    ("POST", "/abort_request", {"abort_all": True}),
    ("POST", "/no_such_endpoint", {}),
]
PARTLY = {"/model_info", "/server_info", "/weights_checker"}
"""Where the double has some of the fields only."""
FIXED = (
    *("error", "message", "success", "num_paused_requests", "version", "weight_version", "api_key", "status"),
    *("context_length", "max_total_num_tokens", "max_req_input_len", "architectures", "model_type"),
)
"""Whose values are equal too."""
FREE_TEXT = ("validation error", "Failed to get weights iterator")
"""Messages of which only the beginning is copied."""


def shape(value: Any) -> Any:
    """Names and types all the way down; of a list, its first two and last elements. The double caches no prefixes."""
    if isinstance(value, dict):
        return {key: None if key == "cached_tokens_details" else shape(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shape(entry) for entry in (*value[:2], *value[-1:])]
    return type(value).__name__


def same(path: str, ours: Any, theirs: Any) -> None:
    """The double's answer has the real one's fields, types and fixed values, in its order."""
    if path in PARTLY:
        theirs = {key: value for key, value in theirs.items() if key in ours}
        ours = {**ours, "internal_states": None, "model_path": ""}
        theirs = {**theirs, "internal_states": None, "model_path": ""}
    elif isinstance(ours, dict) and any(text in str(theirs.get("message")) for text in FREE_TEXT):
        ours, theirs = {**ours, "message": ""}, {**theirs, "message": ""}
    assert shape(ours) == shape(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs) or path in PARTLY
        for key in FIXED:
            assert ours.get(key) == theirs.get(key), key
    if isinstance(ours, dict) and "meta_info" in ours:
        one, other = ours["meta_info"], theirs["meta_info"]
        assert list(one) == list(other)
        for key in ("prompt_tokens", "weight_version", "weight_versions", "completion_tokens", "num_retractions"):
            assert one[key] == other[key], key
        assert one["finish_reason"]["type"] == other["finish_reason"]["type"]
