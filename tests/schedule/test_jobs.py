"""What submitting does with a head that is still starting."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule import jobs

NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try later"


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_S", 0.0)


def head_that_says(*errors: str) -> tuple[SimpleNamespace, list[str]]:
    """A head that rejects a job with these errors, one after the other, and then accepts it."""
    left, accepted = list(errors), []

    def submit_job(*, submission_id: str, **_rest):
        if left:
            raise RuntimeError(left.pop(0))
        accepted.append(submission_id)

    client = SimpleNamespace(submit_job=submit_job)
    return SimpleNamespace(client=client, address="http://head:8265"), accepted


def hand_over(head, tmp_path):
    jobs.hand_over(head, ["true"], tmp_path, submission_id="a", name="a")


def test_a_job_waits_for_the_agents_of_a_head_that_is_starting(tmp_path):
    head, accepted = head_that_says(NO_AGENT, NO_AGENT)
    hand_over(head, tmp_path)
    assert accepted == ["a"]


def test_a_head_without_agents_is_given_up_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "START_S", -1.0)
    head, accepted = head_that_says(NO_AGENT)
    with pytest.raises(EnvironmentFault, match="No available agent"):
        hand_over(head, tmp_path)
    assert accepted == []


def test_any_other_rejection_is_an_error_at_once(tmp_path):
    head, accepted = head_that_says("the working directory is too large")
    with pytest.raises(EnvironmentFault, match="too large"):
        hand_over(head, tmp_path)
    assert accepted == []
    hand_over(head, tmp_path)
    assert accepted == ["a"]


@pytest.mark.parametrize(
    ("patience_s", "listed", "want"),
    [(60.0, [(), (), ("10.0.0.1",)], ("10.0.0.1",)), (0.0, [(), ("10.0.0.1",)], ())],
)
def test_nodes_are_asked_for_until_the_first_is_listed(monkeypatch, patience_s, listed, want):
    answers = iter(listed)
    monkeypatch.setattr(jobs, "START_S", patience_s)
    monkeypatch.setattr(jobs, "_listed", lambda address, headers: next(answers))
    assert jobs._nodes("http://head:8265", {}) == want
