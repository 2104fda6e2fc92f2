"""What the reward service does not wait for and does not hold: real sockets, one process."""

import base64
import io
import json
import logging
import socket
import threading
import time
from concurrent.futures import Future

import pytest
import uvicorn
from PIL import Image

from duet.rewards.service import patience
from duet.rewards.service.patience import PatientProtocol
from duet.rewards.service.pictures import PictureReader, WireError
from duet.rewards.service.serve import make_app
from tests.sample_rewards import Constant


@pytest.fixture(scope="module")
def port():
    """A server whose time-outs are tenths of a second."""
    loaded: Future = Future()
    loaded.set_result(None)
    app = make_app({"one": Constant()}, loaded, None, 2**20)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", http=PatientProtocol))
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setattr(patience, "HEAD_SECONDS", 0.4)
        patch.setattr(patience, "BODY_SECONDS", 0.4)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def request(body=b"", length=None):
    count = len(body) if length is None else length
    return b"POST /score/one HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % count + body


def good():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    sample = {"prompt": "a", "row": {}, "image": image, "pictures": {}, "sources": []}
    return request(json.dumps({"version": 3, "samples": [sample]}).encode())


def answer(connection):
    """All that comes until the server closes."""
    connection.settimeout(5)
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def connect(port):
    return socket.create_connection(("127.0.0.1", port))


HALF_OPEN = {
    "nothing is sent": (b"", b""),
    "half of the headers": (b"POST /score/one HTTP/1.1\r\nHost:", b""),
    "half of a body": (request(b"{", 99), b"408 Request Timeout"),
}


@pytest.mark.parametrize("kind", HALF_OPEN)
def test_a_half_open_connection_is_closed(port, kind):
    sent, expected = HALF_OPEN[kind]
    start = time.monotonic()
    several = [connect(port) for _ in range(40)]
    for connection in several:
        connection.sendall(sent)
    for connection in several:
        with connection:
            told = answer(connection)
            assert (expected in told) if expected else told == b""
    assert 0.3 < time.monotonic() - start < 3


@pytest.mark.parametrize("sent", [b"POST /score/one HTTP/1.1\r\nX: ", request(b"", 999)])
def test_what_drips_is_closed_too(port, sent):
    with connect(port) as connection:
        connection.sendall(sent)
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 3:
                connection.sendall(b" ")
                time.sleep(0.05)
        assert time.monotonic() - start < 2


def test_a_second_request_is_waited_for_as_the_first(port):
    with connect(port) as connection:
        connection.sendall(good())
        time.sleep(0.6)  # idle between requests is uvicorn's keep-alive, not ours
        connection.sendall(good())
        time.sleep(0.1)
        connection.sendall(b"POST /score")
        start = time.monotonic()
        told = answer(connection)
        assert told.count(b'"scores":[1.0]') == 2 and time.monotonic() - start < 2


def test_a_client_that_drops_leaves_no_traceback(port, caplog):
    with caplog.at_level(logging.INFO):
        for sent in (b"POST /sc", request(b"{", 99), good()):
            with connect(port) as connection:
                connection.sendall(sent)
        with connect(port) as connection:
            connection.sendall(good().replace(b"Host: a", b"Connection: close"))
            assert b"400" in answer(connection)  # no host
        time.sleep(0.1)
    assert "Traceback" not in caplog.text and not [r for r in caplog.records if r.exc_info]


def png(width, height):
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((8000, 8000), "a of 8000 x 8000 pixels is too large: at most 8388608 pixels"),
        ((1, 100_000), "a of 1 x 100000 pixels is too long: at most 16 : 1"),
        ((17, 1), "too long"),
        ((20_000, 20_000), "too large"),
    ],
)
def test_a_picture_that_no_reward_can_hold_is_refused_before_it_is_decoded(size, reason):
    text = png(*size)
    start = time.process_time()
    with pytest.raises(WireError, match=reason):
        PictureReader().read(text, "a")
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize("size", [(3840, 2160), (16, 1), (1, 1)])
def test_what_a_reward_can_hold_is_read(size):
    picture, _ = PictureReader().read(png(*size), "a")
    assert picture.size == size


def test_a_request_holds_so_many_pixels_in_all():
    reader, picture = PictureReader(), png(2048, 4096)
    for _ in range(8):
        reader.read(picture, "a")
    with pytest.raises(WireError, match="a request holds at most 67108864 pixels"):
        reader.read(picture, "a")
