"""The ledger: what counts as lost, and how a client's texts are shown."""

import pytest

from flaskd.ledger import DrainReport, visible
from flaskd.process.exit import Unfinished


def test_what_a_client_sent_is_of_bounded_length():
    """A path of the largest size takes a few hundred bytes in a record, which notes its length."""
    shown = visible("/" + "\x1b" * 200_000)
    assert shown.startswith("/%1B%1B")
    assert shown.endswith("%1B...(200001%20characters)")
    assert len(shown) < 4000
    assert visible("/short") == "/short"


@pytest.mark.parametrize("more", [(), (Unfinished("thread/mailer", "a stack"),)])
def test_what_was_not_finished_is_a_loss(more):
    """With unfinished work the stop is not clean, and its account names the work."""
    report = DrainReport(completed=1).with_unfinished(more)
    assert report.clean == (not more)
    assert ("unfinished=1" in str(report)) == bool(more)
    assert report.as_json().get("unfinished", []) == [{"name": "thread/mailer", "stack": "a stack"}] * len(more)
