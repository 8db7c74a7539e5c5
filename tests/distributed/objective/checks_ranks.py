"""What must hold on several ranks; `test_objective_ranks.py` runs it on 2 and on 4."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from signal import SIGSEGV
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from eaopd_megatron.objective import (
    Objective,
    TeacherLogits,
    TeacherTopK,
    entropy_aware_loss,
    summarise_teacher,
    token_statistics,
)
from tests.distributed.objective.cases import (
    LAYOUTS,
    TOP_K,
    Case,
    assert_near,
    compare,
    make_case,
    oracle,
    run,
    shard_of,
)

SIGNALS = ("logits", "topk")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
COLLECTIVES = [
    *("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single"),
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object"),
    *("broadcast", "all_to_all", "all_to_all_single", "gather", "scatter", "barrier"),
    *("send", "recv", "isend", "irecv", "batch_isend_irecv"),
]


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the collectives that are called inside."""
    calls: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            if not hasattr(dist, name):  # a name of an older or a newer torch
                continue
            original = getattr(dist, name)

            def call(*args: object, _name: str = name, _original: object = original, **kwargs: object) -> object:
                calls.append(_name)
                return _original(*args, **kwargs)  # type: ignore[operator]

            stack.enter_context(mock.patch.object(dist, name, call))
        yield calls


def variants(signal: str) -> list[Objective]:
    """Every combination of terms and gate that the signal can serve."""
    reverse = ("sampled", "exact", "none") if signal == "logits" else ("sampled", "none")
    forward = ("topk", "topk_tail", "exact", "none") if signal == "logits" else ("topk", "topk_tail", "none")
    return [
        Objective.preset(
            "eopd", reverse_kl=r, forward_kl=f, gate=g, top_k=TOP_K, forward_weight=1.3, reverse_weight=0.7
        )
        for r, f, g in product(reverse, forward, ("hard", "soft", "always", "never"))
    ]


def at(objective: Objective, case: Case) -> Objective:
    """The objective with a threshold that divides the case's rows."""
    return Objective(**{**vars(objective), "threshold": case.threshold()})


def check_preset(group: ProcessGroup, preset: str, signal: str, dtype: str) -> None:
    """Values and gradients against the oracle for every layout, with and without old log-probs."""
    for layout, old in product(LAYOUTS, (True, False)):
        case = make_case(ranks=group.size(), layout=layout, dtype=DTYPES[dtype])
        want = compare(case, at(Objective.preset(preset, top_k=TOP_K), case), signal, group, old=old)
        assert 0 < want.gate.sum() < len(want.gate)
        if preset == "eopd" and old:
            assert 0 < want.clipped.sum() < len(want.clipped)


def check_variants(group: ProcessGroup, signal: str, dtype: str) -> None:
    """Every other combination, too, where a rank has no valid column."""
    case = make_case(ranks=group.size(), layout="empty_rank", dtype=DTYPES[dtype], seed=1)
    for objective in variants(signal):
        try:
            compare(case, at(objective, case), signal, group)
        except AssertionError as error:
            raise AssertionError(f"{objective}: {error}") from error


def check_gate_from_bounds(group: ProcessGroup) -> None:
    """Without the teacher's entropy the gate is the lower bound's, and rows that the bounds leave open are counted."""
    case = make_case(ranks=group.size(), layout="padded", n=60)
    unknown = case.top_k(torch.float64, entropy=False)
    want = compare(case, at(Objective(top_k=TOP_K), case), "topk", group, teacher=unknown)
    assert 0 < want.gate_ambiguous.sum() < len(want.gate_ambiguous)


def check_few_collectives(group: ProcessGroup) -> None:
    """At most two collectives forward and none backward, whatever the chunk; every rank enters also without tokens."""
    for n, chunk, signal in product((24, 1, 0), (1, 5, None), SIGNALS):
        case = make_case(ranks=group.size(), n=24)
        for objective in variants(signal) if (n, chunk) == (24, 5) else (Objective(top_k=TOP_K),):
            student = shard_of(case.student, group)[:n].requires_grad_()
            teacher: TeacherLogits | TeacherTopK
            if signal == "logits":
                teacher = TeacherLogits(shard_of(case.teacher, group)[:n])
            else:
                whole = case.top_k(torch.float64)
                teacher = TeacherTopK(whole.ids[:n], whole.logprobs[:n], whole.token_logprob[:n])
            with counted() as calls:
                out = entropy_aware_loss(
                    student,
                    teacher,
                    case.tokens[:n],
                    None,
                    objective=objective,
                    vocab_size=case.vocab_size,
                    group=group,
                    chunk=chunk,
                )
                assert 1 <= len(calls) <= 2, f"{calls} forward for {objective}, {n} tokens, chunk {chunk}"
                calls.clear()
                out.loss.sum().backward()
                assert not calls, f"{calls} backward for {objective}"
            assert student.grad is not None and student.grad.shape == student.shape
            if n == 0:
                assert out.loss.shape == (0,)
    with counted() as calls:
        logits = shard_of(case.teacher, group)
        summarise_teacher(logits, case.tokens, k=TOP_K, vocab_size=case.vocab_size, group=group)
        assert len(calls) <= 2, f"{calls} in summarise_teacher"
        calls.clear()
        token_statistics(logits, case.tokens, vocab_size=case.vocab_size, group=group)
        assert len(calls) <= 2, f"{calls} in token_statistics"


