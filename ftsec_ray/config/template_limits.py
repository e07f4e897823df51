"""Limits on chat templates. A template is untrusted code: before this process renders it, a
separate process tries it with limits on time, memory and output length.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from ftsec_ray.config.limits import Limit
from ftsec_ray.config.open_limits import (
    TEMPLATE_BYTES,
    TEMPLATE_CHARS,
    TEMPLATE_SECONDS,
    raised_by,
)
from ftsec_ray.errors import EnvironmentFault, SpecError

_PROBE = Path(__file__).with_name("template_probe.py")
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
"""Environment variables that some interpreters need to start."""
_WAITS = 4
"""The parent process waits this many times the limit of seconds: a busy machine is slower."""
_START_S = 30
_SHOWN = 200


def check_template(template: str) -> None:
    """Raise SpecError if the template exceeds a limit on one of the test conversations."""
    _checked(template, TEMPLATE_SECONDS.value, TEMPLATE_BYTES.value, TEMPLATE_CHARS.value)


@lru_cache(maxsize=256)
def _checked(template: str, seconds: int, memory: int, chars: int) -> None:
    given = {
        "template": template,
        "values": {**_TOKENS, **_OPTIONS},
        "seconds": seconds,
        "memory": memory,
        "chars": chars,
    }
    result = _answer(json.dumps(given), seconds)
    if result.get("over") == "seconds":
        _refuse(template, TEMPLATE_SECONDS)
    if result.get("over") == "memory":
        _refuse(template, TEMPLATE_BYTES)
    if result.get("chars", 0) > chars:
        _refuse(template, TEMPLATE_CHARS)


def _answer(given: str, seconds: int) -> dict[str, Any]:
    """The JSON result of the separate process, or {"over": limit} if a limit ended it."""
    # A template must see neither the secrets nor the settings of this environment.
    environment = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUTF8": "1"}
    environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    try:
        done = subprocess.run(  # noqa: S603 - our own script under our own interpreter
            [sys.executable, "-B", str(_PROBE)],
            input=given.encode(),
            capture_output=True,
            env=environment,
            timeout=_WAITS * seconds + _START_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"over": "seconds"}
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"over": "seconds"}
    if done.returncode in (-signal.SIGSEGV, -signal.SIGABRT) or b"MemoryError" in done.stderr:
        return {"over": "memory"}
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise EnvironmentFault(
            "the process that tests a chat template failed",
            done.stderr.decode(errors="replace")[-_SHOWN:],
            f"{sys.executable} starts and can import jinja2",
        ) from error
    return result


def _refuse(template: str, limit: Limit) -> NoReturn:
    raise SpecError(
        "the chat template exceeds a limit",
        template[:_SHOWN],
        f"at most {limit.value:,} {limit.counts}",
        f"use the template that is published with the model; {raised_by(limit)}",
    )
