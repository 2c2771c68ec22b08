"""FastAPI and onnxruntime, as most people begin: one endpoint, no batching."""

from fastapi import FastAPI
from model import Session
from pydantic import BaseModel

app = FastAPI()
session = Session()


class Rows(BaseModel):
    rows: list[list[float]]


@app.get("/health")
def health() -> str:
    return "ok"


@app.post("/predict")
def predict(request: Rows) -> list[list[float]]:
    found: list[list[float]] = session.run(request.rows).tolist()
    return found
