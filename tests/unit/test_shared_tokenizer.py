"""A teacher whose tokenizer differs by added or special tokens alone: their ids are left out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from eaopd_megatron.checkpoint.convert import single_process_group
from eaopd_megatron.checkpoint.hf_folder import HfFolder, check_same_tokenizer
from eaopd_megatron.config.model_schema import TeacherConfig
from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.objective import Objective, TeacherHidden, TeacherTopK, linear_entropy_aware_loss
from eaopd_megatron.rollout.local import LocalRollout
from eaopd_megatron.teacher.answer_checks import find_contradiction
from eaopd_megatron.teacher.colocated import top_k_of_hidden
from eaopd_megatron.teacher.eos_map import TerminalMap, mask_head, mask_hidden
from eaopd_megatron.teacher.protocol import TeacherInfo
from eaopd_megatron.teacher.served import ServedBackend

ROOT = Path(__file__).resolve().parents[2]
MASKED = [3, 11]


def folder(tmp_path: Path, name: str, edit: dict[str, str] | None = None) -> HfFolder:
    """The Countdown student with other texts of some tokens."""
    shutil.copytree(ROOT / "recipes/countdown/student", tmp_path / name)
    path = tmp_path / name / "tokenizer.json"
    text = path.read_text()
    for old, new in (edit or {}).items():
        assert json.dumps(old) in text
        text = text.replace(json.dumps(old), json.dumps(new))
    path.write_text(text)
    return HfFolder.open(str(tmp_path / name), f"{name}.model")


def with_added_token(tmp_path: Path, name: str, added: str = "<think>") -> HfFolder:
    one = folder(tmp_path, name)
    tokenizer = one.tokenizer()
    assert tokenizer.add_tokens([added]) == 1
    tokenizer.save_pretrained(one.path)
    return HfFolder.open(str(one.path), f"{name}.model")


def terminal(student: HfFolder, teacher: HfFolder, **changes: Any) -> TerminalMap:
    return TerminalMap.of_folders(
        TeacherConfig(model="t", **{"tokenizer_check": "shared", **changes}), student, teacher
    )


def test_one_added_token_has_no_way_out(tmp_path: Path) -> None:
    student, teacher = folder(tmp_path, "student"), with_added_token(tmp_path, "teacher")
    added = teacher.tokenizer().convert_tokens_to_ids("<think>")
    with pytest.raises(UserError, match=r"'<think>' in .*; teacher\.tokenizer_check=shared allows added and special"):
        check_same_tokenizer(teacher, student)
    assert check_same_tokenizer(teacher, student, allowed="shared") == [added]
    expected = (added,) if added < student.vocab_size else ()
    assert terminal(student, teacher).masked_ids == expected
    assert terminal(teacher, student).masked_ids == expected
    assert terminal(student, student).masked_ids == ()


def test_another_text_of_an_ordinary_token_is_allowed(tmp_path: Path) -> None:
    student = folder(tmp_path, "student")
    ordinary = next(
        text
        for text, i in student.tokenizer().get_vocab().items()
        if i not in student.tokenizer().all_special_ids and text not in student.tokenizer().get_added_vocab()
    )
    teacher = folder(tmp_path, "teacher", {ordinary: "other"})
    with pytest.raises(UserError, match=r"have different tokenizers: .* 'other' in [^;]*$"):
        check_same_tokenizer(teacher, student, allowed="shared")


def test_an_end_with_another_text_is_masked(tmp_path: Path) -> None:
    """Student and teacher end with the same id under two names."""
    student = folder(tmp_path, "student")
    end = student.tokenizer().eos_token
    shutil.copytree(student.path, tmp_path / "teacher")
    for file in (tmp_path / "teacher").glob("*.json"):
        file.write_text(file.read_text().replace(json.dumps(end), json.dumps("<other end>")))
    teacher = HfFolder.open(str(tmp_path / "teacher"), "teacher.model")
    assert check_same_tokenizer(teacher, student, allowed="shared") == [student.eos_ids[0]]
    assert terminal(student, teacher).masked_ids == ()
    (tmp_path / "teacher/generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    teacher = HfFolder.open(str(tmp_path / "teacher"), "teacher.model")
    assert student.eos_ids[0] not in terminal(student, teacher).masked_ids
    with pytest.raises(UserError, match=r"with which the student ends, is another one .*terminal_map=swap"):
        terminal(student, teacher, terminal_map="none")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(5, 16),
        "head": torch.randn(20, 16),
        "student_hidden": torch.randn(5, 16),
        "student_head": torch.randn(20, 16, requires_grad=True),
        "tokens": torch.tensor([0, 1, 2, 4, 19]),
    }


def excluded(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The teacher's log-probs over the other ids, in fp64."""
    logits = tensors["hidden"].double() @ tensors["head"].double().T
    return torch.log_softmax(logits.index_fill(1, torch.tensor(MASKED), -torch.inf), -1)


