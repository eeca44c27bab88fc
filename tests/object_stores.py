"""Object stores on this machine: an S3-compatible server, and a web server with or without byte ranges."""

import contextlib
import http.server
import logging
import os
import threading
import time
from functools import partial

import requests

BUCKET = "features"


@contextlib.contextmanager
def s3_server():
    """A server that speaks S3, with an empty bucket; the environment names it, for this process and its children."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    # fsspec keeps what it opened, and does not know that the environment names another server now.
    S3FileSystem.clear_instance_cache()
    try:
        # Its content outlives a server, because it lies in this process.
        requests.post(f"{settings['AWS_ENDPOINT_URL']}/moto-api/reset", timeout=10)
        filesystem().mkdir(BUCKET)
        yield settings["AWS_ENDPOINT_URL"]
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def filesystem():
    """The store as any other program sees it."""
    import fsspec

    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; `ranges` says whether it knows that header, `failures` how many requests it still breaks off."""

    def do_GET(self):  # the base class's name
        server = self.server
        server.requests.append(self.path)
        with server.counting:
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        time.sleep(server.delay_s)
        self.answer()
        with server.counting:
            server.in_flight -= 1

    def answer(self):
        server = self.server
        if server.failures:
            server.failures -= 1
            self.send_error(503)
            return
        asked, path = self.headers.get("Range"), self.translate_path(self.path)
        if not server.ranges or asked is None or not os.path.isfile(path):  # noqa: PTH113  # as translate_path gives it
            super().do_GET()
            return
        start, _, end = asked.removeprefix("bytes=").partition("-")
        with open(path, "rb") as file:  # noqa: PTH123
            content = file.read()
        if int(start) >= len(content):
            self.send_error(416)
            return
        part = content[int(start) : int(end) + 1 if end else None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def web_server(folder, *, ranges=True):
    """Serve a folder; yields the address and the server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    server.ranges, server.failures, server.requests = ranges, 0, []
    server.in_flight, server.most_in_flight, server.counting, server.delay_s = 0, 0, threading.Lock(), 0.0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
