"""A model behind an OpenAI-compatible endpoint that grades with a rubric.

The key comes from an environment variable and is not written to any file, record or error.
Transient failures (429, 5xx, a lost connection, a timeout) are retried with growing waits; a
request that the service rejects (400, 413, 422) gets no verdict and is counted.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ftsec_ray.config.sweep import JudgeConfig
from ftsec_ray.errors import EnvironmentFault, StageError
from ftsec_ray.evals.rubrics import Reply, RubricJudge, rubric_hash
from ftsec_ray.redact import redacted

AT_ONCE = 4
"""Maximum number of concurrent calls."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_REJECTED = frozenset({400, 413, 422})
_SHOWN = 200


class _Passing(Exception):
    """A transient failure of a call, which is retried."""


class Endpoint(RubricJudge):
    """A model behind an OpenAI-compatible endpoint with a rubric: verdicts like those of `rubric`.

    `judge: {endpoint: http://host/v1, model: NAME, rubric: <text or file>, key_env: VARIABLE}`, at
    temperature 0. The record holds its tokens, and its cost if prices are given. The service may
    change the model behind this name: only the name and the URL are pinned.
    """

    IS_MODEL, RUNS_HERE = True, False

    def __init__(self, config: JudgeConfig, *, device: str = "cpu") -> None:
        del device
        if config.endpoint is None:
            raise EnvironmentFault(
                "the judge `endpoint` has no URL", config.model, "{endpoint: URL, model: NAME}"
            )
        self.config = config
        self.used: Counter[str] = Counter()
        """Calls, tokens, retries and rejected requests."""
        self.name = f"endpoint:{config.model}@{rubric_hash(config.rubric)}.{self.VERSION}"

    def replies(self, questions: Sequence[str]) -> list[Reply]:
        """The service's reply to each question."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(self._answer, questions))
        for _, used in answers:
            self.used += used
        return [reply for reply, _ in answers]

    def notes(self) -> dict[str, Any]:
        """Usage; with `usd` if the sweep gives prices."""
        used: dict[str, Any] = dict(self.used)
        prices = self.config.usd_per_million_input, self.config.usd_per_million_output
        if None not in prices:
            tokens = self.used["input_tokens"], self.used["output_tokens"]
            used["usd"] = round(
                sum(n * (price or 0.0) for n, price in zip(tokens, prices, strict=True)) / 1e6, 6
            )
        return {"judge_endpoint": {"url": self.config.endpoint, **used}}

    def _answer(self, text: str) -> tuple[Reply, Counter[str]]:
        """The reply to one question, and its usage."""
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception_type,
            stop_after_attempt,
            wait_random_exponential,
        )

        used: Counter[str] = Counter(calls=1)

        def again(state: RetryCallState) -> None:
            del state
            used["retries"] += 1

        policy = Retrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_after_attempt(1 + self.config.retries),
            wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            before_sleep=again,
            reraise=True,
        )
        try:
            status, body = policy(self._post, text)
        except _Passing as error:
            raise StageError(
                "the endpoint of the judge does not answer",
                str(error),
                f"an answer within {1 + self.config.retries} attempts of {self.config.timeout_s:g}"
                " s each",
                "check that the service is running, or raise `retries` or `timeout_s` of the judge",
            ) from None
        if status in _REJECTED:
            used["rejected"] += 1
            return Reply(None, f"HTTP {status}: {body[:_SHOWN]}"), used
        said = self._read_body(body, used)
        return Reply(said, said), used

    def _read_body(self, body: str, used: Counter[str]) -> str:
        try:
            plain = json.loads(body)
            said = plain["choices"][0]["message"]["content"] or ""
            usage = plain.get("usage") or {}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise StageError(
                "the answer of the judge's endpoint has an unexpected format",
                body[:_SHOWN],
                "the format of OpenAI's chat completions",
                f"{type(error).__name__}: {error}",
            ) from error
        used["input_tokens"] += int(usage.get("prompt_tokens") or 0)
        used["output_tokens"] += int(usage.get("completion_tokens") or 0)
        return str(said)

    def _post(self, text: str) -> tuple[int, str]:
        """Status and body of one call; _Passing for a transient failure."""
        url = f"{str(self.config.endpoint).rstrip('/')}/chat/completions"
        content = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.config.max_new_tokens,
        }
        headers = {"Content-Type": "application/json", **self._key()}
        request = urllib.request.Request(  # noqa: S310 (JudgeConfig allows only http and https)
            url, json.dumps(content).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout_s) as answer:  # noqa: S310
                return answer.status, answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            body = redacted(error.read().decode("utf-8", "replace"))
            if error.code in _PASSING:
                raise _Passing(f"HTTP {error.code}: {body[:_SHOWN]}") from None
            if error.code in _REJECTED:
                return error.code, body
            raise EnvironmentFault(
                "the endpoint of the judge rejects the call",
                f"HTTP {error.code}: {body[:_SHOWN]}",
                "a key, a URL and a model that the service accepts",
                f"check {self.config.key_env or 'key_env'} and the judge's `endpoint` and `model`",
            ) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise _Passing(redacted(f"{type(error).__name__}: {error}")) from None

    def _key(self) -> dict[str, str]:
        if self.config.key_env is None:
            return {}
        key = os.environ.get(self.config.key_env)
        if not key:
            raise EnvironmentFault(
                "the key of the judge's endpoint is not set",
                self.config.key_env,
                "an environment variable with the key on every machine that scores",
                f"export {self.config.key_env}=... before the run",
            )
        return {"Authorization": f"Bearer {key}"}