def test_masked_ids_have_probability_in_the_top_k(tensors: dict[str, torch.Tensor]) -> None:
    with single_process_group() as parallel:
        top = top_k_of_hidden(
            *(tensors["hidden"], tensors["head"], tensors["tokens"], None),
            top_k=18,
            vocab_size=20,
            group=parallel.tp_group,
            masked_ids=MASKED,
        )
    expected = excluded(tensors)
    assert not torch.isin(top.ids, torch.tensor(MASKED)).any()
    torch.testing.assert_close(top.logprobs.double(), expected.gather(1, top.ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        top.token_logprob.double(), expected.gather(1, tensors["tokens"][:, None])[:, 0], atol=1e-5, rtol=0
    )
    assert top.entropy is not None
    entropy = -(expected.exp() * expected.nan_to_num(neginf=0)).sum(1)
    torch.testing.assert_close(top.entropy.double(), entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forward", ["exact", "topk"])
def test_masked_ids_have_probability_in_hidden_states(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, forward: Any
) -> None:
    """Loss and gradient are those of a teacher whose logits are -inf there."""
    objective = replace(Objective.preset("eopd"), forward_kl=forward, gate="always", top_k=4)
    head, hidden = tensors["head"].to(dtype), tensors["hidden"].to(dtype)
    weight = tensors["student_head"].detach().to(dtype).requires_grad_()
    loss = linear_entropy_aware_loss(
        *(tensors["student_hidden"].to(dtype), weight),
        TeacherHidden(mask_hidden(hidden, MASKED), mask_head(head, MASKED, 0)),
        *(tensors["tokens"], torch.zeros(5)),
        objective=objective,
        vocab_size=20,
    ).loss.sum()
    loss.backward()
    reference = tensors["student_head"].detach().to(dtype).double().requires_grad_()
    q = torch.log_softmax(tensors["student_hidden"].to(dtype).double() @ reference.T, -1)
    p = excluded({"hidden": hidden, "head": head})
    kept = p.topk(4).indices if forward == "topk" else torch.arange(20).expand(5, -1)
    part = p.gather(1, kept)
    part = part - part.logsumexp(1, keepdim=True)
    divergence = (part.exp() * (part.nan_to_num(neginf=0) - q.gather(1, kept))).sum(1)
    own = q.gather(1, tensors["tokens"][:, None])[:, 0]
    ratio = own.exp()  # the old log-probs are 0
    advantage = p.gather(1, tensors["tokens"][:, None])[:, 0]
    sampled = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    expected = (sampled + divergence).sum()
    expected.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(loss.double(), expected, atol=tolerance * 50, rtol=tolerance)
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    torch.testing.assert_close(weight.grad.double(), reference.grad, atol=tolerance * 10, rtol=tolerance)


def test_a_response_goes_on_behind_a_masked_id() -> None:
    sample = Sample(Prompt("p", (1, 2), {}), [4, 5, 11, 6], "stop", [-0.1] * 4, 0)
    short = sample.truncated_to_vocab(20, MASKED)
    assert (short.response_ids, short.finish_reason, short.foreign_tokens) == ([4, 5], "length", 2)


def test_an_id_behind_a_smaller_vocabulary_of_another_teacher_is_masked() -> None:
    """The rollout samples among the ids that all models have."""
    parallel: Any = SimpleNamespace(tp_size=1, pp_size=1, device=torch.device("cpu"))
    rollout = LocalRollout(cast(Any, None), parallel, vocab_size=12, batch_size=1, masked_ids=[3, 11, 15])
    logits = torch.zeros(1, 16)
    sampling = SamplingParams(1.0, 1.0, 4, (1,))
    drawn = {int(rollout._draw(logits, torch.tensor([u / 50]), sampling)[0]) for u in range(50)}
    assert drawn == {*range(12)} - {3, 11}


def test_a_replica_with_other_masks_is_taken_for_the_teacher() -> None:
    info = TeacherInfo("m", "f", "topk", 4, 8, "fp32", 20, ("none", 1, 1), 64, "", masked_ids=(3, 11))
    again = TeacherInfo.from_json(json.loads(json.dumps(info.to_json())))
    assert again == info
    assert again.terminal_map.masked_ids == (3, 11)


def test_a_served_teacher_that_favours_a_masked_id_is_refused() -> None:
    """Its log-probs are normalised over all its ids, of which masked ones are removed afterwards."""
    terminal = TerminalMap("none", 1, 1, tuple(MASKED))
    folder: Any = SimpleNamespace(vocab_size=20)
    backend = ServedBackend(folder, vocab_size=20, k=4, terminal=terminal, connections=1)
    logits = torch.zeros(1, 20)
    logits[0, MASKED[0]] = 8.0
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.index_fill(1, torch.tensor(MASKED), -torch.inf).topk(4)
    answer = TeacherTopK(ids, values, logprobs[:, 5])
    assert find_contradiction(answer, torch.tensor([5]), backend.answer_format) is None
