"""The page: three files, served as they are."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

router = APIRouter(include_in_schema=False)
_FILES = files(__package__) / "page"
_KINDS = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css"}


@router.get("/")
def index() -> Response:
    """The page itself; its data it asks for with the reader's token."""
    return _file("index.html")


@router.get("/page/app.js")
def script() -> Response:
    """What the page does."""
    return _file("app.js")


@router.get("/page/style.css")
def style() -> Response:
    """How it looks."""
    return _file("style.css")


def _file(name: str) -> Response:
    return Response(
        (_FILES / name).read_bytes(),
        media_type=f"{_KINDS[name]}; charset=utf-8",
        headers={"Cache-Control": "no-cache"},
    )
