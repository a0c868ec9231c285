"""Parts of a hub's files by HTTP range requests: the bytes that were asked for and no others, or an error.

What answers may be wrong, slow or malicious. Whatever it sends, no more is taken than was asked for (and, from a
server that ignores ranges, a little before it): the connection is closed then.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from orchestrator import __version__
from orchestrator.checkpoint.trust import shown
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.hub.commit import Commit, RemoteFile
from orchestrator.hub.errors import TRANSPORT, explained
from orchestrator.hub.locate import NoPartsError
from orchestrator.report.console import size

BUDGET = 256 * 2**20
"""Most bytes that are read of one repo: its headers and its index. Those of the largest models take about 30 MiB."""

BLOCK = 64 * 2**10
"""The first request for a file: more than most headers take, and no slower than a smaller one."""

SKIPPED = 2**20  # most bytes that are read to no end, of a server that begins at a file's start whatever is asked
PATIENCE_S, SLOWEST = 30.0, 100_000  # a request may take so long, and longer the more is asked: bytes a second
PAUSES_S = (0.5, 2.0)  # before another try
PASSING = (408, 429, 500, 502, 503, 504)
REDIRECTS = 5
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


class Ranges:
    """Parts of one commit's files. For any thread; `taken` counts the bytes that were read."""

    def __init__(self, commit: Commit) -> None:
        self.commit = commit
        self.taken = 0
        self._lock = threading.Lock()
        self._headers = build_hf_headers(library_name="orchestrator", library_version=__version__)

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` up to `stop`.

        Raises:
            OrchestratorError: of the kinds of `explained`; NoPartsError; an answer that is not what was asked for.
            CheckpointError: more than BUDGET would be read.
        """
        self._count(stop - start)
        with explained(self.commit.hub, self.commit.revision):
            for pause in PAUSES_S:
                try:
                    return self._once(file, start, stop)
                except TRANSPORT as error:
                    if isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING:
                        raise
                time.sleep(pause)
            return self._once(file, start, stop)

    def _count(self, taken: int) -> None:
        with self._lock:
            self.taken += taken
            if self.taken > BUDGET:
                raise CheckpointError(f"{self.commit.hub}: its headers take more than {size(BUDGET)}: refused")

    def _once(self, file: RemoteFile, start: int, stop: int) -> bytes:
        url = hf_hub_url(self.commit.hub, file.name, revision=self.commit.commit)
        asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}  # no bombs, and sizes that count
        where = f"{constants.ENDPOINT} answered wrongly for {self.commit.hub}: {shown(file.name)}"
        deadline = time.monotonic() + PATIENCE_S + (stop - start) / SLOWEST
        with _answer(url, {**self._headers, **asked}, deadline) as response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise OrchestratorError(f"{where}: encoded as {shown(encoding, 40)}")
            if response.status_code == 206:
                _check_range(response, file, start, stop, where)
                return _body(response, 0, stop - start, deadline, where, ends=True)
            if response.status_code != 200:
                raise OrchestratorError(f"{where}: status {response.status_code}", "Does HF_ENDPOINT name a hub?")
            if start > SKIPPED:
                raise NoPartsError(
                    f"{constants.ENDPOINT} sends {shown(file.name)} of {size(file.size)} only as a whole",
                    f"Download it first: hf download {self.commit.hub} --revision {self.commit.revision}",
                )
            self._count(start)
            return _body(response, start, stop - start, deadline, where, ends=stop == file.size)


@contextmanager
def _answer(url: str, headers: dict[str, str], deadline: float) -> Iterator[Any]:
    """The answer behind the redirects, of which nothing is read yet. The library's client keeps connections alive.

    The client would follow redirects too, but read the body of each without bound. It drops the token on the way to
    another host.
    """
    client = get_session()
    request = client.build_request("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    for _ in range(REDIRECTS + 1):
        with closing(client.send(request, stream=True, follow_redirects=False)) as response:
            request = response.next_request
            if request is None:
                if response.status_code >= 400:  # the library would read the body to quote it, whatever its length
                    hf_raise_for_status(
                        type(response)(response.status_code, headers=response.headers, request=response.request)
                    )
                yield response
                return
            _finish(response, deadline)
    raise OrchestratorError(f"{constants.ENDPOINT} redirects without end", "Does HF_ENDPOINT name a hub?")


def _finish(response: Any, deadline: float) -> None:
    """Reads what is left of a short body, so that its connection serves the next request."""
    left = BLOCK
    for chunk in response.iter_raw():
        left -= len(chunk)
        if left < 0 or time.monotonic() > deadline:
            return


def _check_range(response: Any, file: RemoteFile, start: int, stop: int, where: str) -> None:
    said = response.headers.get("Content-Range", "")
    found = CONTENT_RANGE.fullmatch(said)
    if found is None or (int(found[1]), int(found[2])) != (start, stop - 1):
        raise OrchestratorError(f"{where}: asked for bytes {start}-{stop - 1}, it sends {shown(said or 'others', 60)}")
    if found[3] not in ("*", str(file.size)):
        raise OrchestratorError(f"{where}: it has {int(found[3]):,} bytes, the hub lists {file.size:,}")


def _body(response: Any, skipped: int, length: int, deadline: float, where: str, *, ends: bool) -> bytes:
    """`length` bytes of a body, after some that are not wanted. `ends`: it has to end there; else it is cut there."""
    data = bytearray()
    for chunk in response.iter_raw():
        dropped = min(skipped, len(chunk))
        skipped -= dropped
        data += chunk[dropped:]
        if len(data) > length and ends:
            raise OrchestratorError(f"{where}: asked for {length:,} bytes, it sends more")
        if len(data) >= length and not ends:
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(data):,} of {length:,} bytes of {where.rpartition(': ')[2]} in time")
    if len(data) < length:
        raise OrchestratorError(f"{where}: asked for {length:,} bytes, it sent {len(data):,}")
    return bytes(data[:length])
