"""What the ranks do with the responses that servers wrote."""

from types import SimpleNamespace

import pytest

from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.rollout.interface import GenerationRequest
from eaopd_megatron.rollout.sglang.served_rollout import ServedRollout, _PendingRollout


@pytest.mark.parametrize(("vocab_size", "masked_ids"), [(250, ()), (300, (7, 250))])
def test_an_id_that_a_teacher_lacks_reaches_the_trainer(vocab_size: int, masked_ids: tuple[int, ...]) -> None:
    """Servers sample from all of the student's rows, and ids that `tokenizer_check=shared` masks among them."""
    prompts = [Prompt(str(i), (1,), {}) for i in range(2)]
    written = [Sample(prompt, [3, 250 - i, 4], "stop", [0.0] * 3, 0, i) for i, prompt in enumerate(prompts)]
    rollout = object.__new__(ServedRollout)  # of its parts none but these is asked
    rollout._context = SimpleNamespace(masked_ids=masked_ids, vocab_size=vocab_size, batch_tokens=1)  # type: ignore[assignment]
    rollout._parallel = SimpleNamespace(dp_size=1)  # type: ignore[assignment]
    rollout._pending = None
    rollout._receive = lambda events: iter([written])  # type: ignore[method-assign]
    (found,) = rollout.collect(
        _PendingRollout(GenerationRequest(prompts, [(0,), (1,)], [0, 1], SamplingParams(1.0, 1.0, 3, ())))
    )
    assert [sample.response_ids for sample in found] == [[3], [3, 249, 4]]
    assert [sample.finish_reason for sample in found] == ["length", "stop"]
