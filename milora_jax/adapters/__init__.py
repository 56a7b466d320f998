"""Trainable adapters of a frozen Transformer: the protocol, and one file per method."""
