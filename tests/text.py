"""Models from ONNX's text syntax."""

from __future__ import annotations

import onnx
import onnx.parser


def parse(graph: str, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """The model of a graph in text syntax; domain "infera" may be used."""
    header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "infera" : 1, "com.microsoft" : 1]>\n'
    return onnx.parser.parse_model(header + graph.strip())
