"""Generation: prefill computes the route, decode steps read it."""
