"""Help and version."""

from __future__ import annotations

import pytest

from genkit import cli
from genkit.version import __version__


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0 and capsys.readouterr().out == f"genkit {__version__}\n"
    assert cli.run(["-h"]) == 0 and "generate" in (whole := capsys.readouterr().out)
    assert cli.run([]) == 2 and capsys.readouterr().out == whole
    assert cli.run(["generate", "-h"]) == 0 and "<list" not in capsys.readouterr().out
