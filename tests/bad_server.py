"""Servers that answer wrongly, in every way that tests/test_remote.py names, or not at all."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Answer = Callable[[socket.socket], None]


@contextmanager
def bad_server(answer: Answer) -> Iterator[tuple[str, list[bytes]]]:
    """Its address, and the requests that came so far; `answer` is called with each connection."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, answer, requests), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def nobody() -> Iterator[str]:
    """An address that is taken, and refuses every connection: nobody listens."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


def _accept(listener: socket.socket, answer: Answer, requests: list[bytes]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the test is over
            return
        threading.Thread(target=_talk, args=(connection, answer, requests), daemon=True).start()


def _talk(connection: socket.socket, answer: Answer, requests: list[bytes]) -> None:
    with connection:
        try:
            requests.append(_read_request(connection))
            answer(connection)
        except OSError:  # the client has hung up
            return


def _read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next((int(h[15:]) for h in lines if h[:15] == b"content-length:"), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + body


def reply(body: bytes = b"", status: str = "200 OK", *headers: str, length: int | None = None):
    """An answer in one piece; `length` is what it says of itself."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    head = "\r\n".join([*lines, *headers, "Connection: close", "", ""]).encode()
    return lambda connection: connection.sendall(head + body)


def scores(text: str) -> Answer:
    return reply(f'{{"version": 3, "scores": {text}}}'.encode())


def drip(data: bytes) -> Answer:
    """Byte by byte, each well within any time-out for one read."""

    def answer(connection: socket.socket) -> None:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)

    return answer


def endless(head: bytes, again: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(again)

    return answer


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


HEAD = b"HTTP/1.1 200 OK\r\n"
GOOD = b'{"version": 3, "scores": [0.5, 0.5]}'
ERROR = json.dumps({"error": "no"}).encode()

# what is wrong: the answer to a request for two scores, and a part of the reason to be told
BAD = {
    "reset": (reset, "Error"),
    "closes without an answer": (lambda connection: None, "RemoteProtocolError"),
    "never answers": (lambda connection: time.sleep(10), "no whole answer in 0.5 s"),
    "closes after the headers": (reply(length=20), "RemoteProtocolError"),
    "half a body": (reply(GOOD[:11], length=len(GOOD)), "RemoteProtocolError"),
    "length too small": (reply(GOOD, length=9), "not JSON"),
    "length is no number": (reply(GOOD, length="x"), "RemoteProtocolError"),
    "empty body": (reply(), "not JSON"),
    "no content": (reply(status="204 No Content"), "HTTP 204"),
    "not JSON": (reply(b"scores: 1, 2"), "not JSON"),
    "a list": (reply(b"[0.5, 0.5]"), "must be an object of scores"),
    "null": (reply(b"null"), "must be an object of scores"),
    "missing key": (reply(b'{"version": 3, "score": [1, 2]}'), "must be an object of scores"),
    "surplus key": (reply(b'{"version": 3, "scores": [1, 2], "x": 1}'), "must be an object of scores"),
    "scores are a number": (scores("0.5"), "must be of type list"),
    "scores are an object": (scores('{"0": 1, "1": 2}'), "must be of type list"),
    "scores are a string": (scores('"ab"'), "must be of type list"),
    "too few": (scores("[0.5]"), "1 scores for 2 samples"),
    "too many": (scores("[0.5, 0.5, 0.5]"), "3 scores for 2 samples"),
    "none": (scores("[]"), "0 scores for 2 samples"),
    "an old server": (reply(b'{"scores": [1, null]}'), "version 1 of the wire form, and here it is 3: run the same"),
    "strings": (scores('["0.5", "0.5"]'), "'0.5' is no score"),
    "booleans": (scores("[true, false]"), "'True' is no score"),
    "NaN": (scores("[0.5, NaN]"), "NaN is no JSON"),
    "Infinity": (scores("[0.5, -Infinity]"), "-Infinity is no JSON"),
    "1e400": (scores("[0.5, 1e400]"), "'inf' is no score"),
    "a huge integer": (scores(f"[0.5, 1{'0' * 400}]"), "is no score"),
    "an integer too long to read": (scores(f"[0.5, 1{'0' * 9000}]"), "not JSON"),
    "nested lists": (scores("[[0.5], [0.5]]"), "'[0.5]' is no score"),
    "deeply nested lists": (reply(b"[" * 100_000), "not JSON"),
    "invalid UTF-8": (reply(b'{"scores": [\xff\xfe, 1]}'), "not JSON"),
    "400": (reply(ERROR, "400 Bad Request"), "HTTP 400"),
    "404": (reply(ERROR, "404 Not Found"), "HTTP 404"),
    "413": (reply(ERROR, "413 Content Too Large"), "HTTP 413"),
    "418": (reply(ERROR, "418 I'm a teapot"), "HTTP 418"),
    "429 for ever": (reply(ERROR, "429 Too Many Requests"), "HTTP 429"),
    "500": (reply(ERROR, "500 Internal Server Error"), "HTTP 500"),
    "502": (reply(b"<h1>Bad Gateway</h1>", "502 Bad Gateway"), "HTTP 502"),
    "503": (reply(b"", "503 Service Unavailable"), "HTTP 503"),
    "good scores with 500": (reply(GOOD, "500 Internal Server Error"), "HTTP 500"),
    "status 999": (reply(GOOD, "999 What"), "HTTP 999"),
    "redirect to itself": (reply(b"", "302 Found", "Location: /score/x"), "HTTP 302"),
    "a login page": (reply(b"<!doctype html><form>", "200 OK", "Content-Type: text/html"), "not JSON"),
    "gzip only in name": (reply(GOOD, "200 OK", "Content-Encoding: gzip"), "encoding"),
    "bad chunks": (lambda c: c.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "RemoteProtocolError"),
    "binary garbage": (lambda c: c.sendall(bytes(range(256)) * 4), "RemoteProtocolError"),
    "another protocol": (lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"), "RemoteProtocolError"),
    "headers drip": (drip(HEAD + b"X: y\r\n" * 99), "no whole answer in 0.5 s"),
    "body drips": (drip(HEAD + b"\r\n" + b" " * 999), "no whole answer in 0.5 s"),
    "body drips after quick headers": (lambda c: (c.sendall(HEAD + b"\r\n"), drip(b" " * 99)(c)), "no whole answer in 0.5 s"),
    "endless headers": (endless(HEAD, b"X: y\r\n" * 999), "Error"),
    "endless body": (endless(HEAD + b"\r\n", b" " * 65536), "more than 1048576 bytes"),
    "endless interim answers": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "no whole answer"),
}  # fmt: skip
