"""The Triton kernels on a GPU: right against the torch code and fp64, and how near they come to the memory's bandwidth.

Needs torch and Triton alone:  python -m pytest -m gpu tests/gpu/test_objective_gpu.py -s
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eaopd_megatron.objective import Objective, TeacherLogits, TeacherTopK, entropy_aware_loss, token_statistics
from eaopd_megatron.objective.dense_reference import dense_loss
from eaopd_megatron.objective.entropy_aware import write_gradient
from eaopd_megatron.objective.triton_launch import force_kernels, uses_kernels
from eaopd_megatron.objective.vocab_parallel import VocabShard, merge_softmax, partial_sums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]

VOCABULARY = 151_936
VALUES = {torch.float32: 3e-5, torch.bfloat16: 3e-5, torch.float16: 3e-5}
GRADIENTS = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(GRADIENTS)
VARIANTS = [
    ("topk", "sampled", "none"),
    ("topk", "sampled", "topk"),
    ("topk", "sampled", "topk_tail"),
    ("logits", "sampled", "topk"),
    ("logits", "sampled", "topk_tail"),
    ("logits", "sampled", "exact"),
    ("logits", "exact", "none"),
    ("logits", "exact", "exact"),
    ("logits", "exact", "topk_tail"),
]


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def pair(n: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher that agree in part; entropies from below to above the gate's threshold."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shared, student, teacher = (torch.randn(n, columns, device="cuda", generator=generator) for _ in range(3))
    spread = torch.linspace(1, 6, n, device="cuda")[:, None]
    return ((spread * (shared + 0.3 * student)).to(dtype), (spread * (shared + 0.3 * teacher)).to(dtype))


def near(got: Tensor, want: Tensor, tolerance: float, name: str) -> None:
    assert got.isfinite().all(), f"{name}: not finite"
    error, scale = (got.double() - want.double()).abs().max().item(), want.double().abs().max().item()
    assert error <= tolerance * scale + 1e-12, f"{name}: off by {error:.3g} of {scale:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("valid", "columns"), [(VOCABULARY, VOCABULARY), (50_257, 50_304), (37_984, 38_016), (5, 8)])
@pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
def test_sums_are_those_of_the_torch_code(dtype: torch.dtype, valid: int, columns: int, tail: bool) -> None:
    student, teacher = pair(300, columns, dtype)  # rows enough for a choice of block sizes
    for value in (student, teacher):
        value[:, valid:] = torch.nan
    shard = VocabShard(columns, valid, None, 0, 1)
    k = min(16, valid)
    exclude = None
    if tail:
        exclude = (teacher[:, :valid].topk(k).indices, torch.arange(k, device="cuda").expand(300, k) % 3 != 1)
    for other in (None, teacher):
        assert uses_kernels(student, other)
        got, has_neg_inf = partial_sums(student, other, shard, dtype=torch.float32, exclude=exclude)
        doubles = student.double(), None if other is None else other.double()
        exact, _ = partial_sums(*doubles, shard, dtype=torch.float64, exclude=exclude)
        with force_kernels(False):
            want, _ = partial_sums(student, other, shard, dtype=torch.float32, exclude=exclude)
        assert not has_neg_inf and list(got) == list(want)
        for name in want:
            for row in range(len(want[name])):
                near(got[name][row], exact[name][row], 1e-5, f"{name}[{row}] against fp64")
                near(got[name][row], want[name][row], 2e-5, f"{name}[{row}] against torch")


def losses(case: dict[str, Any], student: Tensor, objective: Objective, **arguments: Any) -> Any:
    return entropy_aware_loss(
        student,
        case["teacher"],
        case["tokens"],
        case["old"],
        objective=objective,
        vocab_size=case["vocab_size"],
        **arguments,
    )


def make(signal: str, dtype: torch.dtype, n: int, valid: int, columns: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    student, logits = pair(n, columns, dtype)
    tokens = torch.randint(0, valid, (n,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    tokens[::2] = student[::2, :valid].argmax(1)
    teacher: TeacherLogits | TeacherTopK = TeacherLogits(logits)
    if signal == "topk":
        log_p = logits[:, :valid].double().log_softmax(1)
        found = log_p.sort(dim=1, descending=True, stable=True)
        entropy = -(log_p.exp() * log_p).sum(1)
        numbers = (found.values[:, :16], log_p.gather(1, tokens[:, None])[:, 0], entropy)
        teacher = TeacherTopK(found.indices[:, :16], *(number.float() for number in numbers))
    log_q = student[:, :valid].double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    offset = torch.tensor([-0.4, 0.05, 0.4, -0.05], device="cuda").repeat(n // 4 + 1)[:n]
    old = (log_q - offset).clamp(max=-1e-3).float()
    upstream = torch.randn(n, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    upstream[3] = 0
    return {"teacher": teacher, "tokens": tokens, "old": old, "vocab_size": valid}, student, upstream


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("signal", "reverse", "forward"), VARIANTS)
@pytest.mark.parametrize(("valid", "columns"), [(VOCABULARY, VOCABULARY), (50_257, 50_304)])
def test_values_and_gradients_are_those_of_the_dense_oracle(
    signal: str, reverse: Any, forward: Any, dtype: torch.dtype, valid: int, columns: int
) -> None:
    case, student, upstream = make(signal, dtype, 48, valid, columns)
    exact = case | {"old": case["old"].double()}
    if isinstance(case["teacher"], TeacherLogits):
        exact["teacher"] = TeacherLogits(case["teacher"].logits.double())
    else:
        top = case["teacher"]
        numbers = (top.logprobs, top.token_logprob, top.entropy)
        exact["teacher"] = TeacherTopK(top.ids, *(value.double() for value in numbers))
    oracle = student.double().requires_grad_()
    objective = Objective(reverse_kl=reverse, forward_kl=forward, reverse_weight=0.7, forward_weight=1.3)

    def dense(objective: Objective) -> Any:
        return dense_loss(oracle, exact["teacher"], case["tokens"], exact["old"], objective=objective, vocab_size=valid)

    entropy = dense(objective).teacher_entropy.sort().values
    middle = entropy[12:36]
    widest = int((middle[1:] - middle[:-1]).argmax())
    objective = replace(objective, threshold=float(middle[widest] + middle[widest + 1]) / 2)  # rounding opens no gate
    want = dense(objective)
    want.loss.backward(upstream.double())
    leaf = student.clone().requires_grad_()
    out = losses(case, leaf, objective)
    out.loss.backward(upstream)
    assert oracle.grad is not None and leaf.grad is not None
    for name, value in vars(want).items():
        if value.dtype == torch.bool:
            assert torch.equal(getattr(out, name), value), name
        else:
            near(getattr(out, name).detach(), value.detach(), VALUES[dtype], name)
    near(leaf.grad, oracle.grad, GRADIENTS[dtype], "gradient")
    assert not leaf.grad[:, valid:].any() and not leaf.grad[3].any()
    logits = student.clone().requires_grad_() * 1.0
    losses(case, logits, objective, inplace_backward=True).loss.backward(upstream)
    assert torch.equal(logits.detach(), leaf.grad), "the gradient over the logits is another one"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_and_broken_rows(dtype: torch.dtype) -> None:
    student, teacher = pair(8, 20_000, dtype)
    student[0, ::2] = -torch.inf
    teacher[1, ::3] = -torch.inf
    student[2, :9000] = teacher[2, :9000] = -torch.inf
    student[3, :-1] = teacher[3, 1:] = -torch.inf
    student[4] = -torch.inf
    student[5, 17], student[6, 19_999], student[7, :] = torch.nan, torch.inf, torch.nan
    shard = VocabShard(20_000, 20_000, None, 0, 1)
    got, has_neg_inf = partial_sums(student, teacher, shard, dtype=torch.float32)
    with force_kernels(False):
        want, _ = partial_sums(student, teacher, shard, dtype=torch.float32)
    assert has_neg_inf
    broken = merge_softmax(got["student"][None])[0].has_nan_or_inf
    assert (
        broken.tolist() == [False] * 4 + [True] * 4 == merge_softmax(want["student"][None])[0].has_nan_or_inf.tolist()
    )
    for name in want:
        torch.testing.assert_close(got[name][:, :5], want[name][:, :5], rtol=2e-5, atol=1e-3)
    with pytest.raises(ValueError, match="student_logits: row 5 holds NaN"):
        rows = [0, 1, 2, 3, 0, 5]
        tokens = torch.zeros(6, dtype=torch.int64, device="cuda")
        entropy_aware_loss(
            student[rows], TeacherLogits(teacher[rows]), tokens, None, objective=Objective(), vocab_size=20_000
        )


def test_every_block_size_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of the candidates may be the fastest somewhere."""
    from eaopd_megatron.objective import triton_launch as launch

    for index in range(max(len(launch.SUMS_CONFIGS), len(launch.GRADIENT_CONFIGS))):
        monkeypatch.setattr(launch, "autotuned_config", lambda candidates, *_, i=index: candidates[i % len(candidates)])
        for signal, forward in (("topk", "topk"), ("logits", "exact"), ("logits", "topk_tail")):
            case, student, upstream = make(signal, torch.bfloat16, 20, 50_257, 50_304)
            objective = Objective(reverse_kl="exact" if signal == "logits" else "sampled", forward_kl=forward)  # type: ignore[arg-type]
            grads = []
            for wanted in (True, False):
                leaf = student.clone().requires_grad_()
                with force_kernels(wanted):
                    losses(case, leaf, objective).loss.backward(upstream)
                assert leaf.grad is not None
                grads.append(leaf.grad)
            near(grads[0], grads[1], 1e-2, f"{launch.SUMS_CONFIGS[index % len(launch.SUMS_CONFIGS)]}")


