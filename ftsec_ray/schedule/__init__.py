"""Runs a plan: see `schedule.execution.execute`."""
