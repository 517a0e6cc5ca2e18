"""Fields of a JSON object from outside: each of the type that is expected, or refused in one line.

Knows JSON's types; nothing of what the fields mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from backend.errors import RequestError


def read_json(content: bytes | str, where: str = "body") -> Any:
    """The JSON value in `content`. where: what it is called in messages. Raises RequestError."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"{where}: expected JSON, got {len(content)} bytes that are not: {reason}") from error


def read_object(content: bytes | str, where: str = "body") -> dict[str, Any]:
    """The JSON object in `content`. Raises RequestError."""
    value = read_json(content, where)
    if not isinstance(value, dict):
        raise RequestError(f"{where}: expected a JSON object, got {json_type(value)}")
    return value


def field(body: Mapping[str, Any], name: str, kind: type, expected: str, *, optional: bool = False) -> Any:
    """body[name], of the type asked for; with `optional`, None where it is missing or null. Raises RequestError."""
    value = body.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, kind):
        raise RequestError(f"{name}: expected {expected}, got {json_type(value)}")
    return value


def number(body: Mapping[str, Any], name: str, *, where: str = "") -> float:
    """body[name], a finite number. where: what the object is called in messages. Raises RequestError."""
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{where}{name}: expected a number, got {json_type(value)}")
    if not math.isfinite(value) or abs(value) > 1e9:
        raise RequestError(f"{where}{name}: expected a number of pixels, got {value!r}"[:200])
    return float(value)


def json_type(value: object) -> str:
    """The JSON type of a value, in words."""
    names = {type(None): "nothing", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
