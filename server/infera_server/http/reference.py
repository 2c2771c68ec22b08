"""`GET /docs`: the routes of the OpenAPI document as one page, without scripts or anything from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
    "td,th{text-align:left;vertical-align:top;padding:.3em 1.2em .3em 0}"
)


def page(document: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI document: method, path and what it is for."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    rows = [
        f"<tr><td>{escape(method.upper())}<td><code>{escape(path)}</code>"
        f"<td>{escape(operation.get('summary', ''))}<br><small>{escape(operation.get('description', ''))}</small>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<h1>{title}</h1><p>Bodies and replies are described in <a href="openapi.json">openapi.json</a>.</p>'
        f"<table><tr><th>Method<th>Path<th>What it is for{''.join(rows)}</table></html>"
    )