def check_same_bits_on_all_ranks(group: ProcessGroup) -> None:
    """A gate, or a top-k set, that differs between ranks would give a gradient of no objective."""
    for dtype, signal in product((torch.float32, torch.bfloat16), SIGNALS):
        case = make_case(ranks=group.size(), dtype=dtype)
        out, _ = run(case, at(Objective(gate="soft", top_k=TOP_K), case), signal, group)
        teacher = summarise_teacher(
            shard_of(case.teacher, group), case.tokens, k=TOP_K, vocab_size=case.vocab_size, group=group
        )
        for value in (*vars(out).values(), *vars(teacher).values()):
            mine = value.detach().to(torch.float64)
            theirs = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(theirs, mine, group=group)
            assert all(torch.equal(other, mine) for other in theirs)


def check_chunks_change_no_bit(group: ProcessGroup) -> None:
    for dtype, signal in product((torch.float32, torch.bfloat16), SIGNALS):
        case = make_case(ranks=group.size(), dtype=dtype)
        for objective in (Objective(top_k=TOP_K), Objective(forward_kl="topk_tail", top_k=TOP_K, gate="soft")):
            first, gradient = run(case, objective, signal, group, chunk=None)
            for chunk in (1, 2, 5, 23, 100):
                out, other = run(case, objective, signal, group, chunk=chunk)
                assert torch.equal(gradient, other)
                for name, value in vars(first).items():
                    assert torch.equal(value, getattr(out, name)), f"{name} with chunk {chunk}"


def check_top_k_settles_ties_by_id(group: ProcessGroup) -> None:
    """bf16 logits tie often; the set must not depend on the layout. Also where a rank owns fewer than k columns."""
    for layout, k, levels in product(LAYOUTS, (1, TOP_K, 13, 1000), (3, 200)):
        case = make_case(ranks=group.size(), layout=layout, n=40)
        logits = torch.randint(0, levels, case.teacher.shape, generator=torch.Generator().manual_seed(k)).bfloat16()
        got = summarise_teacher(shard_of(logits, group), case.tokens, k=k, vocab_size=case.vocab_size, group=group)
        whole = logits[:, : case.vocab_size].double()
        ids = whole.sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(got.ids, ids), f"{layout}, k={k}"
        log_p = whole.log_softmax(1)
        assert_near("logprobs", got.logprobs, log_p.gather(1, ids), 1e-6)
        assert_near("token_logprob", got.token_logprob, log_p.gather(1, case.tokens[:, None])[:, 0], 1e-6)
        assert got.entropy is not None
        assert_near("entropy", got.entropy, -(log_p.exp() * log_p).sum(1), 1e-6)


def check_summary_serves_the_loss(group: ProcessGroup) -> None:
    """The way of the trainer: the teacher's logits are summarised once, and the loss sees the summary."""
    case = make_case(ranks=group.size(), dtype=torch.float32)
    teacher = summarise_teacher(
        shard_of(case.teacher, group),
        case.tokens,
        k=TOP_K,
        vocab_size=case.vocab_size,
        group=group,
        teacher_tokens=case.teacher_tokens,
    )
    objective = at(Objective(top_k=TOP_K), case)
    out, gradient = run(case, objective, "topk", group, teacher=teacher)
    direct, other = run(case, objective, "logits", group)
    assert_near("loss", out.loss, direct.loss.double(), 3e-5)
    assert_near("gradient", gradient, other.double(), 3e-5)


