"""What a Slurm job needs beyond bash. Only slurm/lib calls `python -m eaopd_megatron.slurm_job`."""

ROLES = ("student", "teacher", "servers")
"""What may have nodes of its own in a job, in the order of the nodes."""
