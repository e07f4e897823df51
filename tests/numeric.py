"""Comparisons of numbers that hold on every CPU.

Libraries add up in an order of their own, and with or without fused multiply-add: the same sum in
float32 comes out differently on another machine. So a tolerance must not be what one machine's
rounding happens to stay below. Two ways are used:

- What is written for any precision is tested in float64 (`float64`), where rounding is a relative
  1e-16 a step and a mistake in a formula is not; `assert_same` compares.
- What stays in float32 is compared with a float64 reference by a bound that no order of summation
  can exceed: `gamma`. Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd
  edition, SIAM 2002, section 3.1: a sum of n products computed in any order, with unit roundoff u,
  is off by at most gamma_n * sum |x_i * y_i|, where gamma_n = n u / (1 - n u).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

UNIT_ROUNDOFF = 2.0**-24
"""Of float32."""
SAME = 1e-9
"""Relative difference up to which two computations in float64 count as the same: 1e7 roundings in
the same direction. The tests stay below 1e-13; a wrong factor, sign, row or position is far above,
and even a guard of 1e-7 in a denominator shows.
"""


def gamma(n: int) -> float:
    """Error of a float32 sum of `n` products, as a share of the sum of their magnitudes, at
    most.
    """
    assert n * UNIT_ROUNDOFF < 1.0, n
    return n * UNIT_ROUNDOFF / (1.0 - n * UNIT_ROUNDOFF)


@contextmanager
def float64() -> Iterator[None]:
    """While open, whatever is made or asked for in float32 is float64.

    Code that casts to float32 for stability (the loss, the normalisation and the softmax of
    transformers) keeps float64 there. Models must be made inside, or by `in_float64`.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Wide(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            function = torch.Tensor.double if function is torch.Tensor.float else function
            named = {name: wide(value) for name, value in (kwargs or {}).items()}
            return function(*map(wide, args), **named)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            yield
    finally:
        torch.set_default_dtype(before)


def in_float64(loaded: Any) -> Any:
    """The model itself with its weights in float64."""
    loaded.model.double()
    return loaded


def assert_same(got: Any, want: Any, *, rel: float = SAME) -> None:
    """Numbers, arrays, tensors, or mappings and sequences of them agree to `rel` of the largest
    magnitude in each wanted array; what is compared is float64.
    """
    if isinstance(want, Mapping):
        assert got.keys() == want.keys()
        for name, value in want.items():
            _assert_same(got[name], value, rel, name)
    elif isinstance(want, Sequence):
        assert len(got) == len(want)
        for i, (mine, other) in enumerate(zip(got, want, strict=True)):
            _assert_same(mine, other, rel, i)
    else:
        _assert_same(got, want, rel, "")


def _assert_same(got: Any, want: Any, rel: float, name: Any) -> None:
    import numpy as np

    mine, other = _array(got), _array(want)
    assert mine.shape == other.shape, (name, mine.shape, other.shape)
    worst = float(np.abs(mine - other).max(initial=0.0))
    largest = float(np.abs(other).max(initial=0.0))
    assert worst <= rel * largest, (name, worst, largest)


def _array(value: Any) -> Any:
    import numpy as np

    found = value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)
    assert found.dtype == np.float64, found.dtype
    return found
