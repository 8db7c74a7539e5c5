"""Prompts, cursor and packing, which decide the logits that a token is trained with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from eaopd_megatron.data.packing import (
    Packing,
    collate,
    cp_shard_indices,
    group_by_teacher,
    split_into_micro_batches,
)
from eaopd_megatron.data.prompts import PromptBuilder, PromptCursor, seeded_uniforms
from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.errors import RecipeError, UserError

ROOT = Path(__file__).resolve().parents[2]


def sample(prompt: list[int], response: list[int], reason: str = "stop") -> Sample:
    return Sample(Prompt("p", tuple(prompt), {}), response, reason, [-1.0] * len(response), 0)


def test_a_token_is_paired_with_the_logits_of_the_position_before_it() -> None:
    batch = collate([sample([5, 6], [7, 8, 9]), sample([1, 2, 3], [4])], torch.device("cpu"))
    flat = batch.token_ids.flatten()
    assert batch.target_ids.tolist() == [7, 8, 9, 4]
    assert flat[batch.logit_positions + 1].tolist() == batch.target_ids.tolist()
    assert flat[batch.logit_positions].tolist() == [6, 7, 8, 3]


def test_alignment_to_the_tensor_parallel_size_moves_no_row() -> None:
    batch = collate([sample([5, 6], [7, 8, 9]), sample([1], [2])], torch.device("cpu"), Packing(sp_size=4))
    assert batch.token_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0]]
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen) == ([0, 5, 7, 8], 5)
    assert batch.token_ids[0, batch.logit_positions + 1].tolist() == batch.target_ids.tolist() == [7, 8, 9, 2]


@pytest.mark.parametrize("context", [2, 4])
def test_the_context_parts_hold_each_token_once_with_the_row_before_it(context: int) -> None:
    """A position located after the split would belong to another token."""
    samples = [sample([5, 6], [7, 8, 9]), sample([1, 2, 3], [4]), sample([9], list(range(20, 37)))]
    batches = [collate(samples, torch.device("cpu"), Packing(3, context, rank)) for rank in range(context)]
    ends = batches[0].cu_seqlens.long()
    assert not (ends % (2 * context)).any() and ends[-1] % (3 * context) == 0
    places = [cp_shard_indices(ends, context, rank) for rank in range(context)]
    assert torch.equal(torch.cat(places).sort().values, torch.arange(int(ends[-1])))
    ids = torch.cat([batch.token_ids[0] for batch in batches])[torch.cat(places).argsort()]
    for sequence, start in zip(samples, ends.tolist(), strict=False):
        assert ids[start : start + len(sequence.token_ids)].tolist() == sequence.token_ids
    tokens = torch.full((21,), -1)
    for batch, place in zip(batches, places, strict=True):
        assert batch.cp_local_indices is not None
        assert ids[place[batch.logit_positions] + 1].tolist() == batch.target_ids.tolist()
        tokens[batch.cp_local_indices] = batch.target_ids
        assert torch.equal(batch.positions[0], place - ends[torch.searchsorted(ends, place, right=True) - 1])
    assert tokens.tolist() == [token for one in samples for token in one.response_ids]


def test_a_response_ends_before_an_id_that_a_teacher_lacks() -> None:
    one = replace(sample([5], [7, 250, 249]), weight_versions=[(3, 0, 1), (4, 1, 3)])
    assert one.truncated_to_vocab(251) is one
    cut = one.truncated_to_vocab(250)
    assert (cut.response_ids, cut.rollout_logprobs, cut.finish_reason) == ([7], [-1.0], "length")
    assert (cut.weight_versions, cut.foreign_tokens) == ([(3, 0, 1)], 2)
    empty = one.truncated_to_vocab(7)
    assert (empty.response_ids, empty.weight_versions, empty.foreign_tokens) == ([], [], 3)
    assert collate([empty], torch.device("cpu")).num_response_tokens == 0


def test_a_micro_batch_without_samples_has_tokens_to_run_and_none_to_train() -> None:
    for packing in (Packing(), Packing(2), Packing(1, 2, 1), Packing(2, 2, 0)):
        batch = collate([], torch.device("cpu"), packing)
        assert batch.token_ids.numel() * packing.cp_size == packing.total_multiple == int(batch.cu_seqlens[-1])
        per_token = (batch.logit_positions, batch.target_ids, batch.is_terminal())
        assert [len(values) for values in per_token] == [0, 0, 0] and batch.num_response_tokens == 0


def test_only_a_response_that_stopped_has_a_terminal_token() -> None:
    batch = collate([sample([1], [2, 3]), sample([1], [4, 5], "length"), sample([1], [6])], torch.device("cpu"))
    assert batch.is_terminal().tolist() == [False, True, False, False, True]


def test_a_token_is_traced_back_to_its_sample() -> None:
    first, second = sample([1], [2, 3]), sample([1], [4])
    batch = collate([first, second], torch.device("cpu"))
    assert batch.sample_of(1) is first
    assert batch.sample_of(2) is second


def test_no_sample_is_lost_or_repeated_when_micro_batches_are_cut() -> None:
    samples = [sample([1] * 3, [2] * n) for n in (1, 9, 2, 2, 30, 1)]
    for packing in (Packing(), Packing(1, 2)):
        batches = list(split_into_micro_batches(samples, 24, packing))
        assert [s for batch in batches for s in batch] == samples
        for batch in batches:
            assert len(batch) == 1 or int(collate(batch, torch.device("cpu"), packing).cu_seqlens[-1]) <= 24


def test_each_sample_is_with_its_teacher_in_the_recipes_order() -> None:
    samples = [replace(sample([1], [i]), prompt=Prompt("p", (1,), {}, name)) for i, name in enumerate("abacb")]
    groups = {name: [one.response_ids[0] for one in group] for name, group in group_by_teacher(samples, "cbad")}
    assert list(groups.items()) == [("c", [3]), ("b", [1, 4]), ("a", [0, 2]), ("d", [])]


@pytest.mark.parametrize("last_batch", ["drop", "keep"])
def test_an_epoch_uses_every_prompt_at_most_once_and_keep_uses_them_all(last_batch: str) -> None:
    cursor = PromptCursor(10, 4, seed=3, last_batch=last_batch)
    epoch = [i for iteration in range(cursor.batches_per_epoch) for i in cursor.indices(iteration)]
    assert len(set(epoch)) == len(epoch) == (10 if last_batch == "keep" else 8)
    assert [cursor.size(i) for i in range(cursor.batches_per_epoch)] == ([4, 4, 2] if last_batch == "keep" else [4, 4])


def test_each_epoch_has_another_order_and_a_repeated_iteration_the_same() -> None:
    cursor = PromptCursor(64, 64, seed=0)
    assert cursor.indices(0) != cursor.indices(1)
    assert cursor.indices(1) == PromptCursor(64, 64, seed=0).indices(1)
    assert cursor.indices(0) != PromptCursor(64, 64, seed=1).indices(0)


def test_too_few_prompts_for_one_batch_name_the_keys_to_change() -> None:
    with pytest.raises(RecipeError, match=r"train.prompts_per_iteration=128.*the 5 prompts.*data.last_batch=keep"):
        PromptCursor(5, 128, seed=0)


def test_random_numbers_belong_to_their_key_and_not_to_the_order_of_draws() -> None:
    first = seeded_uniforms(4, 0, "rollout", 7, 3)
    seeded_uniforms(9, 0, "rollout", 7, 4)
    assert torch.equal(first, seeded_uniforms(4, 0, "rollout", 7, 3))
    assert torch.equal(first, seeded_uniforms(8, 0, "rollout", 7, 3)[:4])
    assert not torch.equal(first, seeded_uniforms(4, 0, "rollout", 73, ""))


class Words:
    """A tokenizer with one id per word."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert add_special_tokens  # a text gets the BOS of its tokenizer; only a chat template writes its own
        return [len(word) for word in text.split()]


