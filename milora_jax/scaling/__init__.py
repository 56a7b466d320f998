"""Does it fit: the real programs compiled for TPUs that are not there."""
