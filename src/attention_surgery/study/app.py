"""The study's web page: a Gradio page whose videos are served by opaque tokens and by nothing else."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import StudyError
from .config import StudyConfig
from .store import MAX_RATER_LENGTH, Progress, StudyStore
from .videos import MEDIA_TYPES

PAGE = Path(__file__).parent / "page"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

PAGE_PATHS = frozenset({"/", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/component_server/"})
PAGE_FOLDERS = ("/videos/", "/assets/", "/static/")

WHOLE_WINDOW = ".gradio-container :is(.main, main, .html-container) { padding: 0 !important; }"


def study_app(store: StudyStore, config: StudyConfig) -> FastAPI:
    """The ASGI application of a study: the Gradio page at `/`, the videos at `/videos/{token}`."""
    folders = {"ours": config.ours.resolve(), "baseline": config.baseline.resolve()}
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/videos/{token}")
    def video(token: str) -> FileResponse:
        found = store.find_video(token)
        if found is None:
            raise HTTPException(404)
        method, name = found
        path = folders[method] / name
        if not path.is_file() or path.resolve().parent != folders[method]:
            raise HTTPException(404)
        return FileResponse(
            path,
            media_type=MEDIA_TYPES[path.suffix.lower()],
            # The file's own date and tag would tell which of the two was made when.
            headers={
                "etag": f'"{token}"',
                "last-modified": "Thu, 01 Jan 1970 00:00:00 GMT",
                "cache-control": "private, max-age=3600",
                "x-content-type-options": "nosniff",
            },
        )

    system_font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    gr.mount_gradio_app(
        app,
        _page(store, config),
        path="/",
        theme=gr.themes.Base(font=system_font, font_mono=["ui-monospace", "monospace"]),
        css=WHOLE_WINDOW,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        show_error=False,
    )
    app.add_middleware(_OnlyThePage)
    if config.host in LOCAL_HOSTS:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_HOSTS, "[::1]"])
    return app


def _page(store: StudyStore, config: StudyConfig) -> gr.Blocks:
    """One HTML component; its script calls `enter` and `vote` on the server and keeps the two videos in step."""

    def enter(rater: Any) -> dict[str, Any]:
        return _reply(lambda: store.enter(str(rater)))

    def vote(answer: Any) -> dict[str, Any]:
        fields = answer if isinstance(answer, dict) else {}
        return _reply(lambda: store.vote(str(fields.get("token")), str(fields.get("choice"))))

    with gr.Blocks(title=config.title, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(
            html_template=(PAGE / "page.html").read_text(encoding="utf-8"),
            css_template=(PAGE / "page.css").read_text(encoding="utf-8"),
            js_on_load=(PAGE / "page.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            server_functions=[enter, vote],
            heading=config.title,
            question=config.question or _default_question(store),
            watch_fully=config.watch_fully,
            max_rater_length=MAX_RATER_LENGTH,
        )
    return blocks


def _reply(act: Callable[[], Progress]) -> dict[str, Any]:
    """A rater's new state as JSON, or what was wrong with the request."""
    try:
        return asdict(act())
    except StudyError as error:
        return {"error": str(error)}


def _default_question(store: StudyStore) -> str:
    if any(pair.caption for pair in store.pairs):
        return "Which video do you prefer, for its looks and for how well it fits the text?"
    return "Which video do you prefer, for its looks and its motion?"


class _OnlyThePage:
    """Answers 404 to whatever the page does not need, Gradio's file, upload, proxy and API routes among it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_page_path(scope["path"]):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("Not Found", status_code=404)(scope, receive, send)


def _is_page_path(path: str) -> bool:
    return path in PAGE_PATHS or (path.startswith(PAGE_FOLDERS) and ".." not in path.split("/"))
