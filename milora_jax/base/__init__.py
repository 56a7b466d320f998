"""The frozen base Transformer: its maths, its modules, its cache and its files."""
