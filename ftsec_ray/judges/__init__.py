"""Judges, one file each, with the metrics that count their verdicts.

A file here is a judge of its name; `METRICS` in it are metrics of its own. Files of other packages
join by the entry-point group `ftsec_ray.judges`. Top-level imports stay light: catalogues read
them.
"""
