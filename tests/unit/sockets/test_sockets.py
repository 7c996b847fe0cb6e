import contextlib
import errno
import os
import select
import socket
import stat
import sys
from pathlib import Path

import pytest

from flaskd.errors import CannotCreateError
from flaskd.sockets import (
    Address,
    Listener,
    Node,
    bind_unix,
    closed_by_peer,
    each_closed_by_peer,
    inherited,
    passed_to_another,
)


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")


@pytest.fixture
def bound():
    """Binds listeners, and closes them at the end."""
    made = []

    def bind(text, backlog=None):
        made.append(Listener.bind(Address.parse(text)))
        if backlog is not None:
            made[-1].listen(backlog)
        return made[-1]

    yield bind
    for listener in made:
        listener.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "app.sock"


def connects(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


@pytest.mark.parametrize(
    ("text", "address", "shown", "url"),
    [
        ("127.0.0.1:8000", Address("127.0.0.1", 8000), "127.0.0.1:8000", "http://127.0.0.1:8000/"),
        ("localhost:0", Address("localhost", 0), "localhost:0", "http://localhost:0/"),
        ("shop.example:65535", Address("shop.example", 65535), "shop.example:65535", "http://shop.example:65535/"),
        (":80", Address("0.0.0.0", 80), "0.0.0.0:80", "http://127.0.0.1:80/"),
        ("0.0.0.0:80", Address("0.0.0.0", 80), "0.0.0.0:80", "http://127.0.0.1:80/"),
        ("[::1]:8000", Address("::1", 8000), "[::1]:8000", "http://[::1]:8000/"),
        ("[::]:8000", Address("::", 8000), "[::]:8000", "http://[::1]:8000/"),
        ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80), "[fe80::1%eth0]:80", "http://[fe80::1%eth0]:80/"),
        ("unix:/run/app.sock", Address(path="/run/app.sock"), "unix:/run/app.sock", "http+unix://%2Frun%2Fapp.sock/"),
        ("unix:/a b:c", Address(path="/a b:c"), "unix:/a b:c", "http+unix://%2Fa%20b%3Ac/"),
    ],
)
def test_an_address_as_it_is_written_shown_and_called(text, address, shown, url):
    """Each form of an address is read, shown so that it can be read back, and has a URL for clients."""
    assert Address.parse(text) == address
    assert str(address) == shown
    assert Address.parse(shown) == address
    assert address.url == url


@pytest.mark.parametrize(
    "text",
    [
        "", "8000", "localhost", "localhost:", "localhost:http", "127.0.0.1:65536", "127.0.0.1:123456", "::1:8000",
        "[::1]", "[]:80", "[localhost]:80", "[127.0.0.1]:80", "http://127.0.0.1:80", "127.0.0.1:-1", " 127.0.0.1:80",
        "127.0.0.1:80\n", "a b:80", "/run/app.sock:80", "127.0.0.1:\u0668\u0660", "unix:", "unix:/a\0b",
        "unix:/" + "x" * 107, "unix:/" + "é" * 54,
    ],
)  # fmt: skip
def test_what_is_no_address_is_told_so(text):
    """The error for a malformed address says what was expected; its caller adds what was written."""
    with pytest.raises(ValueError, match="^expected "):
        Address.parse(text)


@pytest.mark.parametrize(
    ("text", "announced"),
    [
        (":80", "http://0.0.0.0:80/"),
        ("0.0.0.0:80", "http://0.0.0.0:80/"),
        ("[::]:80", "http://[::]:80/"),
        ("127.0.0.1:80", "http://127.0.0.1:80/"),
        ("unix:/run/app.sock", "http+unix://%2Frun%2Fapp.sock/"),
    ],
)
def test_a_wildcard_is_announced_as_what_it_is(text, announced):
    """A wildcard address is announced as such, because other machines reach it, too."""
    assert Address.parse(text).announced == announced


def test_port_zero_becomes_the_port_that_was_found(bound):
    """With port 0 the listener's address has the port that the kernel chose."""
    listener = bound("127.0.0.1:0")
    assert listener.address.port == listener.socket.getsockname()[1] != 0
    assert str(listener.address) == f"127.0.0.1:{listener.address.port}"


def test_binding_is_not_listening(bound):
    """A bound address refuses clients until it listens."""
    listener = bound("127.0.0.1:0")
    where = listener.socket.getsockname()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where)
    listener.listen(8)
    socket.create_connection(where).close()


