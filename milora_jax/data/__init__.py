"""Records, the prompt template, tokens and batches."""
