"""Checks of the student's ranks with a remote teacher, against transformers in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import TeacherConfig
from eaopd_megatron.data.packing import collate
from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import ServiceUnavailable, StopRequested
from eaopd_megatron.objective import Objective, TeacherHidden
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.protocol import TeacherInfo
from eaopd_megatron.teacher.remote import RemoteTeacher, load_teacher_head
from eaopd_megatron.teacher.separate import SeparateBackend
from tests.distributed.groups import model_parallel
from tests.distributed.training_cases import compare, reference, samples, teacher_logprobs, trained

LAYOUTS = {
    "narrow": (ParallelLayout(2), ParallelLayout(1)),
    "wide": (ParallelLayout(2, sequence_parallel=True, context_parallel=2), ParallelLayout(2, pipeline_parallel=2)),
    "mixed": (
        ParallelLayout(context_parallel=2, pipeline_parallel=2),
        ParallelLayout(pipeline_parallel=2, virtual_pipeline=2),
    ),
}
BUDGET = 16


def remote(
    student: HfFolder,
    teacher: HfFolder,
    parallel: ParallelState,
    *,
    info: dict[str, Any],
    urls: Sequence[str],
    stop_signal: Callable[[], int] = lambda: 0,
    log: list[str] | None = None,
    **options: Any,
) -> RemoteTeacher[Any, Any]:
    expected = TeacherInfo.from_json(dict(info))
    terminal = TerminalMap(*expected.terminal)
    head = None
    if expected.signal == "hidden":
        sizes = {"student_rows": student.vocab_size, "vocab_size": expected.vocab_size}
        head = load_teacher_head(teacher, parallel, precision=expected.dtype, terminal=terminal, **sizes)
    return RemoteTeacher(
        parallel,
        SeparateBackend(expected, budget=BUDGET, terminal=terminal, connections=2),
        TeacherConfig(model="unused", placement="separate", urls=list(urls), **options),
        head=head,
        stop_signal=stop_signal,
        report=(log if log is not None else []).append,
    )


def check_a_separate_teacher_changes_no_update(
    group: dist.ProcessGroup, student: str, teacher: str, preset: str, info: dict[str, Any], urls: list[str], where: str
) -> None:
    """Three updates of one iteration: requests are distributed over the ranks of a stage, payloads exchanged."""
    objective = Objective.preset(preset)
    expected = reference(student, {"": teacher}, objective)
    for layout in LAYOUTS[where]:
        for share in (True, False) if layout == ParallelLayout(2) else (True,):
            with model_parallel(layout) as parallel:
                elsewhere = partial(remote, info=info, urls=urls)
                options: dict[str, Any] = {"budget": BUDGET, "signal": info["signal"], "share": share}
                found = trained(student, {"": teacher}, objective, parallel, elsewhere=elsewhere, **options)
                compare(found, expected, f"{preset} {layout} {share}")


def check_a_service_changes_no_update(
    group: dist.ProcessGroup, student: str, teacher: str, info: dict[str, Any], services: dict[str, str], key: str
) -> None:
    """services: layout of a teacher's own ranks → its URL. key: file with their API key."""
    for preset in ("eopd", "eopd_exact"):
        objective = Objective.preset(preset)
        expected = reference(student, {"": teacher}, objective)
        for place, layout in (
            ("colocated", ParallelLayout(2)),
            ("1 x 2", ParallelLayout(2)),
            ("2 x 1", ParallelLayout(1)),
        ):
            elsewhere = None
            if place != "colocated":
                elsewhere = partial(remote, info=info, urls=[services[place]], api_key_file=key)
            with model_parallel(layout) as parallel:
                options: dict[str, Any] = {"budget": BUDGET, "signal": "hidden", "elsewhere": elsewhere}
                found = trained(student, {"": teacher}, objective, parallel, **options)
                compare(found, expected, f"{preset} {place}")


