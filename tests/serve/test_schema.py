"""What the server says of itself in /openapi.json, tried out with generated requests; and the command itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from conftest import Served

ROOT = Path(__file__).parents[2]
GENKIT = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "text": True}


@pytest.mark.slow
def test_generated_requests_get_no_undocumented_answer(served: Served) -> None:
    import schemathesis
    from schemathesis.checks import CHECKS  # noqa: F401
    from schemathesis.specs.openapi.checks import status_code_conformance

    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    from hypothesis import HealthCheck, Phase, given, settings

    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]

        @settings(
            max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def tried(case: schemathesis.Case) -> None:
            response = case.call(timeout=60)
            case.validate_response(response, checks=[schemathesis.checks.not_a_server_error, status_code_conformance])

        tried()
    assert httpx.get(f"{served.url}/health", timeout=60).status_code == 200


@pytest.mark.slow
def test_the_command_serves_until_a_signal_and_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "genkit", "serve", "--clip", "none", "--drain", "1", "--port"]
    with subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **GENKIT) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        taken = subprocess.run([*command, url.rpartition(":")[2]], capture_output=True, **GENKIT)  # type: ignore[call-overload]
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a cat", "steps": 1}, timeout=60)
        late: list[httpx.Response] = []
        body = {"prompt": "a cat", "steps": 100, "n": 8}
        ask = threading.Thread(
            target=lambda: late.append(httpx.post(f"{url}/v1/images/generations", json=body, timeout=60))
        )
        ask.start()
        while "genkit_slots_used 0.0" in httpx.get(f"{url}/metrics", timeout=60).text:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(200) == 143
        ask.join()
        assert process.stderr is not None
        loading, serving, stopping = process.stderr.read().splitlines()
        assert loading == "loading emoji" and serving.startswith("serving emoji: a page at /, OpenAI's API at /v1")
        assert stopping == "stopping: drawing what is in flight"
    assert answer.status_code == 200 and late[0].status_code == 503
    assert late[0].json()["error"]["message"] == "the server is stopping"
    assert taken.returncode == 3 and "--port" in taken.stderr and taken.stderr.count("\n") == 1
    without = "import sys; sys.modules['fastapi'] = None; from genkit.cli import main; main()"
    lacking = subprocess.run([sys.executable, "-c", without, "serve"], capture_output=True, **GENKIT)  # type: ignore[call-overload]
    assert lacking.returncode == 3 and "pip install 'genkit-diffusion[serve]'" in lacking.stderr
    assert lacking.stderr.count("\n") == 1
