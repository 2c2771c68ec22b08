"""Runs where kserve is: asks a server over `rest` or `grpc` at an address, and prints what it is told as JSON."""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def request(binary):
    entry = InferInput("x", [2, 4], "FP32")
    entry.set_data_from_numpy(X, binary_data=binary)
    return InferRequest(model_name="double", infer_inputs=[entry], request_id="7")


def told(response):
    (output,) = response.outputs
    return {"id": response.id, "model": response.model_name, "name": output.name, "y": output.as_numpy().tolist()}


async def failure(call):
    try:
        await call
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


async def rest(address):
    client, base = InferenceRESTClient(RESTConfig(protocol="v2")), f"http://{address}"
    try:
        return {
            "live": await client.is_server_live(base),
            "ready": await client.is_server_ready(base),
            "model_ready": await client.is_model_ready(base, "double"),
            "binary": told(await client.infer(base, request(True), model_name="double")),
            "plain": told(await client.infer(base, request(False), model_name="double")),
            "unknown": await failure(client.infer(base, request(False), model_name="nope")),
        }
    finally:
        await client.close()


async def grpc(address):
    client = InferenceGRPCClient(address)
    unknown = request(False)
    unknown.model_name = "nope"
    try:
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model_ready": await client.is_model_ready("double"),
            "binary": told(await client.infer(request(True))),
            "plain": told(await client.infer(request(False))),
            "unknown": await failure(client.infer(unknown)),
        }
    finally:
        await client.close()


print(json.dumps(asyncio.run({"rest": rest, "grpc": grpc}[sys.argv[1]](sys.argv[2]))))
