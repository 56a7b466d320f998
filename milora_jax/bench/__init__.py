"""Benchmarks: programs that print one JSON object per line, instead of timed tests."""
