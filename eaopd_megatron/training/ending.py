"""The end of a run: the student as a Hugging Face folder, the report, and the mark that says that it is finished."""

from __future__ import annotations

import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_export import export_hf
from eaopd_megatron.reporting.run_report import summary_line, write_run_report
from eaopd_megatron.training.trainer import Run


def finish(run: Run) -> None:
    """Export, report, mark. Each can be repeated: a run that died here goes on here."""
    run.say(f"exporting the student to {run.folder.student}")
    export_hf(run.parts.model, run.parallel, run.parts.student_folder, run.folder.student)
    dist.barrier()
    if not run.parallel.is_main:
        return
    run.close()
    report = write_run_report(run.folder.path)
    run.folder.finish(run.recipe)
    print(f"finished: {summary_line(run.folder.path)}\nreport: {report}\nstudent: {run.folder.student}", flush=True)
