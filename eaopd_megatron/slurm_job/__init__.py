"""The parts of a Slurm job that are beyond bash; slurm/lib calls them as `python -m eaopd_megatron.slurm_job VERB`."""

ROLES = ("student", "teacher", "servers")
"""What may have nodes of its own in a job, in the order of the nodes."""
