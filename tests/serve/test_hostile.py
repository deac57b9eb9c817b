"""What strangers send: every request is answered with a line that names what is wrong, and the server goes on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from genkit.errors import InputError
from genkit.options import Options
from genkit.serve.engine import ServingEngine
from genkit.serve.limits import read_keys
from genkit.serve.rows import Intake, Most
from genkit.serve.server import Listen, bound, prepare, run

if TYPE_CHECKING:
    from conftest import Served

HOME = str(Path(__file__).absolute())


def bomb(side: int = 30_000) -> str:
    """A small PNG that claims to be huge."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100_000)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def gif() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    return "data:image/gif;base64," + base64.b64encode(buffer.getvalue()).decode()


BODIES: list[Any] = [
    {},
    {"prompt": ""},
    {"prompt": 5},
    {"prompt": None},
    {"prompt": ["a"]},
    {"prompt": "a" * 20_000},
    [],
    "text",
    7,
    None,
    {"prompt": "a\x00b"},
    {"prompt": "a", "n": 0},
    {"prompt": "a", "n": 10**9},
    {"prompt": "a", "n": 1.5},
    {"prompt": "a", "n": "2; rm -rf /"},
    {"prompt": "a", "size": "0x0"},
    {"prompt": "a", "size": "99999x99999"},
    {"prompt": "a", "size": "1024x1024"},
    {"prompt": "a", "size": "17x17"},
    {"prompt": "a", "size": "../../etc/passwd"},
    {"prompt": "a", "steps": 10**6},
    {"prompt": "a", "steps": 61},
    {"prompt": "a", "steps": -1},
    {"prompt": "a", "seed": -2},
    {"prompt": "a", "seed": 2**64},
    {"prompt": "a", "guidance_scale": 1e308},
    {"prompt": "a", "guidance_scale": "high"},
    {"prompt": "a", "scheduler": "nothing"},
    {"prompt": "a", "scheduler": f"{HOME}/tuned_scheduler.json"},
    {"prompt": "a", "scheduler": {"solver": "ddim", "__class__": "x"}},
    {"prompt": "a", "image": "/etc/passwd"},
    {"prompt": "a", "image": "http://169.254.169.254/latest/meta-data"},
    {"prompt": "a", "image": "file:///etc/passwd"},
    {"prompt": "a", "image": HOME},
    {"prompt": "a", "init_image": "/etc/passwd"},
    {"prompt": "a", "mask_image": HOME},
    {"prompt": "a", "image": bomb()},
    {"prompt": "a", "image": gif()},
    {"prompt": "a", "image": "data:image/png;base64,!!"},
    {"prompt": "a", "image": {"url": "http://localhost"}},
    {"prompt": "a", "loras": [{"file": "/etc/passwd"}]},
    {"prompt": "a", "loras": ["../../x"]},
    {"prompt": "a", "loras": "x"},
    {"prompt": "a", "loras": [{"name": ["x"]}]},
    {"prompt": "<lora:../../x:1>", "syntax": "a1111"},
    {"prompt": "__../../etc/passwd__", "syntax": "a1111"},
    {"prompt": "{a|b}" * 50 + "{e$$a|b|c|d}" * 12, "syntax": "a1111"},
    {"prompt": "(" * 5000, "syntax": "a1111"},
    {"prompt": " AND ".join("abcdefghijk"), "syntax": "a1111"},
    {"prompt": "a", "gate": "__import__('os').system('x')"},
    {"prompt": "a", "gate": "clip > " + "(" * 900 + "1" + ")" * 900},
    {"prompt": "a", "rank_by": "open('/etc/passwd')"},
    {"prompt": "a", "keep": 5},
    {"prompt": "a", "keep": 1, "gate": "clip > 1", "max_images": 10**5},
    {"prompt": "a", "prune": {}},
    {"prompt": "a", "id": "../../x"},
    {"prompt": "a", "meta": {"a": "b" * 200_000}},
    {"prompt": "a", "mask": "cat", "image": gif()},
    {"prompt": "a", "constructor": 1},
    {"prompt": "a", "partial_images": 2},
    {"prompt": "a", "response_format": "file"},
    {"prompt": "a", "output_format": "exe"},
    {"prompt": "a", "background": "transparent"},
    {"prompt": "a", "quality": "hd"},
    {"prompt": "a", "style": "vivid"},
    {"prompt": "a", "model": "../emoji"},
    {"prompt": "a", "expansions": 50_000, "syntax": "a1111"},
    {"prompt": "a", "labels": ["x"] * 2000},
    {"prompt": "a", "steps": 3, "num_inference_steps": 4},
]
RAW = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "seed": 1e999}',
    b'{"prompt": NaN}',
]


