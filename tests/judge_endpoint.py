"""A real HTTP server that answers as an OpenAI-compatible one does, and what it was sent."""

import base64
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def completion(text, *positions):
    """A chat completion; each position is a dict of token to probability."""
    content = [
        {"top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in position.items()]}
        for position in positions
    ]
    return {
        "choices": [
            {"message": {"content": text}, "logprobs": {"content": content} if positions else None}
        ]
    }


class Endpoint:
    """Serves what `replies` says, in order, the last one for ever (it may be made of the body); keeps the requests."""

    def __init__(self):
        endpoint = self
        self.replies, self.requests, self.lock = [], [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.requests.append((self.path, dict(self.headers), body))
                    reply = (
                        endpoint.replies.pop(0)
                        if len(endpoint.replies) > 1
                        else endpoint.replies[0]
                    )
                reply = reply(body) if callable(reply) else reply
                status, answer = reply if isinstance(reply, tuple) else (200, reply)
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def shown(part) -> Image.Image:
    """The picture that a part of a message holds."""
    kind, _, data = part["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))
