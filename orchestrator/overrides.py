"""The command line before Hydra sees it: unknown keys get a suggestion, texts and paths need no Hydra quoting."""

from __future__ import annotations

from pathlib import Path

from orchestrator.config import did_you_mean, keys
from orchestrator.errors import ConfigError, RequestError

# Hydra's own flags that take a value of their own.
FLAGS_WITH_VALUE = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"}
FLAGS_WITH_VALUE |= {"--cfg", "-c", "--info", "-i", "--experimental-rerun"}

# Their values are taken as they stand: prompts have commas and quotes, paths have "=" and blanks.
VERBATIM = {
    "prompts.text",
    "prompts.file",
    "model.path",
    "model.adapter",
    "model.chat_template",
    "output.path",
    "run.resume",
    "paths.artifacts",
    "paths.engines",
    "paths.runs",
    "offload.folder",
    "backend.python",
    "quant.measurement",
    "quant.calibration.file",
}
WITH_RESUME = ("run.", "paths.", "hydra.")  # what may be said beside run.resume
OPEN_KEYS = ("backend.engine_args.",)  # passed to the engine as they are


def prepare(argv: list[str], conf: Path) -> list[str]:
    """argv as Hydra is to get it.

    Args:
        argv: the arguments, without the program's name.
        conf: the folder of the configuration's groups.

    Raises:
        ConfigError: an argument that is no override, an unknown key or choice; with a suggestion.
    """
    multirun = bool({"-m", "--multirun"} & set(argv))
    own_groups = any(flag.split("=")[0] in {"--config-dir", "-cd", "--config-path", "-cp"} for flag in argv)
    prepared: list[str] = []
    takes_value = False
    for argument in argv:
        if takes_value or argument.startswith("-"):
            prepared.append(argument)
            takes_value = not takes_value and argument in FLAGS_WITH_VALUE
        else:
            prepared.append(_override(argument, conf, multirun, own_groups))
    return _resumed(prepared)


def _override(argument: str, conf: Path, multirun: bool, own_groups: bool) -> str:
    head, equals, value = argument.partition("=")
    key = head.lstrip("+~")
    groups = {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in conf.iterdir() if folder.is_dir()
    }
    if key.startswith(("hydra.", "hydra/")):
        return argument
    if key.startswith(OPEN_KEYS):
        return f"++{key}={value}"
    if not equals and not head.startswith("~"):
        raise ConfigError(f"{argument!r} is not KEY=VALUE", _what_was_meant(argument, groups))
    group = key.partition("@")[0]
    if group in groups:
        if value not in groups[group] and not (own_groups or (multirun and "," in value)):
            raise ConfigError(
                f"{argument}: {group} is one of {', '.join(groups[group])}", _choice(group, value, groups)
            )
        return argument
    _check_key(key, head)
    return argument if multirun or key not in VERBATIM else f"{head}={_quoted(key, value)}"


def _check_key(key: str, head: str) -> None:
    known = list(keys())
    # "+": Hydra would take any new key. A section as a whole (quant.calibration={...}) is Hydra's to check.
    if key not in known and not any(name.startswith(f"{key}.") for name in known):
        raise ConfigError(f"{head} is not a config key", did_you_mean(key, known) or "See --help for all of them.")


def _choice(group: str, value: str, groups: dict[str, list[str]]) -> str:
    if group == "model" or "/" in value:
        return f"A folder is given as {group}.path={value}."
    return did_you_mean(value, groups[group])


def _what_was_meant(argument: str, groups: dict[str, list[str]]) -> str:
    named = [f"{group}={argument}" for group, names in groups.items() if argument in names]
    if named:
        return f"Did you mean {named[0]}?"
    return did_you_mean(argument, [*keys(), *groups]) or "See --help for the keys."


def _quoted(key: str, value: str) -> str:
    """value as a Hydra string; lists ("[a,b]"), null and what is quoted already stay Hydra's."""
    if value in ("", "null") or (key == "prompts.text" and value.startswith(("[", "'", '"'))):
        return value
    if key != "prompts.text" and value.startswith("~"):
        value = str(Path(value).expanduser())
    # A Hydra string: a quote is escaped, and so are the backslashes before one (or at the end); OmegaConf's own
    # interpolation is escaped after that.
    out, backslashes = [], 0
    for char in value:
        if char == "\\":
            backslashes += 1
            continue
        out.append("\\" * (backslashes * 2 if char == "'" else backslashes))
        out.append("\\'" if char == "'" else char)
        backslashes = 0
    out.append("\\" * backslashes * 2)
    return "'" + "".join(out).replace("${", "\\${") + "'"


def _resumed(prepared: list[str]) -> list[str]:
    """With run.resume the run's own folder is the run folder, and its own configuration is the configuration."""
    given = {o.partition("=")[0]: o.partition("=")[2] for o in prepared if not o.startswith("-")}
    if "run.resume" not in given or given["run.resume"] in ("", "null"):
        return prepared
    others = [key for key in given if not key.startswith(WITH_RESUME)]
    if others:
        raise ConfigError(
            f"run.resume continues a run as it was, and {', '.join(others)} would change it",
            "Leave that out, or start a new run.",
        )
    folder = Path(given["run.resume"].strip("'")).absolute()
    if not (folder / "config.yaml").is_file():
        raise RequestError(f"run.resume={folder}: not a run folder (it has no config.yaml)")
    return [*prepared, f"hydra.run.dir={given['run.resume']}"]
