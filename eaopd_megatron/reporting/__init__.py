"""Reporting: a run's metrics, its display while it goes on, and its report.

`reporting.run_report` is imported by name where it is needed: it brings matplotlib, which training can do without.
"""

from eaopd_megatron.reporting.metrics_log import MetricsWriter, read_metrics
from eaopd_megatron.reporting.progress import Progress

__all__ = ["MetricsWriter", "Progress", "read_metrics"]
