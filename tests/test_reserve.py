"""Descriptors that an app cannot use up."""

import contextlib
import os
import resource

import pytest

from flaskd.reserve import Reserve

LIMIT = 256


def soft():
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.fixture
def reserve():
    """A reserve of a process that may have few descriptors; the limit is what it was before in the end."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, before[1]))
    yield Reserve()
    assert soft() == LIMIT
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def leak():
    """Opens all descriptors that can be had; they are closed in the end."""
    held = []

    def leak():
        with contextlib.suppress(OSError):  # EMFILE
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))

    yield leak
    for each in held:
        os.close(each)


def null():
    return os.open(os.devnull, os.O_RDONLY)


def test_what_is_kept_can_be_used_again_and_again(reserve, leak):
    """The app gets none of it, also not after flaskd has closed what it opened."""
    with reserve.kept():
        leak()
        for _ in range(3):
            opened = [reserve.open(null) for _ in range(8)]
            leak()
            for each in opened:
                os.close(each)
            leak()
            with pytest.raises(OSError, match="Too many open files"):
                null()


def test_the_cleanup_has_a_share_and_the_record_the_rest(reserve, leak):
    """After `share` most of it is everybody's; the last of it is still flaskd's."""
    with reserve.kept():
        leak()
        reserve.share()
        os.close(null())
        leak()
        os.close(reserve.open(null))


def test_uses_may_overlap(reserve):
    """The limit is raised while there is one, and lowered with the last."""
    with reserve.kept():
        less = soft()
        assert less < LIMIT
        with reserve.used():
            with reserve.used():
                assert soft() == LIMIT
            assert soft() == LIMIT
        assert soft() == less


def test_a_limit_that_others_set_meanwhile_is_respected(reserve):
    """What is kept is relative to the limit, whoever moves that."""
    with reserve.kept():
        less = soft()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (less - 10, hard))
        with reserve.used():
            assert soft() == LIMIT - 10
        resource.setrlimit(resource.RLIMIT_NOFILE, (less, hard))


@pytest.mark.parametrize("used", [False, True])
def test_a_forked_child_has_the_whole_limit(reserve, used):
    """Nothing is kept from a child, whatever was under way when it was forked."""
    with reserve.kept(), reserve.used() if used else pytest.MonkeyPatch.context():
        child = os.fork()
        if child == 0:
            reserve.forget()
            os._exit(soft() == LIMIT)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1


def test_without_a_reserve_what_cannot_be_opened_is_raised(reserve, leak):
    """In a process that keeps none, nothing changes."""
    leak()
    with pytest.raises(OSError, match="Too many open files"):
        reserve.open(null)
