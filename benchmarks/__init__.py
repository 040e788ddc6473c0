"""Timings to be taken on a quiet machine and compared inside one run only."""
