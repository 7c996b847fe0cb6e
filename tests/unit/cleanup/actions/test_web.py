import json
import shutil
import socket
import threading

import pytest
from cleanup_kit import run
from http_endpoint import endpoint, make_certificate
from patience import PATIENCE

from flaskd.cleanup import ACTIONS, Fate, Step, action_specs
from flaskd.config import load_mapping
from flaskd.errors import ConfigError

SECRET = "very-secret-token"


def perform(use, *, timeout=PATIENCE, **fields):
    """Run one action on its own and give its result; fields are validated as in a file, by their written names."""
    action = ACTIONS[use]
    action.prepare(None)
    step = Step("it", action, action.fields.model_validate(fields), action.default_phase, timeout)
    return run(step)["it"]


@pytest.fixture
def service():
    with endpoint() as place:
        yield place


def test_a_webhook_sends_what_it_is_given(service):
    """Method, path with query, headers and JSON are sent; the status is the detail."""
    result = perform(
        "webhook", url=f"{service.url}/hooks?room=ops", json={"text": "shöp", "n": [1, None]},
        headers={"authorization": f"Bearer {SECRET}"},
    )  # fmt: skip
    assert (result.fate, result.detail) == (Fate.OK, "200 OK")
    ((method, path, headers, body),) = service.asked
    assert (method, path) == ("POST", "/hooks?room=ops")
    assert json.loads(body) == {"text": "shöp", "n": [1, None]}
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert headers["User-Agent"] == "flaskd"


def test_a_webhook_without_json_has_no_body(service):
    """Every method is allowed, and a configured content type replaces the usual one."""
    assert perform("webhook", url=service.url, method="GET").fate is Fate.OK
    assert perform("webhook", url=service.url, headers={"content-type": "text/plain"}, json="x").fate is Fate.OK
    (bare, typed) = service.asked
    assert (bare[0], bare[1], bare[3]) == ("GET", "/", b"")
    assert "Content-Length" not in bare[2]
    assert typed[2]["Content-Type"] == "text/plain"


@pytest.mark.parametrize(
    ("status", "fate", "words"),
    [
        (204, Fate.OK, "204 No Content"),
        (302, Fate.OK, "302 Found; redirections are not followed"),
        (400, Fate.FAILED, "answered with 400 Bad Request"),
        (503, Fate.FAILED, "answered with 503 Service Unavailable"),
    ],
)
def test_the_status_decides(service, status, fate, words):
    """A status of 400 and above fails the webhook."""
    service.answer = (status, b"")
    result = perform("webhook", url=service.url)
    assert (result.fate, result.detail or result.why) == (fate, words)


def test_no_secret_is_ever_told(service, caplog):
    """Neither URL, headers nor body are in the result or the log, not even if the server echoes them."""
    caplog.set_level("DEBUG")
    service.answer = (500, SECRET.encode())
    there = {"url": f"{service.url}/{SECRET}", "json": {"token": SECRET}, "headers": {"X-Token": SECRET}}
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}/{SECRET}"
    results = [
        perform("webhook", **there),
        perform("webhook", **{**there, "url": nowhere}),
        perform("webhook", **{**there, "url": f"http://{SECRET}.invalid/"}),
        perform("webhook", **{**there, "url": f"http://{'x' * 64}.invalid/{SECRET}"}),
    ]
    assert [each.fate for each in results] == [Fate.FAILED] * 4
    assert SECRET not in str(results)
    assert SECRET not in caplog.text
    assert results[1].why == "cannot reach it: Connection refused"


def test_an_answer_that_never_comes(service):
    """Without an answer the step ends at its timeout, and closes its connection."""
    service.silent.set()
    result = perform("webhook", url=service.url, timeout=0.2)
    assert result.fate is Fate.TIMED_OUT
    assert "not done within its timeout of 200ms" in result.why


