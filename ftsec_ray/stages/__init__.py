"""The stage kinds, one file each: a declaration `KIND`, and `run(job)`, which does the work.

Every file here is a kind: `position` sets its place in the lifecycle, and every method can define
its hooks (see lifecycle). Top-level imports stay light, because planning imports these files.
"""
