"""The data of one iteration: prompts, the student's responses, and the micro-batches packed from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from eaopd_megatron.objective import TeacherTopK


@dataclass(frozen=True)
class Prompt:
    """A problem and its token ids. The template is applied once: student and teacher read the same ids."""

    id: str
    token_ids: tuple[int, ...]
    problem: dict[str, Any]
    teacher: str = ""  # name of the teacher of this prompt, if the recipe has several


@dataclass(frozen=True)
class Sample:
    """One response of the student. Log-probs are in nats, one per response token.

    rollout_logprobs come from the engine that sampled the tokens; they serve the mismatch metric and the importance
    weights of stale samples. π_old is `old_logprobs`, recomputed by the trainer.
    """

    prompt: Prompt
    response_ids: list[int]
    finish_reason: str  # "stop" | "length"
    rollout_logprobs: list[float]
    weight_version: int  # the oldest, if several versions sampled
    index: int = 0  # index of the prompt in the iteration, over all data-parallel ranks
    teacher: str = ""  # path or hub id of the teacher's model
    old_logprobs: torch.Tensor | None = None
    teacher_top_k: TeacherTopK | None = None  # if the teacher scored the sample before the update
    weight_versions: Sequence[tuple[int, int, int]] = ()  # (version, start, end) over response tokens; (): one for all
    stale: bool = False  # sampled with older weights than those of π_old
    foreign_tokens: int = 0  # removed from the end of the response by `truncated_to_vocab`

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt.token_ids, *self.response_ids]

    def truncated_to_vocab(self, vocab_size: int, masked_ids: Collection[int] = ()) -> Sample:
        """Return the response up to the first id that is not below vocab_size, or masked; it ends with "length" there.

        Servers sample from all of the student's rows. Rows that a teacher lacks belong to no token of the tokenizer,
        and their probability is negligible.
        """
        end = next((i for i, token in enumerate(self.response_ids) if token >= vocab_size or token in masked_ids), None)
        if end is None:
            return self
        return replace(
            self,
            response_ids=self.response_ids[:end],
            rollout_logprobs=self.rollout_logprobs[:end],
            finish_reason="length",
            weight_versions=[(v, start, min(stop, end)) for v, start, stop in self.weight_versions if start < end],
            foreign_tokens=len(self.response_ids) - end,
        )

    def record(self, text: str) -> dict[str, Any]:
        """Return the sample as JSON, for the run's rollouts folder and for failure records."""
        return {
            "prompt_id": self.prompt.id,
            "prompt_ids": list(self.prompt.token_ids),
            "response_ids": self.response_ids,
            "finish_reason": self.finish_reason,
            "rollout_logprobs": self.rollout_logprobs,
            "old_logprobs": None if self.old_logprobs is None else self.old_logprobs.tolist(),
            "weight_version": self.weight_version,
            "weight_versions": [list(span) for span in self.weight_versions],
            "teacher": self.teacher,
            "text": text,
        }


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. Training needs temperature 1 and top_p 1: the objective is defined on the student's own
    policy."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the form in an evaluation's settings file, whose key `stop_ids` is older than the field's name."""
        values = dict(vars(self))
        stop_ids = values.pop("stop_token_ids")  # not inside the display, which copies `values` first
        return {**values, "stop_ids": stop_ids}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        options = dict(values)
        stop_ids = tuple(options.pop("stop_ids"))
        return cls(**options, stop_token_ids=stop_ids)


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass, packed: this context-parallel rank's T of their tokens.

    token_ids, positions  [1, T]
    cu_seqlens            [b + 1] int32: 0 and the end of each sequence among the tokens of all context-parallel ranks,
                          alignment included; max_seqlen is the length of the longest
    logit_positions       [n]: index into T of the position *before* each response token, where its logits are
    target_ids            [n]: the response tokens, sample after sample
    cp_local_indices      [n]: which of the samples' response tokens these are; None: all of them
    teacher               name of the one teacher of all samples
    """

    samples: list[Sample]
    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    logit_positions: torch.Tensor
    target_ids: torch.Tensor
    cp_local_indices: torch.Tensor | None = None
    teacher: str = ""

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of the samples, over all context-parallel ranks."""
        return sum(len(s.response_ids) for s in self.samples)

    def split_by_sample(self, per_token: torch.Tensor) -> list[torch.Tensor]:
        """Split values of all response tokens [num_response_tokens, ...] into one tensor per sample."""
        return list(per_token.split([len(s.response_ids) for s in self.samples]))

    def gather_local(self, per_sample: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join one tensor per sample into [n, ...], this rank's tokens, on the micro-batch's device."""
        return self._local(torch.cat(list(per_sample)).to(self.target_ids.device))

    def rollout_logprobs(self) -> torch.Tensor:
        """Return the rollout engine's log-probs [n]."""
        return self.gather_local([torch.tensor(s.rollout_logprobs) for s in self.samples])

    def sample_of(self, token: int) -> Sample:
        """Return the sample that holds number `token` of this rank's n response tokens."""
        if self.cp_local_indices is not None:
            token = int(self.cp_local_indices[token])
        for sample in self.samples:
            if token < len(sample.response_ids):
                return sample
            token -= len(sample.response_ids)
        raise IndexError(token)

    def is_terminal(self) -> torch.Tensor:
        """Return [n] bool: the last token of a response that ended by itself."""
        flags = [torch.zeros(0, dtype=torch.bool)] + [
            torch.arange(len(s.response_ids)) == (len(s.response_ids) - 1 if s.finish_reason == "stop" else -1)
            for s in self.samples
        ]
        return self._local(torch.cat(flags).to(self.target_ids.device))

    def _local(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.cp_local_indices is None else values[self.cp_local_indices]
