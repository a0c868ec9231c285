"""Every error that a user can meet, and the exit code of each.

    OrchestratorError               1  the work failed
    +-- StageError                  1  a merge, conversion or quantization stopped
    +-- EngineError                 1  an engine's process died or refused
    +-- OutputError                 1  what it has to say cannot be written
    +-- RequestError                2  the request is wrong
    |   +-- ConfigError             2  a key or a value of the configuration
    |   +-- CheckpointError         2  a model's or an adapter's files
    +-- DoesNotFitError             3  memory or disk, with the numbers
    |   +-- OutOfMemoryError        3  an engine's device was full where its plan had room
    +-- EngineUnavailableError      4  not installed here, or its device is absent

An interruption is not an error: KeyboardInterrupt (Ctrl-C) and Terminated (SIGTERM) pass through, exit code 130. Nor is
a reader that has gone (`... | head`): BrokenPipeError passes through, and nothing is said.
"""

INTERRUPTED = 130  # 128 and SIGINT, as shells have it
READER_GONE = 141  # 128 and SIGPIPE, likewise


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: ends the program also where Ctrl-C would only end an answer."""


class OrchestratorError(Exception):
    """What is wrong and where, in one line, and what to do instead.

    Args:
        message: what is wrong, naming the file, key or tensor.
        hint: what to type or to change instead; empty where nothing helps.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message.rstrip(".")
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class StageError(OrchestratorError):
    """A stage (merge, conversion, quantization) stopped."""


class EngineError(OrchestratorError):
    """An engine's process died, refused its plan, or answered with something that is not finite."""


class OutputError(OrchestratorError):
    """The output, or what it is redirected to, cannot be written."""


class RequestError(OrchestratorError):
    """The request is wrong: config, files or values."""

    exit_code = 2


class ConfigError(RequestError):
    """A key or a value of the configuration."""


class CheckpointError(RequestError):
    """A model's or an adapter's files: missing, damaged, malicious, contradictory or unsupported."""


class DoesNotFitError(OrchestratorError):
    """It does not fit in the memory or on the disk that is there."""

    exit_code = 3


class OutOfMemoryError(DoesNotFitError):
    """An engine ran out of memory, which its plan had not foreseen."""


class EngineUnavailableError(OrchestratorError):
    """The engine is not installed here, or its device is absent."""

    exit_code = 4
