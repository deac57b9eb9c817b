"""What all pages share: colours for light and dark, and type; each page takes them into its own style."""

from __future__ import annotations

from importlib.resources import files

_PLACE = "/* look */\n"  # in a page's <style>


def look() -> str:
    """Return the style that all pages begin with."""
    return files("genkit.pages").joinpath("look.css").read_text("utf-8")


def template(name: str) -> str:
    """Return the page of that name, with the shared style in it: it needs no file beside it."""
    text = files("genkit.pages").joinpath(f"{name}.html").read_text("utf-8")
    if _PLACE not in text:
        raise ValueError(f"{name}.html takes in no shared style")
    return text.replace(_PLACE, look(), 1)


def script(name: str) -> str:
    """Return a script that some pages take in."""
    return files("genkit.pages").joinpath(f"{name}.js").read_text("utf-8").strip()
