"""Serving a study: everything is checked first, then the votes' file is made, then the page opens."""

import socket

from ..errors import StudyError
from ..progress import progress
from .config import StudyConfig
from .store import StudyStore
from .videos import Pair, check_playable, read_pairs


def serve(config: StudyConfig) -> None:
    """Serve a study's page until interrupted.

    The database is made when it does not exist; when it does, the study goes on where it stood.

    Raises:
        StudyError: folders or videos that cannot be compared (see `read_pairs` and `check_playable`), a database of
            another study or another program, an address that cannot be listened on, or Gradio missing. Nothing has
            been written or served then.
    """
    try:
        import uvicorn

        from .app import study_app
    except ImportError as error:
        raise StudyError(f"the page needs Gradio ({error}): pip install 'attention-surgery[study]'") from error

    pairs, store = check_study(config)
    with _listen(config.host, config.port) as listener:
        store = store or StudyStore.create(config.database, config.fixed_settings(), pairs)
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"{len(pairs)} pairs; the votes go to {config.database}; stop with Ctrl-C", flush=True)
        print(f"Open http://{host}:{listener.getsockname()[1]}/", flush=True)
        options = uvicorn.Config(study_app(store, config), log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(options).run(sockets=[listener])


def check_study(config: StudyConfig) -> tuple[list[Pair], StudyStore | None]:
    """Check folders, videos and database; returns the pairs, and the study's file if it exists."""
    pairs = read_pairs(config)
    if config.pairs_per_rater is not None and config.pairs_per_rater > len(pairs):
        raise StudyError(f"pairs_per_rater is {config.pairs_per_rater}, but there are {len(pairs)} pairs")
    if config.database.exists():
        store = StudyStore(config.database)
        _check_same(config, store, pairs)
        return pairs, store
    with progress("checking videos", len(pairs)) as advance:
        for pair in pairs:
            check_playable(config, pair)
            advance(pair.name)
    return pairs, None


def _check_same(config: StudyConfig, store: StudyStore, pairs: list[Pair]) -> None:
    """Refuse to go on with a study under other settings or with other videos."""
    settings = config.fixed_settings()
    for name in sorted(settings.keys() | store.settings.keys()):
        was, now = store.settings.get(name), settings.get(name)
        if was != now:
            raise StudyError(
                f"{config.database} was made with {name} = {was!r}, now it is {now!r}; a study's settings are fixed "
                "when its file is made: use the same ones, or name another database"
            )
    known = {pair.name: pair for pair in store.pairs}
    given = {pair.name: pair for pair in pairs}
    for name in sorted(known.keys() | given.keys()):
        if known.get(name) != given.get(name):
            change = (
                "is new" if name not in known else "is missing" if name not in given else "or its label has changed"
            )
            raise StudyError(
                f"the video {name!r} {change} since {config.database} was made; restore it, or name another database"
            )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise StudyError(f"cannot listen on {host}:{port}: {error}; choose another port or host") from error