TWO: dict[str, Any] = {
    "template": "raw",
    "suffix": "",
    "field": "problem",
    "max_tokens": 4,
    "teachers": ["math", "code"],
}


def test_each_prompt_goes_to_the_teacher_that_its_problem_names() -> None:
    problems = [{"problem": "a", "for": "code"}, {"problem": "b", "for": "math"}]
    prompts, _ = PromptBuilder(Words(), **TWO, teacher_field="for").build(problems, "x.jsonl")
    assert [prompt.teacher for prompt in prompts] == ["code", "math"]
    lone = PromptBuilder(Words(), **{**TWO, "teachers": ["math"]})
    assert [prompt.teacher for prompt in lone.build(problems, "x.jsonl")[0]] == ["math", "math"]


@pytest.mark.parametrize(
    ("problem", "fault"),
    [
        ({"problem": "a", "teacher": "art"}, "'teacher' is 'art'"),
        ({"problem": "a", "teacher": ["math"]}, "'teacher' is ['math']"),
        ({"problem": "a", "teacher": None}, "'teacher' is None"),
        ({"problem": "a"}, "there is no 'teacher' (data.teacher_field)"),
    ],
)
def test_a_prompt_for_nobody_is_named_before_the_run_begins(problem: dict[str, Any], fault: str) -> None:
    builder = PromptBuilder(Words(), **TWO)
    with pytest.raises(UserError) as caught:
        builder.build([{"problem": "a", "teacher": "math"}, problem], "x.jsonl")
    assert str(caught.value) == f"x.jsonl, record 2: {fault}; the recipe's teachers are math, code"


def test_a_prompt_ends_with_the_end_that_its_tokenizer_appends() -> None:
    """As LlamaTokenizer and Qwen2Tokenizer do with add_eos_token."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/countdown/student")
    builder = PromptBuilder(tokenizer, template="raw", suffix="", field="problem", max_tokens=99)
    plain, end = builder.token_ids("1 + 2"), tokenizer.eos_token
    assert builder.token_ids(f"1 + 2{end}") == [*plain, tokenizer.eos_token_id]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer.encode("1 + 2") == [*plain, tokenizer.eos_token_id]
    assert builder.token_ids("1 + 2") == plain


def test_a_missing_prompt_field_and_prompts_that_are_too_long_are_told() -> None:
    builder = PromptBuilder(Words(), template="raw", suffix="be brief", field="problem", max_tokens=4)
    prompts, dropped = builder.build([{"problem": "a bb"}, {"problem": "a b c"}], "x.jsonl")
    assert [p.token_ids for p in prompts] == [(1, 2, 2, 5)]
    assert dropped == 1
    with pytest.raises(UserError, match=r"x.jsonl, record 1: no text under 'problem'; its keys are question"):
        builder.build([{"question": "a"}], "x.jsonl")
    with pytest.raises(UserError, match="every prompt is longer"):
        builder.build([{"problem": "a b c d e"}], "x.jsonl")
    with pytest.raises(RecipeError, match=r"no chat template; use data\.template=base or raw"):
        PromptBuilder(Words(), template="chat", suffix="", field="problem", max_tokens=4)
