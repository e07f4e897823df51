"""The survey's five findings as tests that were stated before any result was seen: see `rules` and
`judge`.
"""