def test_an_answer_that_trickles(service):
    """A server that sends single bytes does not delay the step past its timeout; the connection is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        broken_off = threading.Event()

        def trickle():
            client, _ = listener.accept()
            with client:
                client.settimeout(0.02)
                client.sendall(b"HTTP/1.1 200 O")
                while not broken_off.is_set():
                    try:
                        if not client.recv(65536):
                            broken_off.set()
                    except TimeoutError:
                        client.sendall(b"K")
                    except OSError:
                        broken_off.set()

        thread = threading.Thread(
            target=trickle, daemon=True
        )  # if the connection is not closed, it ends with the tests
        thread.start()
        result = perform("webhook", url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3)
        assert result.fate is Fate.TIMED_OUT
        assert broken_off.wait(PATIENCE)


def test_what_is_no_http_is_named():
    """A server that does not speak HTTP is a failure without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(b"220 mail.example.com ESMTP\r\n\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        result = perform("webhook", url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert (result.why, result.trace) == ("got no HTTP answer: BadStatusLine", "")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_https_is_verified(tmp_path, monkeypatch):
    """A trusted certificate is accepted, and any other is refused."""
    certificate = make_certificate(tmp_path / "certificate.pem")
    with endpoint(certificate=certificate) as service:
        refused = perform("webhook", url=service.url)
        assert refused.why == "cannot trust the server: self-signed certificate"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert perform("webhook", url=service.url).detail == "200 OK"
        assert len(service.asked) == 1


@pytest.mark.parametrize(
    ("use", "fields", "fault"),
    [
        ("webhook", {}, "with.url: expected a value"),
        ("webhook", {"url": "ftp://x"}, "with.url: expected a URL such as https://hooks.example.com/stopped"),
        ("webhook", {"url": "http://x:99999/"}, "with.url: expected a URL"),
        ("webhook", {"url": "http://x/ y"}, "with.url: expected a URL"),
        ("webhook", {"url": "http://u:p@x/"}, "with.url: expected a URL"),
        ("webhook", {"url": "http://x", "method": "post"}, "with.method: expected one of POST"),
        ("webhook", {"url": "http://x", "headers": {"a b": "c"}}, "expected the name of an HTTP header"),
        ("webhook", {"url": "http://x", "headers": {"a": "c\r\nd: e"}}, "expected printable ASCII text"),
        ("webhook", {"url": "http://x", "body": 1}, 'expected a known key, got "body"'),
        ("consul.deregister", {}, "with.service_id: expected a value"),
        ("consul.deregister", {"service_id": "a", "address": "unix:///x"}, "with.address: expected an address such as"),
    ],
)
def test_wrong_fields_are_faults_with_a_place(use, fields, fault):
    """`flaskd check` finds values that cannot be sent."""
    with pytest.raises(ConfigError) as caught:
        load_mapping({"cleanup": {"policies": {"it": {"use": use, "with": fields}}}}, actions=action_specs())
    assert fault in str(caught.value)


def test_consul_is_told(service, monkeypatch):
    """The documented request is sent, with the token; the address comes from the policy, else the environment."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", service.url.removeprefix("http://"))
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-env")
    assert perform("consul.deregister", service_id="shop/1 é").detail == "deregistered shop/1 é"
    assert perform("consul.deregister", service_id="shop-1", address=service.url, token=SECRET).fate is Fate.OK
    (first, second) = service.asked
    assert first[:2] == ("PUT", "/v1/agent/service/deregister/shop%2F1%20%C3%A9")
    assert first[2]["X-Consul-Token"] == "from-env"
    assert second[:2] == ("PUT", "/v1/agent/service/deregister/shop-1")
    assert second[2]["X-Consul-Token"] == SECRET


def test_consul_may_be_told_twice(service):
    """A service that the agent does not know counts as deregistered; another 404, or any other status, is a failure."""
    service.answer = (404, b'Unknown service ID "shop-1". Ensure that the service ID is passed, not the service name.')
    result = perform("consul.deregister", service_id="shop-1", address=service.url)
    assert (result.fate, result.detail) == (Fate.OK, "was not registered")
    for status, words in ((404, "404 Not Found"), (403, "403 Forbidden"), (301, "301 Moved Permanently")):
        service.answer = (status, SECRET.encode())
        result = perform("consul.deregister", service_id="shop-1", address=service.url)
        assert (result.fate, result.why) == (Fate.FAILED, f"Consul answered with {words}")


def test_consuls_environment_can_be_wrong(monkeypatch):
    """An unusable address in the environment is named."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "unix:///run/consul.sock")
    result = perform("consul.deregister", service_id="shop-1")
    assert result.why.startswith('cannot use $CONSUL_HTTP_ADDR "unix:///run/consul.sock": expected an address')
