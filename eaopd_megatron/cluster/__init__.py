"""What a job on a Slurm cluster needs beyond bash. `python -m eaopd_megatron.cluster` is called by slurm/lib alone."""

ROLES = ("student", "teacher", "servers")
"""What may have nodes of its own in a job, in the order of the nodes."""
