"""Measurements: programs that print one JSON object per line, never timed tests."""
