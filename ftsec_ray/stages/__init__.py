"""The kinds of stages, one file each: a declaration `KIND`, and `run(job)` that does the work.

A file here is a kind: the planner gives it its place by `position`, and its hooks become hooks that
every method may define (see lifecycle). Top-level imports stay light, since planning reads them.
"""
