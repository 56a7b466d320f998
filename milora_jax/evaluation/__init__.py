"""Scoring generated answers and reporting a run."""
