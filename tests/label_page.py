"""`genkit label` in a process of its own, and a client that asks it what its page asks."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.children import start


class Page:
    """A served run: `get` and `post` as the page does."""

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        found = re.fullmatch(r"http://(127\.0\.0\.1:(\d+))/([\w-]{40,})/", url)
        assert found is not None
        self.host, self.port, self.token, self.process = found[1], int(found[2]), found[3], process

    def ask(self, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Host": self.host, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers

    def state(self) -> Any:
        return json.loads(self.ask("GET", f"/{self.token}/state")[1])

    def vote(self, image: int, vote: str) -> Any:
        return self.send({"image": image, "vote": vote})

    def send(self, answer: Any) -> Any:
        """Return the state after an answer, or the status of a refusal."""
        headers = {"Origin": f"http://{self.host}", "Content-Type": "application/json"}
        status, body, _ = self.ask("POST", f"/{self.token}/vote", json.dumps(answer), **headers)
        return json.loads(body) if status == 200 else status


def serve(folder: Path, *arguments: str) -> tuple[str, subprocess.Popen[str]]:
    process = start([sys.executable, "-m", "genkit", "label", str(folder), *arguments])
    assert process.stdout is not None
    return process.stdout.readline().strip(), process
