"""task=serve: an OpenAI-compatible HTTP server over one live session."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING

from orchestrator.config import Config, ServerConfig
from orchestrator.errors import EngineUnavailableError, OrchestratorError, RequestError, Terminated
from orchestrator.report.console import note
from orchestrator.runfolder import RunFolder
from orchestrator.tasks.run import check_stop_tokens
from orchestrator.tasks.session import Session, look, open_session

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from orchestrator.server.broker import Broker

GRACE_S = 5.0  # for the answers that are in flight when the server is told to stop
FLUSH_S = 2.0  # then for clients to read their errors
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(config: Config, folder: RunFolder) -> None:
    """Loads the model and serves it until it is told to stop, which is the only good end.

    Raises:
        KeyboardInterrupt, Terminated: it was told to stop.
        OrchestratorError: as in task=run; the port is taken (RequestError); the engine died (EngineError).
    """
    _check_packages()
    if config.run.resume is not None:
        raise RequestError("run.resume continues answers, and task=serve has none", "Start a new server.")
    with closing(bind(config.server)) as sock:  # before anything long
        planned = look(config, planning=False)
        check_stop_tokens(config, planned.spec.vocab)
        with open_session(planned, folder) as session:
            _serve(session, config.server, sock, folder)


def _check_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(
            f"task=serve needs {error.name}, which is not installed here", "Type: pip install 'orchestrator[server]'"
        ) from None


def bind(server: ServerConfig) -> socket.socket:
    """A socket that has the address; `listen` on it is the caller's.

    Raises:
        RequestError: there is no such address here, or it is taken.
    """
    with _explained(server):
        family, kind, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        try:
            # Or a server could not be started again for a minute after its end.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
        return sock


@contextmanager
def _explained(server: ServerConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hints = {
            errno.EADDRINUSE: "Something listens there already: set server.port to another (0: any that is free).",
            errno.EACCES: "Ports below 1024 are the system's: set server.port=8000.",
        }
        other = "Set server.host=127.0.0.1 (this machine only) or server.host=0.0.0.0 (every address it has)."
        raise RequestError(
            f"server.host={server.host} server.port={server.port}: {error.strerror}", hints.get(error.errno or 0, other)
        ) from None


def _serve(session: Session, server: ServerConfig, sock: socket.socket, folder: RunFolder) -> None:
    from orchestrator.server.app import create_app
    from orchestrator.server.broker import Broker
    from orchestrator.server.errors import ServerStoppingError
    from orchestrator.server.prepare import ServedModel

    planned = session.planned
    model = ServedModel(
        name=planned.source.served_name,
        max_context=session.chosen.max_context,
        vocab=planned.spec.vocab,
        generation=planned.config.generation,
        tokenizer=session.tokenizer,
    )
    broker = Broker(session.engine)
    with _explained(server):
        sock.listen()
    url = _url(sock)

    def ready() -> None:
        folder.status("serving", url=url, model=model.name)
        print(url, flush=True)
        note(f"serving {model.name!r} to OpenAI clients with base_url={url}/v1; Ctrl-C ends it")
        if server.api_key is None and not _is_loopback(sock):
            note("note: there is no server.api_key: whoever reaches this address can use it")

    signalled = asyncio.run(_until_told(create_app(model, broker, server.api_key), broker, sock, ready))
    folder.write("result.json", session.result() | {"served": asdict(broker.counters)})
    assert broker.error is not None  # a broker that was stopped has one
    if signalled is None or not isinstance(broker.error, ServerStoppingError):
        raise broker.error
    with suppress(OrchestratorError):  # the engine may have died since
        stats = session.engine.stats()
        session.remember(stats)
        measured = session.measured(stats)
        folder.write("result.json", session.result() | {"served": asdict(broker.counters), "measured": measured})
    raise KeyboardInterrupt if signalled == signal.SIGINT else Terminated


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(sock: socket.socket) -> bool:
    host = str(sock.getsockname()[0])
    return host.startswith("127.") or host == "::1"


async def _until_told(app: FastAPI, broker: Broker, sock: socket.socket, ready: Callable[[], None]) -> int | None:
    """Serves until a signal, which is returned, or the engine's death (None)."""
    from orchestrator.server.errors import ServerStoppingError

    loop = asyncio.get_running_loop()
    signals: list[int] = []

    def cancel() -> None:
        broker.refuse(ServerStoppingError("the server is stopping"))

    def stop() -> None:
        server.should_exit = True
        if len(signals) > 1:  # whoever asks twice does not want to wait
            cancel()
        else:
            loop.call_later(GRACE_S, cancel)

    def on_signal(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        loop.call_soon_threadsafe(stop)

    def on_death() -> None:
        server.should_exit = True

    server = _server(app)
    broker.start(on_death)
    try:
        with _handled_by(on_signal):
            ready()
            await server.serve(sockets=[sock])
    finally:
        broker.stop()
    return signals[0] if signals else None


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, restored in previous.items():
            signal.signal(number, restored)


def _server(app: FastAPI) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are ours: uvicorn would leave clients waiting for as long as an answer takes."""
            yield

    return Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,  # warnings and errors go to run.log
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(GRACE_S + FLUSH_S),
        )
    )
