"""How much may be read from files that a sweep names, models and rows: each limit has a default and
a variable of the environment that sets another one.
"""

from __future__ import annotations

from ftsec_ray.config.limits import Limit

DATA_BYTES = Limit("data_bytes", 2**30, "bytes of a data file, unpacked")
DATA_RATIO = Limit("data_ratio", 200, "times its packed size that a data file unpacks to")
DATA_ROWS = Limit("data_rows", 2_000_000, "rows of a data file")
DATA_VALUES = Limit("data_values", 25_000_000, "values of a data file")
DATA_COLUMNS = Limit("data_columns", 2_000, "columns of a data file")
MODEL_JSON_BYTES = Limit("model_json_bytes", 2**24, "bytes of a JSON file of a model")
TOKENIZER_BYTES = Limit("tokenizer_bytes", 2**27, "bytes of a file of a tokenizer")
MODEL_WEIGHTS = Limit("model_weights", 4 * 10**12, "weights of a model")
MODEL_LAYERS = Limit("model_layers", 2_000, "layers of a model")
TEMPLATE_SECONDS = Limit("template_seconds", 10, "seconds that a chat template takes")
TEMPLATE_BYTES = Limit("template_bytes", 2**29, "bytes of memory that a chat template takes")
TEMPLATE_CHARS = Limit("template_chars", 2**22, "characters that a chat template makes")


def raised_by(limit: Limit) -> str:
    """How whoever trusts a file raises a limit, for the `fix` of an error."""
    return f"if you trust it, set {limit.variable} in the environment of all nodes"