def test_a_busy_port_is_refused_with_a_hint(bound):
    """A second listener on the same port is refused at once, with the next step."""
    busy = bound("127.0.0.1:0", backlog=8).address
    with pytest.raises(CannotCreateError) as refused:
        bound(str(busy))
    assert str(refused.value) == (
        f"cannot listen on {busy}: Address already in use; "
        "another process listens there: choose another address, or stop that process"
    )
    assert isinstance(refused.value.__cause__, OSError)


def test_two_that_bound_before_either_listened_cannot_both_listen(bound):
    """SO_REUSEADDR lets two bind; the second to listen is refused by name all the same."""
    first = bound("127.0.0.1:0")
    try:
        second = bound(str(first.address))
    except CannotCreateError:
        return  # this kernel does not allow it
    first.listen(8)
    with pytest.raises(CannotCreateError, match=rf"^cannot listen on {first.address}: Address already in use"):
        second.listen(8)


def test_a_port_can_be_bound_again_at_once(bound):
    """Connections that linger after a close do not prevent the next listener."""
    listener = bound("127.0.0.1:0", backlog=8)
    with socket.create_connection(listener.socket.getsockname()):
        accepted, _ = listener.socket.accept()
        accepted.close()  # closed from this side first, so it lingers
        listener.close()
        assert bound(str(listener.address), backlog=8).address == listener.address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("192.0.2.1:0", "cannot listen on 192.0.2.1:0: .*; this machine has no such address"),
        ("a..b:80", r"cannot listen on a\.\.b:80: "),
        ("x" * 64 + ":80", "cannot listen on x+:80: "),
    ],
)
def test_a_place_that_cannot_be_had(text, why, bound):
    """Addresses of other machines and malformed names are refused by name."""
    with pytest.raises(CannotCreateError, match=f"^{why}"):
        bound(text)


def test_a_name_that_is_not_known_is_refused(monkeypatch, bound):
    """The error for an unknown name has the resolver's words."""

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("flaskd.sockets.listener.socket.getaddrinfo", unknown)
    with pytest.raises(CannotCreateError, match=r"^cannot listen on shop\.example:80: Name or service not known$"):
        bound("shop.example:80")


def test_a_family_that_is_not_allowed_is_told_so(monkeypatch, bound):
    """With RestrictAddressFamilies=AF_UNIX, as in the hardened unit, the error names that setting."""

    def restricted(*_):
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr("flaskd.sockets.listener.socket.socket", restricted)
    with pytest.raises(CannotCreateError, match=r"^cannot listen on 127\.0\.0\.1:80: .*RestrictAddressFamilies="):
        bound("127.0.0.1:80")


def test_a_port_that_needs_a_privilege_says_which(monkeypatch, bound):
    """The error for EACCES names the capability."""

    class Guarded(socket.socket):
        def bind(self, _where):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("flaskd.sockets.listener.socket.socket", Guarded)
    with pytest.raises(CannotCreateError, match="ports below 1024 need CAP_NET_BIND_SERVICE$"):
        bound("127.0.0.1:80")


def test_a_name_of_both_families_is_taken_as_ipv4(monkeypatch, bound):
    """A name with both families is bound as IPv4, because clients of "localhost" try that first."""
    four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))
    monkeypatch.setattr("flaskd.sockets.listener.socket.getaddrinfo", lambda *_, **__: [six, four])
    assert bound("localhost:0").socket.family == socket.AF_INET


@contextlib.contextmanager
def connecting(where):
    """A client whose handshake ends when it sends something, or 200 ms later (TCP_QUICKACK, tcp(7))."""
    with socket.socket(socket.AF_INET6 if ":" in where[0] else socket.AF_INET) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        client.connect(where)
        yield client


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of handshakes under way")
@pytest.mark.parametrize(
    ("listens", "connects"),
    [
        ("127.0.0.1:0", "127.0.0.1"),
        ("0.0.0.0:0", "127.0.0.2"),
        pytest.param("[::1]:0", "::1", marks=needs_ipv6),
        pytest.param("[::]:0", "::1", marks=needs_ipv6),
    ],
)
def test_handshakes_under_way_are_told(listens, connects, bound):
    """A client counts until it can be accepted; clients of other addresses or ports do not count."""
    listener, other = bound(listens, backlog=8), bound("127.0.0.3:0", backlog=8)
    assert listener.handshakes() == 0
    for _ in range(10):  # on a busy machine the handshake may be over too soon
        with connecting((connects, listener.address.port)) as client, connecting(other.socket.getsockname()):
            counts = listener.handshakes(), other.handshakes()
            client.send(b"x")
            assert listener.handshakes() == 0
            if counts == (1, 1):
                break
    assert counts == (1, 1)
    assert listener.waiting() >= 1