def check_token_statistics(group: ProcessGroup) -> None:
    """The log-probs that become pi_old have the bits of the loss's own, so that the first ratio is exactly 1."""
    for dtype, signal in product(DTYPES.values(), SIGNALS):
        case = make_case(ranks=group.size(), dtype=dtype)
        got = token_statistics(
            shard_of(case.student, group), case.tokens, vocab_size=case.vocab_size, group=group, chunk=3
        )
        out, _ = run(case, Objective(top_k=TOP_K), signal, group)
        assert torch.equal(got.logprob, out.student_logprob) and torch.equal(got.entropy, out.student_entropy)
        want, _ = oracle(case, Objective(top_k=TOP_K), signal)
        assert_near("logprob", got.logprob, want.student_logprob, 1e-6)
        assert_near("entropy", got.entropy, want.student_entropy, 1e-5)


def check_bad_input_is_refused_by_all_ranks(group: ProcessGroup) -> None:
    """A rank that raised alone would leave the others in a collective; here only one rank's shard is bad."""
    for name, rank in product(("student_logits", "teacher.logits"), range(group.size())):
        case = make_case(ranks=group.size(), layout="even", dtype=torch.float32)
        student, teacher = shard_of(case.student, group), shard_of(case.teacher, group)
        if group.rank() == rank:
            (student if name == "student_logits" else teacher)[5, 3] = torch.nan if rank % 2 else torch.inf
        message = "nothing was refused"
        try:
            entropy_aware_loss(
                student,
                TeacherLogits(teacher),
                case.tokens,
                None,
                objective=Objective(top_k=TOP_K),
                vocab_size=case.vocab_size,
                group=group,
            )
        except ValueError as error:
            message = str(error)
        messages: list[str | None] = [None] * group.size()
        dist.all_gather_object(messages, message, group=group)
        assert all(text is not None and f"{name}: row 5 holds NaN" in text for text in messages), messages


def check_masked_logits(group: ProcessGroup) -> None:
    """-inf among the logits, here all of one rank's: 0 · inf counts as 0, in the sums and in the gradient."""
    case = make_case(ranks=group.size(), layout="even")
    columns = case.student.shape[1] // group.size()
    case.teacher[:, :columns] = -torch.inf
    case.teacher[:, -2:] = -torch.inf
    case.tokens[case.tokens < columns] = columns
    case.teacher_tokens[:] = case.tokens
    case.tokens[case.tokens >= case.vocab_size - 2] = columns
    case.teacher_tokens[:] = case.tokens
    objective = Objective(reverse_kl="sampled", forward_kl="exact", top_k=TOP_K, gate="always")
    out, gradient = run(case, objective, "logits", group)
    want, dense_gradient = oracle(case, objective, "logits")
    for name in ("loss", "forward_kl", "teacher_entropy", "student_entropy"):
        assert_near(name, getattr(out, name), getattr(want, name), 1e-11)
    assert_near("gradient", gradient, dense_gradient.chunk(group.size(), dim=1)[group.rank()], 1e-11)
    # The student's support inside the teacher's: the exact reverse term is finite.
    case.student[:, :columns] = -torch.inf
    case.student[:, -3:] = -torch.inf
    case.tokens[case.tokens >= case.vocab_size - 3] = columns
    case.teacher_tokens[:] = case.tokens
    out, gradient = run(case, Objective.preset("rkl"), "logits", group)
    assert out.loss.isfinite().all() and gradient.isfinite().all()
    inside = slice(columns, case.vocab_size - 3)
    small = Case(
        case.vocab_size - 3 - columns,
        case.student[:, inside],
        case.teacher[:, columns : case.vocab_size - 2],
        case.tokens - columns,
        case.tokens - columns,
        case.old_logprobs,
        case.upstream,
    )
    student = small.student.clone().requires_grad_()
    log_q, log_p = student.log_softmax(1), case.teacher.double().log_softmax(1)[:, inside]
    loss = (log_q.exp() * (log_q - log_p)).sum(1)
    loss.backward(case.upstream)
    assert student.grad is not None
    full = torch.zeros_like(case.student)
    full[:, inside] = student.grad
    assert_near("loss", out.loss, loss, 1e-11)
    assert_near("gradient", gradient, full.chunk(group.size(), dim=1)[group.rank()], 1e-11)


def check_failure(group: ProcessGroup, rank: int | None) -> None:
    """Fails on one rank while the others wait for it in a collective."""
    assert group.rank() != rank, f"rank {rank} fails alone"
    ones = torch.ones(1)
    dist.all_reduce(ones, group=group)
    assert ones == group.size()


def check_crash(group: ProcessGroup, counter: str, times: int) -> None:
    """The last rank has a segmentation fault, so many times."""
    if group.rank() == group.size() - 1:
        count = len(Path(counter).read_text())
        Path(counter).write_text("x" * (count + 1))
        if count < times:
            os.kill(os.getpid(), SIGSEGV)
