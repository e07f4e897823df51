"""Judges, one file each, with the metrics that count their verdicts.

A file here defines the judge with its name; `METRICS` in it are the judge's own metrics. Other
packages add files with the entry-point group `ftsec_ray.judges`. Top-level imports stay light,
because catalogues read these files.
"""