def check_terminal_maps(
    group: dist.ProcessGroup, student: str, teacher: str, info: dict[str, Any], urls: list[str]
) -> None:
    """Under swap and label the stop has the teacher's log-prob of its own stop, with either payload."""
    folders = HfFolder.open(student), HfFolder.open(teacher)
    kind, mine, theirs = info["terminal"]
    frozen = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    everything = [
        Sample(Prompt(str(i), (5, 6), {}), [8, 9, last], end, [0.0] * 3, 0, i)
        for i, (last, end) in enumerate([(mine, "stop"), (mine, "length"), (9, "stop")])
    ]
    with model_parallel(ParallelLayout(2)) as parallel:
        scorer = remote(*folders, parallel, info=info, urls=urls)
        scorer.start(32)
        scorer.open()
        scorer.submit(everything)
        everything = scorer.wait(everything)
        batch = collate(everything, torch.device("cpu"))
        found = teacher_logprobs(scorer, scorer.micro_batch_signals([batch])(0), batch, folders[0].vocab_size, parallel)
        scorer.close()
    for sample, logprobs in zip(everything, batch.split_by_sample(found), strict=True):
        with torch.no_grad():
            exact = frozen(torch.tensor([sample.token_ids])).logits[0, 1:-1].log_softmax(-1)
        labels = list(sample.response_ids)
        stops = kind == "swap" or sample.finish_reason == "stop"
        labels[-1] = theirs if labels[-1] == mine and stops else labels[-1]
        assert torch.allclose(logprobs, exact[range(3), labels], atol=1e-5), (kind, info["signal"], sample)


def check_a_row_that_is_not_there_is_never_zero(
    group: dist.ProcessGroup, student: str, teacher: str, info: dict[str, Any], urls: list[str]
) -> None:
    """Payloads are freed when they are used; the payload of a sample that was not submitted is missing."""
    folders = HfFolder.open(student), HfFolder.open(teacher)
    everything = samples(112)[:4]
    with model_parallel(ParallelLayout(2)) as parallel:
        scorer = remote(*folders, parallel, info=info, urls=urls)
        scorer.start(32)
        scorer.open()
        scorer.submit(everything[:3])
        scorer.wait(everything[:3])
        batch = collate(everything[:3], parallel.device)
        signal = scorer.micro_batch_signals([batch])(0)
        assert isinstance(signal, TeacherHidden) and signal.hidden.any(1).all()
        with pytest.raises(RuntimeError, match="prompt 0: the teacher scored 0 of 1 tokens"):
            scorer.micro_batch_signals([batch])(0)
        with pytest.raises(RuntimeError, match="prompt 3: the teacher scored 0 of 8 tokens"):
            scorer.wait(everything[3:])
        scorer.close()


def check_all_ranks_stop_together(
    group: dist.ProcessGroup, student: str, teacher: str, info: dict[str, Any], gone: str, held: str
) -> None:
    """gone: a replica that dies of its first request; held: one that never answers. Only one rank sees the failure
    or the signal."""
    folders = HfFolder.open(student), HfFolder.open(teacher)
    with model_parallel(ParallelLayout(pipeline_parallel=2, context_parallel=2)) as parallel:
        for url, number, expected in ((gone, 0, ServiceUnavailable), (held, 15, StopRequested)):
            log: list[str] = []
            signals = [0]
            stop_signal: Callable[[], int] = partial(signals.__getitem__, 0)
            options: dict[str, Any] = {"stop_signal": stop_signal, "log": log, "unavailable_timeout_minutes": 1e-3}
            scorer = remote(*folders, parallel, info=info, urls=[url], **options)
            scorer.start(32)
            scorer.open()
            scorer.submit(samples(112)[:1])  # a request for one of the four
            signals[0] = number if parallel.rank == 1 else 0
            with pytest.raises(expected) as caught:
                scorer.wait(samples(112)[:1])
            text = f"no teacher replica has been there for 0.06 s ({url}"
            assert caught.value.args == (15,) if number else text in str(caught.value)
            assert parallel.is_main or not log  # one rank reports to the user
            scorer.close()