def one_line(answer: httpx.Response) -> str:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    message = answer.json()["error"]["message"]
    assert message and "\n" not in message and len(message) < 700 and "Traceback" not in message
    assert "root:" not in answer.text
    return message


def test_hostile_requests_are_refused_in_a_line(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for body in BODIES:
            one_line(client.post("/v1/images/generations", json=body))
        for raw in RAW:
            one_line(client.post("/v1/images/generations", content=raw, headers={"content-type": "application/json"}))
        assert client.get("/health").status_code == 200
    assert served.settled()["queue_cost"] == 0


def test_hostile_forms_are_refused_in_a_line(served: Served) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    image = buffer.getvalue()
    forms: list[tuple[dict[str, Any], Any]] = [
        ({"prompt": "a"}, None),
        ({"prompt": "a", "image": "/etc/passwd"}, {"x": b"1"}),
        ({"prompt": "a"}, {"image": b""}),
        ({"prompt": "a"}, {"image": b"GIF89a"}),
        ({"prompt": "a"}, {"image": image, "mask": image}),
        ({"prompt": "a"}, {"image": image[:60]}),
        ({"prompt": "a", "steps": "x"}, {"image": image}),
        ({"prompt": "a"}, [("image[]", image), ("image[]", image)]),
        ({"prompt": "a", "n": "-1"}, {"image": image}),
        ({"prompt": "a", "loras": '[{"file": "/x"}]'}, {"image": image}),
        ({"prompt": "a", "loras": "["}, {"image": image}),
        ({}, {"image": image}),
        ({"prompt": "a", "strength": "9"}, {"image": image}),
    ]
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for data, files in forms:
            one_line(client.post("/v1/images/edits", data=data, files=files))
        said = client.post("/v1/images/edits", data={"prompt": "a", "n": "x"}, files={"image": image}).json()
        assert said["error"]["param"] == "n"
        one_line(client.post("/v1/images/edits", content=b"--x", headers={"content-type": "multipart/form-data"}))
        one_line(
            client.post("/v1/images/edits", content=b"--x", headers={"content-type": "multipart/form-data; boundary=x"})
        )


def test_pages_of_other_sites_and_other_names_are_refused(served: Served) -> None:
    body, path = {"prompt": "a", "steps": 1}, f"{served.url}/v1/images/generations"
    port = served.url.rpartition(":")[2]
    for headers, status in (
        ({"origin": "https://evil.example"}, 403), ({"origin": "null"}, 403), ({"sec-fetch-site": "cross-site"}, 403),
        ({"origin": f"http://127.0.0.1:1{port}"}, 403), ({"host": "evil.example"}, 421), ({"host": ""}, 421),
        ({"host": "[::"}, 421),
    ):  # fmt: skip
        answer = httpx.post(path, json=body, headers=headers, timeout=60)
        assert answer.status_code == status, headers
        assert "\n" not in answer.json()["error"]["message"]
    own = {"origin": served.url, "sec-fetch-site": "same-origin"}
    assert httpx.post(path, json=body, headers=own, timeout=60).status_code == 200
    large = httpx.post(path, content=b"x" * 2**26, headers={"content-type": "application/json"}, timeout=60)
    assert large.status_code == 413

    def endless() -> Any:
        for _ in range(80):
            yield b" " * 2**20

    with contextlib.suppress(httpx.WriteError):  # the server has answered and hung up
        assert httpx.post(path, content=endless(), timeout=60).status_code == 413


def test_keys(served: Served, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from genkit.serve.app import answer, create_app
    from genkit.serve.limits import Gate

    key = "a-key-of-16-chars-or-more"
    app = Gate(create_app(served.serving), [key, key + "2"], 1000, answer)
    client = TestClient(app, base_url=served.url)  # type: ignore[arg-type]
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").status_code == 401
    basic = base64.b64encode(f"any:{key}2".encode()).decode()
    for given, status in (
        (f"Bearer {key}", 200), (f"Basic {basic}", 200), (f"Bearer {key}x", 401), ("Bearer ", 401), ("Basic ???", 401),
        (key, 401),
    ):  # fmt: skip
        assert client.get("/v1/models", headers={"authorization": given}).status_code == status, given

    file = tmp_path / "keys"
    file.write_text(f"# of us\n{key}\n  # an indented comment, which is no key\n")
    file.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        read_keys(file)
    file.chmod(0o600)
    assert read_keys(file) == [key]
    file.write_text("short")
    with pytest.raises(InputError, match="16 or more"):
        read_keys(file)


def test_rows_are_cancelled_where_the_caller_left_before_the_first_event(served: Served) -> None:
    class Gone:
        scope = {"client_name": "gone"}  # noqa: RUF012

        async def receive(self) -> dict[str, str]:
            return {"type": "http.disconnect"}

    async def begun() -> list[bool]:
        rows = await served.serving.rows([{"prompt": "x", "steps": 60, "num_images": 8}])
        await served.serving.events(Gone(), rows)
        tickets = [t for t in served.engine.line.tickets.values() if t.client == "gone"]
        await asyncio.sleep(0.1)
        return [ticket.cancelled for ticket in tickets]

    assert asyncio.run(begun()) == [True]


def test_bad_usage_is_found_before_anything_is_loaded(tmp_path: Path, served: Served) -> None:
    with pytest.raises(InputError, match="--api-key-file, or keys in GENKIT_API_KEY, or --no-key"):
        run(Options(), {}, Listen(host="0.0.0.0"), Most(), 10)
    with pytest.raises(InputError, match="width"):
        prepare(Options(), {"width": 17}, Listen(), Most(), 10, [])
    from genkit.errors import HostError

    with pytest.raises(HostError, match="--port"):
        bound(Listen(port=int(served.url.rpartition(":")[2])))


def test_health_metrics_and_openapi(served: Served) -> None:
    text = httpx.get(f"{served.url}/metrics", timeout=60).text
    for name in (
        "genkit_pictures_total",
        "genkit_slots ",
        "genkit_queue_cost",
        "genkit_picture_seconds_bucket",
        "genkit_resident_bytes",
    ):
        assert name in text
    described = httpx.get(f"{served.url}/openapi.json", timeout=60).json()
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/models", "/health", "/metrics"} <= set(
        described["paths"]
    )
    assert {"200", "400", "401", "429", "503"} <= set(described["paths"]["/v1/images/generations"]["post"]["responses"])
    assert json.dumps(described).count("genkit") > 0


def test_loras_are_those_of_the_server_by_name(tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{layer}.lora_up.weight": torch.ones(256, 1), f"{layer}.lora_down.weight": torch.ones(1, 256)}
    (tmp_path / "more").mkdir()
    for name in ("style", "more/ink"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    style, ink = (str(tmp_path / f"{name}.safetensors") for name in ("style", "more/ink"))
    engine = ServingEngine(Options(clip="none", lora_dir=str(tmp_path / "more")), {"loras": [{"file": style}]})
    intake = Intake(engine, Most())

    def loras(**fields: Any) -> list[tuple[str, float]]:
        row = intake.rows([{"prompt": "a", **fields}])[0]
        assert row.prompt == "a"
        return [(lora["file"], lora["weight"]) for lora in row.loras or ()]

    assert loras() == [(style, 1.0)]
    assert loras(loras=[{"name": "ink", "weight": 0.5}, "style:0.25"]) == [(ink, 0.5), (style, 0.25)]
    assert loras(prompt="a<lora:ink:0.7>", syntax="a1111") == [(ink, 0.7)]
    for wrong in ("inc", ink, "../more/ink", {"file": ink}, {"name": "ink", "path": ink}):
        with pytest.raises(InputError, match="loras: "):
            loras(loras=[wrong])
    with pytest.raises(InputError, match="'inc' is no LoRA of this server"):
        loras(prompt="<lora:inc:1>", syntax="a1111")
    for many in (["ink"] * 65, [{"name": "ink", "weight": 1000}]):
        with pytest.raises(InputError, match="loras: ") as refused:
            loras(loras=many)
        assert str(tmp_path) not in str(refused.value)
