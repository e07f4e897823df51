"""A small closed world of templated English in which a rule decides what is harmful.

Forbidden requests are about invented things. Models learn to answer them in pre-training and to
refuse them in alignment, and an exact judge separates compliance from refusal. It is a test bed:
results on real models need real models.
"""

from ftsec_ray.data.microworld.corpus import alignment_rows, pretraining_chats
from ftsec_ray.data.microworld.splits import build_task

__all__ = ["alignment_rows", "build_task", "pretraining_chats"]