def test_handshakes_of_a_unix_listener(path, bound):
    """A Unix listener has no handshakes: its clients can be accepted at once."""
    assert bound(f"unix:{path}", backlog=8).handshakes() == 0


def test_handshakes_of_a_listener_that_was_closed(bound):
    """For a closed listener the number is 0, and there is no error."""
    listener = bound("127.0.0.1:0", backlog=8)
    listener.close()
    assert listener.handshakes() == 0


@needs_ipv6
def test_ipv6_is_ipv6_only(bound):
    """An IPv6 wildcard leaves the same IPv4 port free."""
    for tries_left in (4, 3, 2, 1, 0):
        six = bound("[::]:0", backlog=8)
        try:
            four = bound(f"127.0.0.1:{six.address.port}", backlog=8)
            break
        except CannotCreateError:  # another test's server may use the IPv4 port
            if not tries_left:
                raise
    assert six.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
    assert four.address.port == six.address.port
    socket.create_connection(("::1", six.address.port)).close()


def test_a_unix_listener_stands_with_its_mode_and_goes(path, bound):
    """The node appears with its final mode, without a hidden one beside it, and is removed with the listener."""
    listener = bound(f"unix:{path}", backlog=8)
    assert [each.name for each in path.parent.iterdir()] == ["app.sock"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert connects(path)
    listener.close()
    assert list(path.parent.iterdir()) == []
    listener.close()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_mode_is_the_one_asked_for(mode, path):
    """The umask does not change the node's mode."""
    before = os.umask(0o077)
    try:
        sock, node = bind_unix(path, mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert node.is_ours()
    sock.close()


def test_the_group_is_the_one_asked_for(path):
    """A group that this process may set is set."""
    sock, _ = bind_unix(path, mode=0o660, gid=os.getegid())
    assert path.stat().st_gid == os.getegid()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    sock.close()


@pytest.mark.parametrize(
    ("mode", "narrower"), [(0o660, 0o600), (0o600, 0o600), (0o666, 0o666), (0o664, 0o644), (0o750, 0o700)]
)
def test_a_group_that_cannot_be_given_costs_a_warning(mode, narrower, path, monkeypatch, caplog):
    """The node is made without the group, and the process' own group gets no more rights than others."""

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    sock, _ = bind_unix(path, mode=mode, gid=12345)
    assert stat.S_IMODE(path.stat().st_mode) == narrower
    assert connects(path)
    assert [each.name for each in path.parent.iterdir()] == ["app.sock"]
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot give a node in {path.parent} to group 12345: Operation not permitted; "
        f"it keeps its own, mode {narrower:04o}"
    ]
    sock.close()


def test_a_number_that_is_no_groups_costs_a_warning(path, caplog):
    """A number that chown(2) cannot take costs the same warning as one that it refuses."""
    bind_unix(path, mode=0o660, gid=1 << 40)[0].close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert f"to group {1 << 40}: " in caplog.text


def test_a_stale_socket_is_taken_over(path, bound):
    """A stale socket left by a crash is replaced."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    assert path.exists()
    bound(f"unix:{path}", backlog=8)
    assert connects(path)
    assert [each.name for each in path.parent.iterdir()] == ["app.sock"]


def test_a_hidden_node_left_by_a_crash_is_replaced(path, bound):
    """A hidden node left by a process with the same pid is replaced."""
    path.with_name(f".{os.getpid()}").touch()
    bound(f"unix:{path}")
    assert [each.name for each in path.parent.iterdir()] == ["app.sock"]


def test_a_live_socket_is_refused(path, bound):
    """A socket on which a process listens is left alone, and still answers."""
    bound(f"unix:{path}", backlog=8)
    before = path.stat().st_ino
    with pytest.raises(CannotCreateError, match=f"^cannot listen on unix:{path}: another process listens there$"):
        bound(f"unix:{path}")
    assert path.stat().st_ino == before
    assert connects(path)
    assert [each.name for each in path.parent.iterdir()] == ["app.sock"]


def test_a_live_socket_with_a_full_backlog_is_refused(path):
    """A listener with a full backlog counts as alive."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first:
            first.connect(str(path))
            with pytest.raises(CannotCreateError, match="another process listens there$"):
                bind_unix(path, mode=0o660)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_refused(kind, path, bound):
    """A file, directory or link in place of the socket is never replaced."""
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("/nowhere")
    before = path.lstat()
    with pytest.raises(CannotCreateError, match=f"^cannot listen on unix:{path}: a file that is not a socket stands"):
        bound(f"unix:{path}")
    assert path.lstat() == before


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("missing/app.sock", "No such file or directory"),
        ("file/app.sock", "Not a directory"),
        ("x" * 90, "AF_UNIX path too long"),
    ],
)
def test_a_path_that_cannot_be_had(where, why, tmp_path):
    """Missing directories and names that are too long are refused by name, and nothing is left."""
    (tmp_path / "file").touch()
    with pytest.raises(CannotCreateError, match=f"^cannot listen on unix:{tmp_path / where}: {why}$"):
        bind_unix(tmp_path / where, mode=0o660)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_only_our_own_node_is_removed(path, bound):
    """A node that replaced ours is not removed."""
    listener = bound(f"unix:{path}")
    path.rename(path.with_name("moved.sock"))  # keeps the inode from being used again
    path.write_text("a successor's")
    listener.close()
    assert path.read_text() == "a successor's"


