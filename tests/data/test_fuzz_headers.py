"""Answers of servers with anything in their headers: a download takes them, or says in one line what is wrong."""

import hashlib
import random
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from mutations import hammer, mutated_bytes, read_or_refused, some_or_many

from biomamba_jax.data.download import Downloader, Remote, list_files
from biomamba_jax.errors import UserError

HEADERS = (
    b"""Content-Length: 20
Content-Length: -1
Content-Length: 99999999999999999999
Content-Length: abc
Transfer-Encoding: chunked
Transfer-Encoding: gzip, chunked
Content-Encoding: gzip
Content-Encoding: br
Connection: close
Connection: keep-alive
Content-Range: bytes 5-9/3
Content-Type: text/html; charset=\xff
Location: /x
Location: http://[::1
Location: http://a..b/
Location: //
Location: \xed\xa0\xbd
Location: file:///etc/passwd
Retry-After: 99999999
Set-Cookie: a=b; Expires=never; Domain=\x00
no colon
: no name
 folded
\x00: \x00""".split(b"\n")
    + [b"x" * 70_000, b"A: " + b"b" * 70_000]
)
STATUS = b"""HTTP/1.1 200 OK
HTTP/1.1 206 Partial
HTTP/1.1 302 Found
HTTP/1.1 999 What
HTTP/9.9 200
HTTP/1.1 -1 x
200 OK
HTTP/1.1 100 Continue
ICY 200 OK
HTTP/1.1 416 No
HTTP/1.1 204 None
HTTP/1.1 401 Who
HTTP/1.1 304 Same
""".split(b"\n")
BODY = b"0123456789" * 2
NAME = "pubmed26n0001.xml.gz"


class Server:
    """A server on loopback that answers the next request with any bytes; it closes each connection."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        self.answers: Callable[[bytes], Iterator[bytes]] = lambda request: iter(())
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                request = connection.recv(65536)
                for part in self.answers(request):
                    connection.sendall(part)
            except OSError:
                pass  # the other side has gone

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


def whole_answer(body: bytes) -> bytes:
    # Close is said: a client that kept the connection could send its next request before it learns of the end.
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def any_answer(draw: random.Random) -> bytes:
    head = [draw.choice(STATUS if draw.random() < 0.5 else STATUS[:1]), *draw.choices(HEADERS, k=draw.randrange(4))]
    data = b"\r\n".join([*head, b"", BODY])
    return mutated_bytes(data, draw) if draw.random() < 0.4 else data


@some_or_many(shares=20)
def test_an_answer_with_any_headers_is_taken_or_told_in_one_line(server, tmp_path, capfd, examples, seconds):
    sidecar = f"MD5({NAME})= {hashlib.md5(BODY).hexdigest()}".encode()
    outcomes = Counter[str]()

    def check(seed: int) -> None:
        draw = random.Random(seed)
        broken = draw.choice([b"/ ", b".md5 ", b".gz "])
        answer = any_answer(draw)

        def answers(request: bytes) -> Iterator[bytes]:
            asked = request.split(b"\r\n")[0]
            if broken in asked:
                yield answer
            elif b".md5 " in asked:
                yield whole_answer(sidecar)
            else:
                yield whole_answer(BODY if b".gz " in asked else f'<a href="{NAME}">'.encode())

        server.answers = answers
        folder = tmp_path / "nlm"
        shutil.rmtree(folder, ignore_errors=True)

        def read() -> None:
            files = list_files(server.url, "baseline", tries=1, timeout=0.5)
            Downloader(folder, 1, 0.5, 0.0).fetch_all(files, 1, lambda file, what: None)
            assert (folder / NAME).read_bytes() == BODY

        outcomes[read_or_refused(read)] += 1

    hammer(check, examples, seconds)
    assert outcomes["refused"] and outcomes["read"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("part", [b"/ ", b".md5 ", b".gz "])
@pytest.mark.parametrize("url", [b"//[", b"http://[::1", b"http://a..b/", b"ftp://a/"])
def test_a_redirect_to_no_url_is_told_in_one_line(server, tmp_path, part, url):
    def answers(request: bytes) -> Iterator[bytes]:
        asked = request.split(b"\r\n")[0]
        if part in asked:
            yield b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + url + b"\r\n\r\n"
        yield whole_answer(b"0" * 32 if b".md5 " in asked else f'<a href="{NAME}">'.encode())

    server.answers = answers
    with pytest.raises(UserError, match=server.url):
        files = list_files(server.url, "baseline", tries=1, timeout=5)
        Downloader(tmp_path / "nlm", 1, 5, 0.0).fetch_all(files, 1, lambda file, what: None)


@pytest.mark.parametrize("part", ["listing", "sidecar", "file"])
def test_headers_that_drip_do_not_hold_a_download(server, tmp_path, part):
    stopped = threading.Event()

    def answers(request: bytes) -> Iterator[bytes]:
        asked = request.split(b"\r\n")[0]
        here = "sidecar" if b".md5 " in asked else "file" if b".gz " in asked else "listing"
        if here == part:
            yield b"HTTP/1.1 200 OK\r\nX: "
            while not stopped.wait(0.05):
                yield b"x"
        yield whole_answer(b"0" * 32 if here == "sidecar" else f'<a href="{NAME}">'.encode())

    server.answers = answers
    try:
        with pytest.raises(UserError, match=r"the headers do not end within 0\.3 s"):
            files = list_files(server.url, "baseline", tries=1, timeout=0.3)
            assert files == [Remote(NAME, f"{server.url}baseline/{NAME}")]
            Downloader(tmp_path / "nlm", 2, 0.3, 0.0).fetch_all(files, 1, lambda file, what: None)
    finally:
        stopped.set()
