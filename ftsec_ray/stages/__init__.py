"""The kinds of stages, and the lock of their code."""
