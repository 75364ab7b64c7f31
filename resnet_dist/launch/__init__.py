"""Training as a SLURM job, through submitit.

`submission` checks a job and submits it, `script` writes its batch script, `rank` is what each rank
runs inside the job, `status` asks SLURM about a job and waits for its end.
"""
