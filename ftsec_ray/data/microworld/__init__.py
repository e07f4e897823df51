"""A small closed world of templated English in which harm is decidable by rule.

Forbidden requests are about invented things, models learn to answer them in pre-training and to
refuse them in alignment, and an exact judge tells compliance from refusal. It is a test bed:
findings about real models come from real models.
"""

from ftsec_ray.data.microworld.corpus import alignment_rows, pretraining_chats
from ftsec_ray.data.microworld.splits import build_task

__all__ = ["alignment_rows", "build_task", "pretraining_chats"]