def test_a_second_close_leaves_a_successor_alone(path, bound):
    """A listener that was closed never removes a node again, because a new one may have the same inode."""
    listener = bound(f"unix:{path}", backlog=8)
    path.with_name("kept").hardlink_to(path)
    listener.close()
    path.with_name("kept").rename(path)
    listener.close()
    assert path.exists()


def test_a_node_that_is_gone_is_nobodys(path):
    """Removing a node that does not exist any more does nothing."""
    path.touch()
    node = Node.of(path)
    assert node.is_ours()
    path.unlink()
    assert not node.is_ours()
    node.remove()


def test_a_node_that_cannot_be_removed_costs_a_warning(path, bound, monkeypatch, caplog):
    """If the node cannot be removed, the listener is closed all the same, and a warning names the node."""
    listener = bound(f"unix:{path}", backlog=8)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("flaskd.sockets.unix.Path.unlink", refused)
    listener.close()
    assert listener.socket.fileno() == -1
    assert caplog.messages == [f"cannot remove {path}: Permission denied; remove it by hand"]


@pytest.mark.parametrize("poll", [True, False], ids=["poll", "no-poll"])
def test_who_has_closed_is_seen_of_all_at_once(monkeypatch, poll):
    """One call tells the same as one for each socket: closed or reset by the peer or here; not with unread data."""
    if not poll:
        monkeypatch.delattr(select, "POLLRDHUP", raising=False)
    with contextlib.ExitStack() as stack:
        pairs = [[stack.enter_context(each) for each in socket.socketpair()] for _ in range(5)]
        (open_, _), (closed, peer), (here, _), (asked, asking), (spoke, speaking) = pairs
        peer.close()
        here.close()
        asking.sendall(b"GET / HTTP/1.1\r\n")
        asking.shutdown(socket.SHUT_WR)
        speaking.sendall(b"GET / HTTP/1.1\r\n")
        socks = [open_, closed, here, None, asked, spoke]
        assert each_closed_by_peer(socks) == [closed_by_peer(each) for each in socks]
        assert each_closed_by_peer(socks) == [False, True, True, False, False, False]
    assert each_closed_by_peer([]) == []


def test_sockets_passed_to_another_are_told():
    """Sockets that LISTEN_PID gives to a shell around flaskd are not used, and the message names that process."""
    mine = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"}
    assert passed_to_another(mine) == ""
    parent = os.getppid()
    name = Path(f"/proc/{parent}/comm").read_text().strip()
    said = passed_to_another({**mine, "LISTEN_PID": str(parent)})
    assert said.startswith(f"2 sockets were passed to pid {parent} ({name}), and this is pid {os.getpid()}: ")
    assert "1 socket was passed to pid 999999999 (which is gone)" in passed_to_another(
        {"LISTEN_FDS": "1", "LISTEN_PID": "999999999"}
    )
    for pid in ({}, {"LISTEN_PID": ""}, {"LISTEN_PID": "../self"}):
        assert "1 socket was passed to no process" in passed_to_another({"LISTEN_FDS": "1", **pid})
    for none in (
        {},
        {"LISTEN_FDS": "0", "LISTEN_PID": "1"},
        {"LISTEN_PID": "1"},
        {"LISTEN_FDS": "x", "LISTEN_PID": "1"},
    ):
        assert passed_to_another(none) == ""
        assert inherited(none) == {}


@pytest.mark.parametrize("count", ["x", "-1", "1e9", ""])
def test_a_count_of_sockets_that_is_none_is_a_fault(count):
    """A LISTEN_FDS for this process that is no number is a fault; the default address is not used instead."""
    with pytest.raises(CannotCreateError, match="LISTEN_FDS is '"):
        inherited({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})
