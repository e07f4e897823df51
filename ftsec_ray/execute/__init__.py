"""Runs stages in a worker process."""
