"""The contents of a sweep file, and how a file is read."""
