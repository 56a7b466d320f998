"""Checks of a machine, a config, its data and a workdir, before hours are spent on a run."""
