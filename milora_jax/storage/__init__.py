"""Everything that outlives a process: checkpoints, manifests, locks and adapter files."""
