"""A real HTTP server of video files, which serves some names as badly as they say."""

import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

STATUS = {"gone.mp4": 404, "closed.mp4": 403, "broken.mp4": 500}


class _Films(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = unquote(self.path.partition("?")[0].strip("/"))
        status = STATUS.get(name, 200 if name in self.server.films else 404)
        if name == "moved.mp4":
            self.send_response(302)
            self.send_header("Location", "/whole.mp4")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.server.films[name].read_bytes() if status == 200 else b"no"
        self.send_response(status)
        if name == "unsized.mp4":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{zlib.crc32(body):08x}"')
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if name in ("half.mp4", "stalled.mp4") else body)
        self.wfile.flush()
        if name == "stalled.mp4":
            self.server.released.wait(60.0)
        self.close_connection = name in ("half.mp4", "stalled.mp4", "unsized.mp4")

    def log_message(self, *_arguments):
        return


@contextmanager
def serving(films: Mapping[str, Path]) -> Iterator[str]:
    """Serve files by name while the block runs; yields the address.

    gone.mp4, closed.mp4 and broken.mp4 answer 404, 403 and 500; moved.mp4 leads to whole.mp4; unsized.mp4 does not say
    how long it is; half.mp4 ends, and stalled.mp4 stops, in the middle.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), _Films) as server:
        server.daemon_threads = True
        server.films, server.released = dict(films), threading.Event()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
