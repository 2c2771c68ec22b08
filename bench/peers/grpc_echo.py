"""Handlers of raw bytes on Python's gRPC servers, which answer as many bytes: what no handler can do without.

`python grpc_echo.py aio|threads|processes PORT REPLY_BYTES`: gRPC at PORT + 1, and at PORT a GET is answered. With
`handler` the first ten columns of the input are answered instead, in the protocol's messages.
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


def picking():
    import numpy as np

    from infera_server.protocols.protos import message

    asked, made = message("inference.ModelInferRequest"), message("inference.ModelInferResponse")

    async def pick(data, context):
        request = asked.FromString(data)
        x = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(list(request.inputs[0].shape))
        y = np.ascontiguousarray(x[:, :10])
        reply = made(model_name=request.model_name, model_version="1", id=request.id)
        reply.outputs.add(name="output", datatype="FP32", shape=y.shape)
        reply.raw_output_contents.append(y.tobytes())
        return reply.SerializeToString()

    return pick


async def serve():
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handlers(picking() if MODE == "handler" else answer),))
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
