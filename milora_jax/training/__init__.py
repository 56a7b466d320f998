"""Training: the loss, the optimisers, the step and the loop."""
