"""A custom handler for Hugging Face's Inference Endpoints: put it beside the model's files, as handler.py.

The toolkit there makes one `EndpointHandler(path)` and calls it with each body; what it raises is answered with 400.
"""

from __future__ import annotations

import threading
from typing import Any

from genkit.errors import InputError, shown
from genkit.options import Options
from genkit.rows.request import Request
from genkit.rows.result import Result
from genkit.serve.engine import Full, ServingEngine
from genkit.serve.rows import Intake, Most, chosen, from_base64

SIZE = {"width", "height"}  # of `target_size`, as clients of the hub send it; in rows it is SDXL's, in pixels too


class EndpointHandler:
    """Draws with the model in a folder. Calls from several threads share a batch."""

    def __init__(self, path: str = "") -> None:
        engine = ServingEngine(Options(model=str(path)) if path else Options())
        self.intake = Intake(engine, Most())
        self.engine = engine.start()
        self.engine.warm()

    def __call__(self, data: dict[str, Any]) -> Any:
        """Return a PIL image, or for several prompts or pictures a list of them, which the toolkit serialises.

        data: `inputs`, a prompt, the fields of a row, or a list of either; with `prompt` in `parameters`, a picture
        that is drawn anew. `parameters`: fields of rows, by diffusers' names too. Raises InputError, a line naming the
        field, and RuntimeError where drawing fails.
        """
        from PIL import Image

        rows = self.intake.rows(fields_of(data))
        results = self._drawn(rows)
        images = []
        for row in rows:
            drawn = [result for result in results if result.id == row.id]
            found = chosen([row], sorted(drawn, key=lambda result: result.index))
            if not found:
                raise InputError(f"gate: none of {len(drawn)} pictures passes")
            images += [Image.fromarray(result.pixels) for result in found]
        return images if isinstance(data["inputs"], list) or len(images) > 1 else images[0]

    def _drawn(self, rows: list[Request]) -> list[Result]:
        try:
            ticket = self.engine.submit(rows, f"thread {threading.get_ident()}")
        except Full as full:
            raise RuntimeError(f"the queue is full; try again in {full.seconds:.0f} s") from None
        found = []
        for event in ticket.wait():
            if event["type"] == "failed":
                ticket.cancel()
                raise RuntimeError(f"a picture failed: {event['reason']}")
            if event["type"] == "image":
                found.append(event["result"])
        return found


def fields_of(data: Any) -> list[dict[str, Any]]:
    """Return the fields of each row that a body asks for. Raises InputError."""
    if not isinstance(data, dict) or "inputs" not in data:
        raise InputError("inputs: is missing")
    inputs, shared = data["inputs"], data.get("parameters") or {}
    if not isinstance(shared, dict):
        raise InputError(f"parameters: {shown(shared)} is not an object of fields")
    unknown = sorted(set(data) - {"inputs", "parameters", "options"})
    if unknown:
        raise InputError(f"{shown(unknown[0])[1:-1]}: is neither inputs nor parameters; fields go into parameters")
    shared = _as_row(shared)
    many = inputs if isinstance(inputs, list) else [inputs]
    if not many:
        raise InputError("inputs: is an empty list")
    return [{**shared, **_row(one, shared)} for one in many]


def _row(given: Any, shared: dict[str, Any]) -> dict[str, Any]:
    if isinstance(given, dict):
        return _as_row(given)
    if "prompt" not in shared:
        if not isinstance(given, str):
            raise InputError(f"inputs: {shown(given)} is no prompt; beside a picture, parameters has the prompt")
        return {"prompt": given}
    if isinstance(given, str) and not given.startswith("data:"):
        given = from_base64("inputs", given)
    return {"image": given}


def _as_row(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields with what is the toolkit's, and not a row's, taken out."""
    found = dict(fields)
    if found.pop("output_type", "pil") != "pil":
        raise InputError(f"output_type: {shown(fields['output_type'])} is not pil")
    size = found.get("target_size")
    if isinstance(size, dict) and set(size) == SIZE:
        found |= found.pop("target_size")
    return found