def test_block_sizes_are_chosen_by_time_once(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    from eaopd_megatron.objective import triton_launch as launch

    monkeypatch.setattr(launch, "_best", {})
    case, student, upstream = make("logits", torch.bfloat16, 600, VOCABULARY, VOCABULARY)
    found = []
    for _ in range(2):
        losses(case, student.requires_grad_(), Objective.preset("eopd_exact")).loss.backward(upstream)
        found.append(dict(launch._best))
    assert found[0] == found[1] and len(found[0]) == 2
    for kind, blocks in found[0].items():
        record_property(f"block sizes of {kind}", str(blocks))


def test_logits_beyond_32_bits() -> None:
    n = 2**31 // VOCABULARY + 40
    if torch.cuda.mem_get_info()[0] < 8 * n * VOCABULARY:
        pytest.skip("needs 17 GB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(2, n, VOCABULARY, dtype=torch.bfloat16, device="cuda").normal_(0, 3, generator=generator)
    student, teacher = logits.unbind()
    last = slice(n - 8, n)
    tokens = torch.arange(n, device="cuda") % VOCABULARY
    objective = Objective.preset("eopd_exact")
    leaf = student[last].clone().requires_grad_()
    want = entropy_aware_loss(
        leaf, TeacherLogits(teacher[last]), tokens[last], None, objective=objective, vocab_size=VOCABULARY
    )
    want.loss.sum().backward()
    assert leaf.grad is not None
    over = student.requires_grad_() * 1.0
    out = entropy_aware_loss(
        over, TeacherLogits(teacher), tokens, None, objective=objective, vocab_size=VOCABULARY, inplace_backward=True
    )
    near(out.loss[last].detach(), want.loss.detach(), 3e-5, "loss")
    out.loss.sum().backward()
    near(over.detach()[last], leaf.grad, 1e-2, "gradient")


def test_no_memory_but_the_gradient(record_property: Callable[[str, object], None]) -> None:
    case, student, upstream = make("logits", torch.bfloat16, 1000, VOCABULARY, VOCABULARY)
    leaf = student.clone().requires_grad_()
    for _ in range(2):  # block sizes are chosen in the first round
        leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = losses(case, leaf, Objective.preset("eopd_exact"))
        forward = torch.cuda.max_memory_allocated() - before
        out.loss.backward(upstream)
        both = torch.cuda.max_memory_allocated() - before
    each = 1000 * VOCABULARY
    record_property(
        "bytes per logit beyond the logits", f"forward {forward / each:.3f}, with backward {both / each:.3f}"
    )
    assert forward <= 0.02 * each and both <= 2.02 * each


def milliseconds(run: Callable[[], Any], rounds: int = 10) -> float:
    """Median over rounds, each timed by itself, after three that are not."""
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[rounds // 2]


@pytest.mark.parametrize("n", [1024, 4096, 16_384])
def test_fraction_of_the_memorys_bandwidth(n: int, record_property: Callable[[str, object], None]) -> None:
    """Records how near the passes come to a copy between two places of the GPU's memory; asserts no time."""
    size = n * VOCABULARY
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip(f"needs {8 * size / 1e9:.0f} GB of free GPU memory")
    student, teacher = torch.randn(2, n, VOCABULARY, dtype=torch.bfloat16, device="cuda").unbind()
    out = torch.empty_like(student)
    copy = 4 * size / milliseconds(lambda: out.copy_(student)) / 1e6  # GB/s
    shard = VocabShard(VOCABULARY, VOCABULARY, None, 0, 1)
    tokens = torch.zeros(n, dtype=torch.int64, device="cuda")
    leaf = student.requires_grad_()
    rows = []

    def forward(name: str, width: int, other: Tensor | None) -> None:
        time = milliseconds(lambda: partial_sums(leaf.detach(), other, shard, dtype=torch.float32))
        rows.append((name, time, width * size / time / 1e6))

    forward("sums of one", 2, None)
    forward("sums of two", 4, teacher)
    exact = Objective.preset("eopd_exact")
    top_k = Objective.preset("eopd")
    for name, width, objective in (("gradient, exact", 6, exact), ("gradient, top-k", 4, top_k)):
        loss = entropy_aware_loss(
            leaf, TeacherLogits(teacher), tokens, None, objective=objective, vocab_size=VOCABULARY
        ).loss
        saved: Any = loss.grad_fn.saved  # type: ignore[union-attr]
        weights = torch.full((n,), 1 / n, device="cuda")

        def write(saved: Any = saved, weights: Tensor = weights) -> None:
            write_gradient(saved, leaf.detach(), teacher, weights, out)

        time = milliseconds(write)
        rows.append((name, time, width * size / time / 1e6))
    print(f"\n{torch.cuda.get_device_name()}, {n} tokens, {VOCABULARY} columns, bf16; a copy moves {copy:.0f} GB/s")
    record_property(f"copy, {n} tokens", f"{copy:.0f} GB/s")
    for name, time, rate in rows:
        print(f"{name:16} {time:8.3f} ms {rate:6.0f} GB/s   {rate / copy:.2f} of a copy's")
        record_property(f"{name}, {n} tokens", f"{time:.3f} ms, {rate:.0f} GB/s, {rate / copy:.2f} of a copy's rate")
    assert all(rate > 0 for _, _, rate in rows)


def test_the_statistics_of_a_row_are_its_own() -> None:
    """Programs share nothing: with the same block sizes a row has the same bits alone and among others."""
    student, _ = pair(64, 50_304, torch.bfloat16)
    tokens = torch.arange(64, device="cuda")
    whole = token_statistics(student, tokens, vocab_size=50_257)
    for row in (0, 5, 63):
        alone = token_statistics(student[row : row + 1], tokens[row : row + 1], vocab_size=50_257)
        assert torch.equal(alone.logprob, whole.logprob[row : row + 1])
        assert torch.equal(alone.entropy, whole.entropy[row : row + 1])
