"""The survey's five findings as tests with rules that were written before any result was seen: see
`rules` and `judge`.
"""
