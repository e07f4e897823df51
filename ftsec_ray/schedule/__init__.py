"""Running a plan: `schedule.execution.execute`."""
