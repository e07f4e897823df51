"""A fine-tune that is killed between two of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ftsec_ray.training import loop


def killed_after(steps: int, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `run`, which is interrupted after so many optimizer steps."""
    done: list[int] = []
    one_step = loop._one_step

    def step(*args: Any, **kwargs: Any) -> None:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        one_step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_one_step", step)
        with pytest.raises(KeyboardInterrupt):
            run()
