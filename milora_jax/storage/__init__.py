"""Everything that lasts longer than a process: checkpoints, manifests, locks and adapter files."""
