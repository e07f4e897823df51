"""Chat templates are programs of strangers: each is tried in a process of its own, under a limit of
time, memory and text, before this one renders it.
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
"""Variables of the environment without which some interpreters do not start."""
_WAITS = 4
"""Times the limit of seconds that are waited for: a busy machine gives a process a share."""
_START_S = 30
_SHOWN = 200


def check_template(template: str) -> None:
    """SpecError for a template that takes more than the limits for a small conversation."""
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
    found = _answer(json.dumps(given), seconds)
    if found.get("over") == "seconds":
        _refuse(template, TEMPLATE_SECONDS)
    if found.get("over") == "memory":
        _refuse(template, TEMPLATE_BYTES)
    if found.get("chars", 0) > chars:
        _refuse(template, TEMPLATE_CHARS)


def _answer(given: str, seconds: int) -> dict[str, Any]:
    """What the process found; which limit ended it, where one did."""
    # neither the secrets of this environment nor its settings are for a template
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
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise EnvironmentFault(
            "a chat template could not be tried in a process of its own",
            done.stderr.decode(errors="replace")[-_SHOWN:],
            "a Python that starts, with jinja2",
        ) from error
    return found


def _refuse(template: str, limit: Limit) -> NoReturn:
    raise SpecError(
        "a chat template that takes too much to render a small conversation",
        template[:_SHOWN],
        f"at most {limit.value:,} {limit.counts}",
        f"take the template that the model is published with; {raised_by(limit)}",
    )
