"""The linear form on one rank: values, gradients, what it computes and what it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eaopd_megatron.objective import (
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    entropy_aware_loss,
    linear_entropy_aware_loss,
    linear_token_statistics,
    summarise_teacher,
)
from tests.distributed.objective.cases import TOP_K, assert_near
from tests.distributed.objective.linear_cases import (
    TEACHER_WIDTH,
    WIDTH,
    call_linear,
    compare_linear,
    make_linear_case,
    run_linear,
    small_tiles,
)
from tests.unit.objective_variants import variants
from tools.lib.live_bytes import LiveBytes

SIGNALS = ("hidden", "topk")
OBJECTIVES = [*Objective.PRESETS, "topk_tail"]


def objective_of(name: str, **changes: Any) -> Objective:
    """A preset, or the paper's with a bucket for the tail."""
    if name == "topk_tail":
        return Objective(forward_kl="topk_tail", **changes)
    return Objective.preset(name, **changes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_presets_against_the_oracle(name: str, signal: Any, dtype: torch.dtype) -> None:
    for layout, old in (("even", True), ("padded", False)):
        linear = make_linear_case(dtype=dtype, layout=layout)
        objective = objective_of(name, top_k=TOP_K, threshold=linear.case.threshold())
        if objective.refusal(signal) is None:
            compare_linear(linear, objective, signal, None, old=old, tile=1 << 17 if dtype == torch.bfloat16 else 40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_variant_on_any_shape_against_the_oracle(data: st.DataObject) -> None:
    signal = data.draw(st.sampled_from(SIGNALS))
    variant = data.draw(variants(full=signal == "hidden"))
    linear = make_linear_case(**variant.case)
    objective = replace(variant.objective, threshold=linear.case.threshold())
    compare_linear(linear, objective, signal, None, tile=data.draw(st.integers(1, 300)), **variant.call)


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_terminal_map_label_looks_up_only_the_teachers_log_prob(signal: str) -> None:
    linear = make_linear_case()
    assert not torch.equal(linear.case.tokens, linear.case.teacher_tokens)
    plain = replace(linear, case=replace(linear.case, teacher_tokens=linear.case.tokens))
    objective = Objective(top_k=TOP_K, threshold=linear.case.threshold())
    mapped, direct = (run_linear(case, objective, signal, None).out for case in (linear, plain))
    assert torch.equal(mapped.forward_kl, direct.forward_kl) and torch.equal(mapped.gate, direct.gate)
    moved = mapped.teacher_logprob != direct.teacher_logprob
    assert torch.equal(moved, linear.case.tokens != linear.case.teacher_tokens)


@pytest.mark.parametrize("name", ["eopd", "eopd_exact", "topk_tail"])
def test_tiles_of_the_real_size_give_what_stored_logits_give(name: str) -> None:
    """More rows than a chunk has and more columns than a block, both with a rest."""
    n, vocab_size, generator = 1100, 3001, torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(n, 8, generator=generator), torch.randn(n, 6, generator=generator)
    head, teacher_head = torch.randn(3008, 8, generator=generator), torch.randn(3008, 6, generator=generator)
    tokens = torch.randint(0, vocab_size, (n,), generator=generator)
    arguments: dict[str, Any] = {"objective": objective_of(name, threshold=6.0), "vocab_size": vocab_size}
    leaves = [(hidden.clone().requires_grad_(), head.clone().requires_grad_()) for _ in range(2)]
    teacher = TeacherLogits(teacher_hidden @ teacher_head.T)
    stored = entropy_aware_loss(leaves[0][0] @ leaves[0][1].T, teacher, tokens, None, **arguments)
    out = linear_entropy_aware_loss(*leaves[1], TeacherHidden(teacher_hidden, teacher_head), tokens, None, **arguments)
    for loss in (stored.loss, out.loss):
        loss.sum().backward()
    assert 0 < out.gate.sum() < n
    for field, value in vars(stored).items():
        assert_near(field, getattr(out, field), value.double() if value.is_floating_point() else value, 3e-5)
    for want, got in zip(*leaves, strict=True):
        assert want.grad is not None and got.grad is not None
        assert_near("gradient", got.grad, want.grad.double(), 3e-5)


class Products(TorchDispatchMode):
    """Shapes of the factors of all matrix products inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.overloadpacket.__name__:
            left, right = args[-2:]
            self.shapes.append((left.shape, right.shape))
        return func(*args, **(kwargs or {}))

    def multiplications(self, wanted: Callable[[torch.Size, torch.Size], bool] = lambda left, right: True) -> int:
        return sum(left[0] * left[1] * right[1] for left, right in self.shapes if wanted(left, right))


@pytest.mark.parametrize("gate", ["hard", "soft", "always", "never"])
@pytest.mark.parametrize("reverse", ["sampled", "exact", "none"])
@pytest.mark.parametrize("forward", ["exact", "topk", "none"])
def test_backward_computes_the_teachers_head_only_for_rows_that_need_it(reverse: Any, forward: Any, gate: Any) -> None:
    """An exact reverse term needs all rows, an exact forward term those of an open gate, the others none; no term needs
    rows of weight 0."""
    linear = make_linear_case(n=40)
    case = linear.case
    objective = Objective(
        reverse_kl=reverse, forward_kl=forward, gate=gate, top_k=TOP_K, threshold=case.threshold(), gate_width=0.01
    )
    hidden, head = linear.hidden.clone().requires_grad_(), linear.head.clone().requires_grad_()
    with small_tiles(), Products() as forward_pass:
        out = call_linear(linear, student_hidden=hidden, student_head_weight=head, objective=objective, chunk=7)
    teacher = case.vocab_size * TEACHER_WIDTH
    assert forward_pass.multiplications(lambda left, right: left[1] == TEACHER_WIDTH) == 40 * teacher
    with small_tiles(), Products() as backward_pass:
        out.loss.backward(case.upstream)
    weighs = case.upstream != 0
    rows = {"exact": weighs, "topk": weighs & False, "none": weighs & False}[forward] & (out.gate != 0)
    if reverse == "exact":
        rows = weighs
    assert not weighs.all() and (gate != "hard" or forward != "exact" or reverse == "exact" or 5 < rows.sum() < 35)
    assert backward_pass.multiplications(lambda left, right: left[1] == TEACHER_WIDTH) == rows.sum() * teacher
    student = case.vocab_size * WIDTH
    assert backward_pass.multiplications() == rows.sum() * teacher + 3 * weighs.sum() * student


def test_a_top_k_teacher_has_no_head_to_compute() -> None:
    linear = make_linear_case(n=40)
    hidden, head = linear.hidden.clone().requires_grad_(), linear.head.clone().requires_grad_()
    student = 40 * linear.case.vocab_size * WIDTH
    with Products() as products:
        out = call_linear(linear, linear.case.top_k(torch.float64), student_hidden=hidden, student_head_weight=head)
        assert products.multiplications() == student
        out.loss.sum().backward()
        assert products.multiplications() == 4 * student


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_an_input_without_gradient_costs_none(frozen: str) -> None:
    """A frozen head must not cost a product and an fp32 buffer of its size, nor frozen hidden states a collective."""
    linear = make_linear_case(n=40)
    teacher = linear.case.top_k(torch.float64)
    whole = run_linear(linear, Objective(top_k=TOP_K), "topk", None, tile=1 << 17, chunk=None, old=False)
    hidden = linear.hidden.clone().requires_grad_(frozen != "hidden")
    head = linear.head.clone().requires_grad_(frozen != "head")
    out = call_linear(
        linear,
        teacher,
        student_hidden=hidden,
        student_head_weight=head,
        objective=Objective(top_k=TOP_K),
        old_logprobs=None,
    )
    with Products() as products:
        out.loss.backward(linear.case.upstream)
    assert products.multiplications() == 2 * (linear.case.upstream != 0).sum() * linear.case.vocab_size * WIDTH
    assert (hidden.grad is None) == (frozen == "hidden") and (head.grad is None) == (frozen == "head")
    for got, want in ((hidden.grad, whole.hidden), (head.grad, whole.head)):
        assert got is None or torch.equal(got, want)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_backward_keeps_what_it_was_given_and_some_numbers_a_token(name: str) -> None:
    """Logits that were kept would be 300 kB a token."""
    linear = make_linear_case(n=40)
    saved: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    given = [linear.hidden.requires_grad_(), linear.head, linear.teacher_hidden, linear.teacher_head]
    objective = objective_of(name, top_k=TOP_K, threshold=linear.case.threshold())
    case = linear.case
    with (
        LiveBytes(*given, case.tokens, case.old_logprobs, case.teacher) as alive,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
    ):
        out = call_linear(linear, objective=objective)
        live = alive.now()
    exact = "exact" in (objective.reverse_kl, objective.forward_kl)
    want = given if exact else given[:2]
    assert [value.data_ptr() for value in saved] == [value.data_ptr() for value in want]
    assert live <= 40 * 8 * (20 + 2 * TOP_K) and out.loss.requires_grad


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_memory_beyond_gradients_is_one_chunk_whatever_the_number_of_tokens(name: str, signal: Any) -> None:
    """Peak of all bytes alive. Beside its gradient, a token adds the numbers that the ranks exchange, not logits."""
    vocab_size, width, chunk, generator = 1000, 8, 16, torch.Generator().manual_seed(0)
    objective = objective_of(name, threshold=6.0)
    if objective.refusal(signal) is not None:
        return
    head, teacher_head = torch.randn(2, vocab_size, width, generator=generator).bfloat16().unbind()
    peaks: dict[int, tuple[int, int]] = {}
    for n in (32, 128):
        hidden, teacher_hidden = torch.randn(2, n, width, generator=generator).bfloat16().unbind()
        tokens = torch.randint(0, vocab_size, (n,), generator=generator)
        teacher: Any = TeacherHidden(teacher_hidden, teacher_head)
        if signal == "topk":
            teacher = summarise_teacher(teacher_hidden @ teacher_head.T, tokens, k=16, vocab_size=vocab_size)
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        existing = [hidden, head, teacher_head, tokens, *leaves, *vars(teacher).values()]
        with small_tiles(chunk * 64):
            with LiveBytes(*existing) as forward:
                out = linear_entropy_aware_loss(
                    *leaves, teacher, tokens, None, objective=objective, vocab_size=vocab_size, chunk=chunk
                )
            with LiveBytes(*existing) as backward:
                torch.autograd.grad(out.loss.sum(), leaves)
        peaks[n] = forward.peak, backward.peak
    # Bytes an element of a tile: fp32 logits of both, and four fp32 buffers; backward has a bf16 gradient and a buffer
    # less. Where S is to be found, a tile has all columns. A CPU copies a tile's factors to fp32.
    searched = signal == "hidden" and objective.forward_kl in ("topk", "topk_tail")
    columns = vocab_size if searched else 64
    tile = 28 * chunk * columns + 4 * width * (chunk + columns)
    head_gradient = vocab_size * width * (4 + 2)
    for n, (in_forward, in_backward) in peaks.items():
        # A token's logits are 2,000 bytes for either model.
        assert in_forward <= tile + 700 * n
        assert in_backward <= 28 * chunk * 64 + 4 * width * (chunk + 64) + head_gradient + (2 * width + 40) * n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logprobs_carry_the_rounding_of_logits(dtype: torch.dtype) -> None:
    """Logits of 16-bit factors, the token's own around 12: their log-probs are those of products in fp64."""
    n, vocab_size, width, generator = 64, 2000, 256, torch.Generator().manual_seed(0)
    head = torch.randn(vocab_size, width, generator=generator).to(dtype)
    tokens = torch.randint(0, vocab_size, (n,), generator=generator)
    hidden = (0.05 * head[tokens] + 0.4 * torch.randn(n, width, generator=generator)).to(dtype)
    exact = (hidden.double() @ head.double().T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    found = linear_token_statistics(hidden, head, tokens, vocab_size=vocab_size).logprob
    assert (found - exact).abs().max() <= 5e-5
    rounded = (hidden @ head.T).double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (rounded - exact).abs().mean() > (2e-2 if dtype == torch.bfloat16 else 2e-3), "the case shows no rounding"
    objective = Objective.preset("opd")
    teacher = summarise_teacher(head[tokens].double() @ head.double().T, tokens, k=16, vocab_size=vocab_size)
    loss = linear_entropy_aware_loss(hidden, head, teacher, tokens, None, objective=objective, vocab_size=vocab_size)
    assert torch.equal(loss.student_logprob, found)


def test_the_gradient_of_a_bf16_head_is_summed_in_fp32() -> None:
    """4,096 equal parts: a bf16 sum stops growing at 256 of them."""
    n, vocab_size = 4096, 2
    hidden = torch.ones(n, 1, dtype=torch.bfloat16)
    head = torch.zeros(vocab_size, 1, dtype=torch.bfloat16, requires_grad=True)
    teacher = TeacherTopK(torch.zeros(n, 1, dtype=torch.int64), torch.zeros(n, 1), torch.zeros(n), torch.zeros(n))
    objective = Objective(reverse_kl="none", gate="always", top_k=1)
    out = linear_entropy_aware_loss(
        hidden,
        head,
        teacher,
        torch.zeros(n, dtype=torch.int64),
        None,
        objective=objective,
        vocab_size=vocab_size,
        chunk=1,
    )
    out.loss.sum().backward()
    assert head.grad is not None and head.grad.flatten().tolist() == [-n / 2, n / 2]


@pytest.mark.parametrize("signal", SIGNALS)
def test_no_tokens_give_a_loss_with_a_graph(signal: str) -> None:
    """An empty micro-batch must go through backward like any other, or its rank leaves the others waiting."""
    linear = make_linear_case(dtype=torch.float32, n=6)
    whole = linear.case.top_k(torch.float32)
    hidden, head = linear.hidden[:0].clone().requires_grad_(), linear.head.clone().requires_grad_()
    teacher: Any = TeacherHidden(linear.teacher_hidden[:0], linear.teacher_head)
    if signal == "topk":
        teacher = TeacherTopK(whole.ids[:0], whole.logprobs[:0], whole.token_logprob[:0])
    for name in OBJECTIVES:
        objective = objective_of(name, top_k=TOP_K)
        if objective.refusal(signal) is not None:  # type: ignore[arg-type]
            continue
        out = linear_entropy_aware_loss(
            hidden, head, teacher, linear.case.tokens[:0], None, objective=objective, vocab_size=linear.case.vocab_size
        )
        assert out.loss.shape == (0,) and out.loss.grad_fn is not None
        out.loss.sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == hidden.shape
        assert head.grad is not None and head.grad.shape == head.shape and not head.grad.any()


def test_a_token_without_weight_adds_nothing_even_where_its_loss_is_infinite() -> None:
    """0 · inf = 0: a masked row whose teacher gives the token no probability must not spoil the gradient."""
    linear = make_linear_case(dtype=torch.float32)
    teacher = linear.case.top_k(torch.float32)
    teacher.token_logprob[4] = -torch.inf
    assert linear.case.upstream[4] == 0
    got = run_linear(linear, Objective(top_k=TOP_K), "topk", None, teacher=teacher)
    assert got.out.loss[4].isinf() and not got.hidden[4].any()
    assert got.hidden.isfinite().all() and got.head.isfinite().all()
