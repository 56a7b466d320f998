"""The device mesh and the declared sharding of every leaf."""
