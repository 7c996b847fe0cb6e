"""What the watchdog asks of a server: whether its loop answers, and what its threads are at."""

import threading

from server_kit import PATIENCE, answers, app, connect, get, serve

from flaskd.server.loop import EventLoop


def test_a_loop_answers_by_itself(serve, app, connect):
    """With all threads busy, it answers a connection of one's own; nobody ever hears of it, and the app is not asked."""
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
    """It needs no listener."""
    server = serve()
    server.drain()
    assert server.answers(PATIENCE)


def test_a_loop_that_hangs_does_not_answer(serve):
    """Within the time it has; once it turns again, it does."""
    server, hold = serve(), threading.Event()
    server.loop.call(lambda: hold.wait(PATIENCE))
    assert not server.answers(0.05)
    hold.set()
    assert server.answers(PATIENCE)
    server.stop()
    assert not server.answers(PATIENCE)


def test_what_all_workers_are_at(serve, app, connect):
    """Nothing while one is free; then a value that is the same as long as nothing moves."""
    server = serve(threads=2)
    clients = [connect(server) for _ in range(3)]
    assert server.all_are_at() is None
    for client in clients[:2]:
        assert server.all_are_at() is None
        client.send(get("/gate"))
        app.entered(1)
    at = server.all_are_at()
    assert at is not None
    clients[2].send(get("/gate"))  # it waits: that is no progress
    assert server.answers(PATIENCE)
    assert server.all_are_at() == at
    app.released.set()
    for client in clients:
        assert client.response().status == 200


def test_a_loop_without_workers_is_never_taken_for_stuck(serve):
    """With no threads the loop runs the app itself: whether it hangs shows in whether it answers."""
    server = serve(threads=0)
    assert server.all_are_at() is None
    assert server.answers(PATIENCE)


def test_the_names_that_the_pulse_leans_on():
    """The loop keeps the streams that are under way; a worker that serves one is never taken for stuck."""
    assert isinstance(EventLoop(lambda *_: [], [], threads=1, adjustments={}).account.streams, set)
