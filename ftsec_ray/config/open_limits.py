"""Limits on what is read from the models and data files of a sweep; an environment variable can
override each default.
"""

from __future__ import annotations

from ftsec_ray.config.limits import Limit

DATA_BYTES = Limit("data_bytes", 2**30, "bytes of a data file, decompressed")
DATA_RATIO = Limit("data_ratio", 200, "times its compressed size that a data file expands to")
DATA_ROWS = Limit("data_rows", 2_000_000, "rows of a data file")
DATA_VALUES = Limit("data_values", 25_000_000, "values of a data file")
DATA_COLUMNS = Limit("data_columns", 2_000, "columns of a data file")
MODEL_JSON_BYTES = Limit("model_json_bytes", 2**24, "bytes of a JSON file of a model")
TOKENIZER_BYTES = Limit("tokenizer_bytes", 2**27, "bytes of a file of a tokenizer")
MODEL_WEIGHTS = Limit("model_weights", 4 * 10**12, "weights of a model")
MODEL_LAYERS = Limit("model_layers", 2_000, "layers of a model")
TEMPLATE_SECONDS = Limit("template_seconds", 10, "seconds to render a chat template")
TEMPLATE_BYTES = Limit("template_bytes", 2**29, "bytes of memory to render a chat template")
TEMPLATE_CHARS = Limit("template_chars", 2**22, "characters of the text of a chat template")


def raised_by(limit: Limit) -> str:
    """The `fix` of an error that says how to raise a limit."""
    return f"if you trust it, set the environment variable {limit.variable} on all nodes"
