"""Whether a run fits: its real programs, compiled for TPUs or GPUs that are not attached."""
