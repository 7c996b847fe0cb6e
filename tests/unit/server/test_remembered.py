"""What is cached between requests: fields, request lines, headers of answers; clients see no difference."""

import pytest
from server_kit import answers, app, connect, get, no_thread_left, post, serve

from flaskd.server import tasks
from flaskd.server.request import Request

pytestmark = pytest.mark.usefixtures("no_thread_left")


def echo(environ, start_response):
    """Answer with what the app gets of the request, and change all of it."""
    names = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "HTTP_X_A", "HTTP_X_B", "CONTENT_LENGTH")
    body = "|".join(environ.get(name, "-") for name in names) + "|" + environ["wsgi.input"].read().decode()
    environ.update(dict.fromkeys(names, "changed"))
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body.encode()]


@pytest.fixture
def fast(monkeypatch):
    """Which requests were common."""
    told, real = [], Request.take_common
    monkeypatch.setattr(Request, "take_common", lambda self, *data: told.append(real(self, *data)) or told[-1])
    return told


def test_each_request_of_a_connection_has_its_own_fields(serve, connect, fast):
    """Each request has its own fields: the same as those before, an extension of them, or one line less."""
    client = connect(serve(echo))
    for lines, seen in [
        (("X-A: 1", "X-B: 2"), b"GET|/a||1|2|-|"),
        (("X-A: 1", "X-B: 2"), b"GET|/a||1|2|-|"),
        (("X-A: 1", "X-B: 2", "X-C: 3"), b"GET|/a||1|2|-|"),
        (("X-A: 1", "X-B: 23"), b"GET|/a||1|23|-|"),
        (("X-A: 1",), b"GET|/a||1|-|-|"),
        ((), b"GET|/a||-|-|-|"),
    ]:
        assert client.send(get("/a", *lines)).response().body == seen
    assert fast == [True] * 6


def test_the_same_fields_have_bodies_of_their_own(serve, connect, fast):
    """With the same fields as before, a body that has come only in part is waited for."""
    client = connect(serve(echo))
    for body in (b"abc", b"def"):
        assert client.send(post("/", body)).response().body == b"POST|/||-|-|3|" + body
    whole = post("/", b"ghi")
    client.send(whole[:-1])
    client.send(whole[-1:])
    assert client.response().body == b"POST|/||-|-|3|ghi"
    assert fast[:2] == [True, True]


def test_a_path_is_told_from_its_query_each_time(serve, connect):
    """Path and query are told apart, also if the same line comes on another connection."""
    server = serve(echo)
    for _ in range(2):
        client = connect(server)
        assert client.send(get("/%61?b=%63")).response().body == b"GET|/a|b=%63|-|-|-|"
        assert client.send(post("/%61?b=%63", b"")).response().body == b"POST|/a|b=%63|-|-|0|"


def test_answers_with_the_same_headers_differ_in_length_and_date(serve, connect, monkeypatch):
    """Cached headers get the new length and date; a header that looks like a placeholder is sent unchanged."""
    dates = iter(["one", "two"])
    monkeypatch.setattr(tasks, "http_date", lambda _: next(dates))
    bodies = iter([b"a", b"bcd"])

    def app(environ, start_response):
        body = next(bodies)
        start_response("200 100%", [("X-Odd", "%(date)s %d %%"), ("Content-Length", str(len(body))), ("X-Odd", "2%")])
        return [body]

    client = connect(serve(app, adjustments={"ident": "50%s"}))
    for body, date in (b"a", "one"), (b"bcd", "two"):
        response = client.send("/").response()
        assert (response.body, response.headers["Date"]) == (body, date)
        assert response.headers.get_all("X-Odd") == ["%(date)s %d %%", "2%"]
        assert (response.status, response.headers["Server"]) == (200, "50%s")
