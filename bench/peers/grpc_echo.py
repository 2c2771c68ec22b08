"""Handlers of raw bytes on Python's gRPC servers, which answer as many bytes: what no handler can do without.

`python grpc_echo.py aio|threads|processes PORT REPLY_BYTES`: gRPC at PORT + 1, and at PORT a GET is answered.
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import uvloop

MODE, PORT, REPLY = sys.argv[1], int(sys.argv[2]), bytes(int(sys.argv[3]))


class Handlers(grpc.GenericRpcHandler):
    def __init__(self, handler):
        self.handler = grpc.unary_unary_rpc_method_handler(handler)

    def service(self, details):
        return self.handler


class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


async def answer(data, context):
    return REPLY


async def serve():
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handlers(answer),))
    server.add_insecure_port(f"127.0.0.1:{PORT + 1}")
    await server.start()
    await server.wait_for_termination()


def main():
    if MODE == "processes" and os.fork() == 0:  # they share the port
        uvloop.run(serve())
        return
    threading.Thread(target=HTTPServer(("127.0.0.1", PORT), Ready).serve_forever, daemon=True).start()
    if MODE != "threads":
        uvloop.run(serve())
        return
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Handlers(lambda data, context: REPLY),))
    server.add_insecure_port(f"127.0.0.1:{PORT + 1}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
