"""What is wrong with a machine, a config, its data and a workdir, told before hours are spent on it."""
