"""What the watchdog asks a server: whether its loop answers, and whether its threads make progress."""

import threading

from server_kit import PATIENCE, answers, app, connect, get, serve

from flaskd.server.loop import EventLoop


def test_a_loop_answers_by_itself(serve, app, connect):
    """With all threads busy, the loop answers a request from inside; it is in no count, and the app does not run."""
    server = serve(threads=1)
    client = connect(server)
    client.send(get("/gate"))
    app.entered(1)
    before = server.counted, server.in_flight, server.connections
    assert server.answers(PATIENCE)
    assert (server.counted, server.in_flight, server.connections) == before
    app.released.set()
    assert client.response().status == 200


def test_a_drained_server_answers_too(serve):
    """A drained server answers without a listener."""
    server = serve()
    server.drain()
    assert server.answers(PATIENCE)


def test_a_loop_that_hangs_does_not_answer(serve):
    """A loop that hangs does not answer in time; once it turns again, it does."""
    server, hold = serve(), threading.Event()
    server.loop.call(lambda: hold.wait(PATIENCE))
    assert not server.answers(0.05)
    hold.set()
    assert server.answers(PATIENCE)
    server.stop()
    assert not server.answers(PATIENCE)


def test_what_all_workers_are_at(serve, app, connect):
    """None while a thread is free; otherwise a value that stays the same while nothing moves."""
    server = serve(threads=2)
    clients = [connect(server) for _ in range(3)]
    assert server.all_are_at() is None
    for client in clients[:2]:
        assert server.all_are_at() is None
        client.send(get("/gate"))
        app.entered(1)
    at = server.all_are_at()
    assert at is not None
    clients[2].send(get("/gate"))  # a waiting request is no progress
    assert server.answers(PATIENCE)
    assert server.all_are_at() == at
    app.released.set()
    for client in clients:
        assert client.response().status == 200


def test_a_loop_without_workers_is_never_taken_for_stuck(serve):
    """Without threads the loop runs the app itself, so a hang shows in that the loop does not answer."""
    server = serve(threads=0)
    assert server.all_are_at() is None
    assert server.answers(PATIENCE)


def test_the_names_that_the_pulse_leans_on():
    """The account has the streams under way; a thread that serves one never counts as stuck."""
    assert isinstance(EventLoop(lambda *_: [], [], threads=1, adjustments={}).account.streams, set)
