"""What a job on a Slurm cluster needs beyond bash. `python -m eaopd_megatron.cluster` is called by slurm/lib alone."""
