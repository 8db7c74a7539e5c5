"""What must hold of the linear form on several ranks; `test_objective_ranks.py` runs it on 2 and on 4."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from eaopd_megatron.objective import (
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    entropy_aware_loss,
    linear_entropy_aware_loss,
    linear_token_statistics,
)
from tests.distributed.objective.cases import LAYOUTS, TOP_K, assert_near
from tests.distributed.objective.checks_ranks import DTYPES, at, counted, variants
from tests.distributed.objective.linear_cases import (
    compare_linear,
    linear_oracle,
    make_linear_case,
    rows_of,
    run_linear,
    small_tiles,
)

SIGNALS = ("hidden", "topk")
MODES = ("all_reduce", "partial")
OBJECTIVES = {name: Objective.preset(name, top_k=TOP_K) for name in Objective.PRESETS} | {
    "topk_tail": Objective(forward_kl="topk_tail", top_k=TOP_K)
}


def check_linear_presets(group: ProcessGroup, signal: str, dtype: str) -> None:
    """Values and both gradients against the oracle for every layout, with and without old log-probs."""
    for layout in LAYOUTS:
        linear = make_linear_case(ranks=group.size(), layout=layout, dtype=DTYPES[dtype])
        for (name, objective), (mode, old) in product(OBJECTIVES.items(), (("all_reduce", True), ("partial", False))):
            if objective.refusal(signal) is not None:  # type: ignore[arg-type]
                continue
            # Products of bf16 are bf16 on a CPU, so that every block adds a rounding error.
            tile = 1 << 17 if dtype == "bf16" else 40
            arguments: dict[str, Any] = {"hidden_grad": mode, "old": old, "tile": tile}
            try:
                want = compare_linear(linear, at(objective, linear.case), signal, group, **arguments)
            except AssertionError as error:
                raise AssertionError(f"{name}, {layout}, {mode}: {error}") from error
            assert name == "fkl" or 0 < want.gate.sum() < len(want.gate)
            assert name != "eopd" or not old or 0 < want.clipped.sum() < len(want.clipped)


def check_linear_variants(group: ProcessGroup, signal: str) -> None:
    """Every other combination, too, where a rank has no valid row of the head."""
    linear = make_linear_case(ranks=group.size(), layout="empty_rank", seed=1)
    for objective in variants("logits" if signal == "hidden" else signal):
        try:
            compare_linear(linear, at(objective, linear.case), signal, group)
        except AssertionError as error:
            raise AssertionError(f"{objective}: {error}") from error


def check_linear_parts_sum_to_the_whole(group: ProcessGroup) -> None:
    """What a caller's reduce-scatter makes of the parts is the gradient that "all_reduce" gives; twice it would be
    too large by the number of ranks."""
    linear = make_linear_case(ranks=group.size())
    for signal in SIGNALS:
        whole = run_linear(linear, at(OBJECTIVES["topk_tail"], linear.case), signal, group)
        part = run_linear(linear, at(OBJECTIVES["topk_tail"], linear.case), signal, group, hidden_grad="partial")
        assert torch.equal(whole.head, part.head) and not torch.equal(whole.hidden, part.hidden)
        dist.all_reduce(part.hidden, group=group)
        assert torch.equal(whole.hidden, part.hidden)


def check_linear_rounds_the_gradient_once_after_the_sum_over_ranks(group: ProcessGroup) -> None:
    """The ranks' parts cancel: rounded to bf16 before they are summed, they would leave their rounding behind.

    The student is uniform over 16 ids, so that every product is exact in bf16, and the first rank's sum of them is not.
    """
    hidden = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    head = torch.full((16, 1), 1.0078125, dtype=torch.bfloat16)
    head[0] = 1
    teacher = TeacherTopK(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
    with small_tiles(1):
        out = linear_entropy_aware_loss(
            hidden,
            rows_of(head, group),
            teacher,
            torch.zeros(2, dtype=torch.int64),
            None,
            objective=Objective(reverse_kl="none", gate="always", top_k=1),
            vocab_size=16,
            group=group,
        )
        out.loss.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [15 / 16 * 1.0078125 - 15 / 16] * 2, hidden.grad


def check_linear_equals_the_loss_of_stored_logits(group: ProcessGroup) -> None:
    """Random bf16 factors, whose stored logits are fp32, and the terminal map "label"; also a gate made from bounds."""
    for dtype, old in (("fp64", True), ("bf16", False)):
        linear = make_linear_case(ranks=group.size(), dtype=torch.float64, n=48)
        case, (exact, tolerance) = linear.case, {"fp64": (1e-11, 1e-11), "bf16": (3e-5, 1e-2)}[dtype]
        wide = torch.promote_types(DTYPES[dtype], torch.float32)
        hidden, teacher_hidden = (x.to(DTYPES[dtype]) for x in (linear.hidden, linear.teacher_hidden))
        head, teacher_head = (rows_of(x, group).to(DTYPES[dtype]) for x in (linear.head, linear.teacher_head))
        unknown = case.top_k(torch.float64, entropy=False)
        old_logprobs = case.old_logprobs if old else None
        for objective, by_hidden in product(OBJECTIVES.values(), (True, False)):
            if objective.refusal("hidden" if by_hidden else "topk") is not None:
                continue
            arguments: dict[str, Any] = {
                "teacher_tokens": case.teacher_tokens,
                "objective": at(objective, case),
                "vocab_size": case.vocab_size,
                "group": group,
                "chunk": 20,
            }
            # NaN in the padding would spread in the backward of the stored logits' product.
            heads = head.nan_to_num(nan=0), head.clone()
            leaves = [(hidden.clone().requires_grad_(), rows.requires_grad_()) for rows in heads]
            logits = leaves[0][0].to(wide) @ leaves[0][1].to(wide).T
            stored = entropy_aware_loss(
                logits,
                TeacherLogits(teacher_hidden.to(wide) @ teacher_head.to(wide).T) if by_hidden else unknown,
                case.tokens,
                old_logprobs,
                **arguments,
            )
            with small_tiles():
                out = linear_entropy_aware_loss(
                    *leaves[1],
                    TeacherHidden(teacher_hidden, teacher_head) if by_hidden else unknown,
                    case.tokens,
                    old_logprobs,
                    hidden_grad="partial",
                    **arguments,
                )
                for loss in (stored.loss, out.loss):
                    loss.backward(case.upstream.to(loss.dtype))
            for name, value in vars(stored).items():
                assert_near(name, getattr(out, name), value, exact)
            for name, want, got in zip(("hidden", "head"), *leaves, strict=True):
                assert want.grad is not None and got.grad is not None
                assert_near(f"gradient of {name}", got.grad, want.grad.double(), tolerance)


def check_linear_few_collectives(group: ProcessGroup) -> None:
    """One forward and one or none backward, whatever the chunks; every rank enters also without tokens."""
    linear = make_linear_case(ranks=group.size())
    case, whole = linear.case, linear.case.top_k(torch.float64)
    for n, chunk, signal, mode, frozen in product((24, 1, 0), (1, 5, None), SIGNALS, MODES, (False, True)):
        hidden = linear.hidden[:n].clone().requires_grad_(not frozen)
        head = rows_of(linear.head, group).requires_grad_()
        teacher: TeacherHidden | TeacherTopK = TeacherTopK(whole.ids[:n], whole.logprobs[:n], whole.token_logprob[:n])
        if signal == "hidden":
            teacher = TeacherHidden(linear.teacher_hidden[:n], rows_of(linear.teacher_head, group))
        with counted() as calls, small_tiles():
            out = linear_entropy_aware_loss(
                hidden,
                head,
                teacher,
                case.tokens[:n],
                None,
                objective=at(OBJECTIVES["topk_tail" if chunk == 5 else "eopd"], case),
                vocab_size=case.vocab_size,
                group=group,
                chunk=chunk,
                hidden_grad=mode,  # type: ignore[arg-type]
            )
            assert calls == ["all_gather"], f"{calls} forward with {n} tokens, chunk {chunk}"
            calls.clear()
            out.loss.sum().backward()
            wanted = ["all_reduce"] if mode == "all_reduce" and not frozen else []
            assert calls == wanted, f"{calls} backward with {n} tokens, {mode}"
        assert head.grad is not None and head.grad.shape == head.shape
        assert (hidden.grad is None) == frozen
        if n == 0:
            assert out.loss.shape == (0,) and not head.grad.any()


def check_linear_tiles_change_nothing(group: ProcessGroup) -> None:
    for signal in SIGNALS:
        linear = make_linear_case(ranks=group.size())
        objective = at(OBJECTIVES["topk_tail"], linear.case)
        first = run_linear(linear, objective, signal, group, chunk=None, tile=1 << 17)
        for chunk, tile in ((1, 5), (5, 40), (23, 100), (100, 24), (None, 1)):
            other = run_linear(linear, objective, signal, group, chunk=chunk, tile=tile)
            for name, value in vars(first.out).items():
                assert_near(name, getattr(other.out, name), value, 1e-12)
            assert_near("gradient of hidden", other.hidden, first.hidden, 1e-12)
            assert_near("gradient of the head", other.head, first.head, 1e-12)


def check_linear_results_agree_on_all_ranks(group: ProcessGroup) -> None:
    """The same bits: a gate that opens on one rank only would mix two objectives."""
    for signal in SIGNALS:
        linear = make_linear_case(ranks=group.size(), layout="empty_rank", dtype=torch.float32)
        got = run_linear(linear, at(OBJECTIVES["topk_tail"], linear.case), signal, group)
        for value in (*vars(got.out).values(), got.hidden):
            mine = value.detach().to(torch.float64)
            theirs = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(theirs, mine, group=group)
            assert all(torch.equal(other, mine) for other in theirs)


def check_linear_token_statistics(group: ProcessGroup) -> None:
    """The log-probs that become pi_old have the bits of the loss's own, so that the first ratio is exactly 1."""
    for dtype in DTYPES.values():
        linear = make_linear_case(ranks=group.size(), dtype=dtype)
        case, head = linear.case, rows_of(linear.head, group)
        with small_tiles(), counted() as calls:
            got = linear_token_statistics(
                linear.hidden, head, case.tokens, vocab_size=case.vocab_size, group=group, chunk=7
            )
            assert calls == ["all_gather"]
        out = run_linear(linear, Objective(top_k=TOP_K), "topk", group).out
        assert torch.equal(got.logprob, out.student_logprob) and torch.equal(got.entropy, out.student_entropy)
        want, *_ = linear_oracle(linear, Objective(top_k=TOP_K), "topk", group)
        assert_near("logprob", got.logprob, want.student_logprob, 1e-6)
        assert_near("entropy", got.entropy, want.student_entropy, 1e-5)


def check_linear_bad_heads_are_refused_by_all_ranks(group: ProcessGroup) -> None:
    """A rank that raised alone would leave the others in a collective; here only one rank's rows are bad."""
    names = ("student_hidden · student_head_weight", "teacher.hidden · teacher.head_weight")
    for name, rank, value in product(names, range(group.size()), (torch.nan, torch.inf, -torch.inf)):
        linear = make_linear_case(ranks=group.size(), layout="even", dtype=torch.float32)
        head, teacher_head = rows_of(linear.head, group), rows_of(linear.teacher_head, group)
        if group.rank() == rank:
            (head if name == names[0] else teacher_head)[3, 0] = value
        message = "nothing was refused"
        try:
            linear_entropy_aware_loss(
                linear.hidden,
                head,
                TeacherHidden(linear.teacher_hidden, teacher_head),
                linear.case.tokens,
                None,
                objective=Objective(top_k=TOP_K),
                vocab_size=linear.case.vocab_size,
                group=group,
            )
        except ValueError as error:
            message = str(error)
        messages: list[str | None] = [None] * group.size()
        dist.all_gather_object(messages, message, group=group)
        assert all(text is not None and f"{name}: row 0 holds NaN" in text for text in messages), messages
