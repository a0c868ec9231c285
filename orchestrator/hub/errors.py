"""The hub library's errors as the project's own: one line, the right exit code, what to type."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from orchestrator.checkpoint.trust import shown
from orchestrator.errors import DoesNotFitError, OrchestratorError, RequestError

TRANSPORT: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]
"""The base of all errors of the HTTP client that the library is built on, which client that may be."""


class Unreachable(OrchestratorError):
    """The hub did not answer (or must not be asked)."""

    def __init__(self, hub: str, message: str, hint: str, *, asked_for: bool = False) -> None:
        super().__init__(message, hint)
        self.hub = hub
        self.asked_for = asked_for

    def without_cache(self) -> OrchestratorError:
        """What to say where the cache has not all of it either."""
        kind = RequestError if self.asked_for else OrchestratorError
        return kind(f"{self.message}, and {self.hub} is not in the cache in full", self.hint)


@contextmanager
def explained(hub: str, revision: str) -> Iterator[None]:
    """The library's errors as ours, in one line. The narrower classes come first."""
    page = f"{constants.ENDPOINT}/{hub}"
    try:
        yield
    except hub_errors.GatedRepoError:
        raise RequestError(
            f"{hub} is gated: its owner grants access", f"Accept its terms at {page} and set HF_TOKEN=..."
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise RequestError(
            f"{hub} has no revision {shown(revision)}", f"Its branches, tags and commits: {page}/tree/main"
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise RequestError(
            f"there is neither a folder {hub} here nor a model {hub} at {constants.ENDPOINT} that you may see",
            f"Look for a typing error; if it is private or gated, accept its terms at {page} and set HF_TOKEN=...",
        ) from None
    except hub_errors.OfflineModeIsEnabled:
        raise Unreachable(
            hub,
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set",
            f"Unset it, or on a machine with a network: hf download {hub} --revision {revision}",
            asked_for=True,
        ) from None
    except hub_errors.HfHubHTTPError as error:
        raise _answered(hub, error) from None
    except (TRANSPORT, ConnectionError, TimeoutError) as error:  # the transport's own
        raise Unreachable(
            hub,
            f"{constants.ENDPOINT} cannot be reached ({_brief(error)})",
            "What has come is kept: type the same line again when the network is back; HF_ENDPOINT names another hub.",
        ) from None
    except (PermissionError, NotADirectoryError) as error:
        raise RequestError(
            f"{error.filename}: {error.strerror}", "Set HF_HOME to a folder that can be written."
        ) from None
    except (OSError, ValueError) as error:  # a full disk, a file cut short, an answer that is not a hub's
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFitError(
                f"{constants.HF_HUB_CACHE} is full: {hub} is not all there",
                "Free some of it and type the same line again, or set HF_HOME to a folder on a larger disk.",
            ) from None
        raise OrchestratorError(
            f"the download of {hub} stopped: {_brief(error)}", "What has come is kept: type the same line again."
        ) from None


def _answered(hub: str, error: hub_errors.HfHubHTTPError) -> OrchestratorError:
    """An answer of the hub that is none of the named errors."""
    status = error.response.status_code
    name = f"{status} {error.response.reason_phrase}".strip()
    if status in (401, 403):
        return RequestError(
            f"{constants.ENDPOINT} refuses {hub} ({name})",
            "Set HF_TOKEN=... to a token that is valid and may read it; unset it for a public model.",
        )
    message = f"{constants.ENDPOINT} answered {name} for {hub}"
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
        return Unreachable(hub, message, "What has come is kept: type the same line again a little later.")
    return OrchestratorError(message, "Does HF_ENDPOINT name a hub?")


def _brief(error: BaseException) -> str:
    return shown(str(error).splitlines()[0] if str(error) else type(error).__name__, 200)
