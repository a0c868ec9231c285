"""The command line before Hydra sees it: unknown keys get a suggestion, texts and paths need no Hydra quoting."""

from __future__ import annotations

import os
import re
from pathlib import Path

from orchestrator.config import Config, did_you_mean, get, keys
from orchestrator.errors import ConfigError, RequestError

# Hydra's own flags that take a value of their own.
FLAGS_WITH_VALUE = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"}
FLAGS = {"--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"}
FLAGS |= {"--shell-completion", "-sc"}
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
    "server.api_key",
}
TEXTS = {"prompts.text", "server.api_key"}  # those that are no paths
PATH_KEYS = tuple(sorted(VERBATIM - TEXTS))
MOST_OF_A_NAME = 255  # bytes: Linux's NAME_MAX
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
    flags: list[str] = []  # first, wherever they stood: argparse takes the overrides in one piece only
    overrides: list[str] = []
    typed: list[str] = []
    takes_value = False
    for argument in argv:
        if not takes_value and argument.startswith("-"):
            _check_flag(argument, conf)
        if takes_value or argument.startswith("-"):
            flags.append(argument)
            takes_value = not takes_value and argument in FLAGS_WITH_VALUE
        else:
            typed.append(argument)
            overrides.append(_override(argument, conf, multirun, own_groups))
    raw = {key: value for key, _, value in (argument.partition("=") for argument in typed)}
    for key, value in (("run.resume", raw.get("run.resume", "null")), ("prompts.file", raw.get("prompts.file"))):
        if multirun and value not in (None, "null") and (key == "run.resume" or value == "-"):
            raise ConfigError(f"{key}={value} is for one run, and -m makes several", "Leave -m out.")
    output = raw.get("output.path", "null")
    if multirun and output != "null" and not re.search(r"[,(]|\$\{", output):  # the second would find the first's in it
        swept = next((key for key in raw if "." in key and "," in raw[key] and key not in VERBATIM), "hydra:job.num")
        raise ConfigError(
            f"output.path={output} is one folder, and -m makes several",
            f"Name one for each: 'output.path={output}-${{{swept}}}'.",
        )
    return [*flags, *_resumed(overrides, raw)]


def _check_flag(argument: str, conf: Path) -> None:
    """Refuses an option that Hydra does not have, before it prints its usage."""
    if argument.partition("=")[0] not in FLAGS | FLAGS_WITH_VALUE:
        word = argument.lstrip("-").partition("=")[0]
        raise ConfigError(f"{argument} is not an option", _what_was_meant(word, _groups(conf)))


def _groups(conf: Path) -> dict[str, list[str]]:
    """The configuration's groups and what each can be."""
    return {d.name: sorted((f.stem for f in d.glob("*.yaml")), key=_by_number) for d in conf.iterdir() if d.is_dir()}


def _by_number(name: str) -> list[str | int]:
    """To sort by: 1x8gb before 1x12gb."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _override(argument: str, conf: Path, multirun: bool, own_groups: bool) -> str:
    head, equals, value = argument.partition("=")
    key = head.lstrip("+~")
    groups = _groups(conf)
    if key.startswith(("hydra.", "hydra/")):
        return argument
    if key.startswith(OPEN_KEYS):
        return f"++{key}={value}"
    if not equals and not head.startswith("~"):
        raise ConfigError(f"{argument!r} is not KEY=VALUE", _what_was_meant(argument, groups))
    group = key.partition("@")[0]
    if group in groups:
        for choice in _choices(value, multirun):
            if choice not in groups[group] and not own_groups:
                raise ConfigError(
                    f"{argument}: {group} is one of {', '.join(groups[group])}", _choice(group, choice, groups)
                )
        return argument
    _check_key(key, head)
    _check_bytes(key, value)
    if key not in VERBATIM:
        return argument
    if not value and key not in TEXTS:
        unset = f", or write {key}=null" if get(Config(), key) is None else ""
        raise ConfigError(f"{key}= is empty", f"Leave it out{unset}.")
    if multirun and key not in TEXTS and not Path(os.path.expanduser(value)).exists():
        return argument  # several paths to sweep over
    return f"{head}={_quoted(key, value)}"


def _choices(value: str, multirun: bool) -> list[str]:
    """The choices that a value names: several in a sweep, none that can be told in Hydra's choice(...), glob(...)."""
    if not multirun:
        return [value]
    return [] if "(" in value else [choice.strip() for choice in value.split(",")]


def _check_key(key: str, head: str) -> None:
    known = list(keys())
    # "+": Hydra would take any new key. A section as a whole (quant.calibration={...}) is Hydra's to check.
    if key not in known and not any(name.startswith(f"{key}.") for name in known):
        raise ConfigError(f"{head} is not a config key", did_you_mean(key, known) or "See --help for all of them.")


def _check_bytes(key: str, value: str) -> None:
    """Refuses what no JSON of ours could hold, and paths that no file system takes."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"{key} has bytes that are not UTF-8", "Give it another name.")
    longest = max(value.split("/"), key=len)
    if key in PATH_KEYS and "," not in value and len(longest.encode()) > MOST_OF_A_NAME:
        raise ConfigError(
            f"{key}={value[:40]}...: a name in it has {len(longest.encode())} bytes, and file systems take "
            f"{MOST_OF_A_NAME}",
            "Give a shorter one.",
        )


def _choice(group: str, value: str, groups: dict[str, list[str]]) -> str:
    if group == "model" or "/" in value:
        return f"A folder is given as {group}.path={value}."
    if group != "hardware" or (cards := _cards(value)) is None:
        return did_you_mean(value, groups[group])
    count, gb = cards
    if count == "0":
        return "A plan without a GPU: hardware=cpu."
    meant = f"{count}x{gb}gb"
    return f"Did you mean {meant}?" if meant in groups[group] else _other_cards(count, gb, groups[group])


def _cards(value: str) -> tuple[str, str] | None:
    """(how many, of how many GB) a profile's name means, written as people do: 3x7gb, 4x24, 4*24GiB, 24gbx4."""
    text = value.lower().replace(" ", "").replace("*", "x")
    if turned := re.fullmatch(r"(\d{1,4})gi?b?x(\d{1,4})", text):
        return turned[2], turned[1]
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})(?:gi?b?)?", text)
    return (found[1], found[2]) if found else None


def _other_cards(count: str, gb: str, profiles: list[str]) -> str:
    """How cards that no profile has are asked for: by another count, or by another size."""
    if f"1x{gb}gb" in profiles:
        return f"For {count} such cards: hardware=1x{gb}gb hardware.cards={count}."
    return f"For {count} of {gb} GB: hardware=1x24gb hardware.cards={count} hardware.memory_gib={gb}."


def _what_was_meant(argument: str, groups: dict[str, list[str]]) -> str:
    named = [f"{group}={argument}" for group, names in groups.items() if argument in names]
    if named:
        return f"Did you mean {named[0]}?"
    return did_you_mean(argument, [*keys(), *groups]) or "See --help for the keys."


def _quoted(key: str, value: str) -> str:
    """value as a Hydra string; null, lists ("[a,b]") and what is quoted already stay Hydra's."""
    if value in ("", "null") or (key == "prompts.text" and _is_list_or_string(value)):
        return value
    if key not in TEXTS and value.startswith("~"):
        value = os.path.expanduser(value)
    # OmegaConf first. Then Hydra: a quote would end the string, and backslashes count before it and at the end.
    value = literal(value)
    value = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", value)
    value = re.sub(r"(\\+)\Z", lambda found: found[1] * 2, value)
    return f"'{value}'"


def unquoted(override: str) -> str:
    """An override as it was typed, before `_quoted`."""
    key, sign, value = override.partition("=")
    if len(value) < 2 or not value[0] == value[-1] == "'":
        return override
    value = re.sub(r"(\\+)\Z", lambda found: found[1][::2], value[1:-1])
    for mark in ("'", "${"):
        value = re.sub(rf"((?:\\\\)*)\\{re.escape(mark)}", lambda found: found[1][::2] + mark, value)  # noqa: B023
    return key + sign + value


_NOT_A = (
    (r"Value '.*' of type '\w+' could not be converted to Integer", "is not a whole number"),
    (r"Value '.*' of type '\w+' could not be converted to Float", "is not a number"),
    (r"Value '.*' is not a valid bool .*", "is neither true nor false"),
    (r"Invalid value assigned: \w+ is not a ListConfig, list or tuple\.", "is not a list: put brackets around it"),
    (r"Invalid type assigned: \w+ is not a subclass of AdapterConfig\. .*", "is not a list of {path: FOLDER}"),
)
"""What OmegaConf says after KEY=VALUE -> the same for a person."""


def in_words(text: str) -> str:
    """One of Hydra's or OmegaConf's messages, in the words of a person where they are known."""
    for pattern, words in _NOT_A:
        if found := re.fullmatch(rf"(\S.*?=.*?) {pattern}", text, re.DOTALL):
            return f"{found[1]} {words}"
    return text


def literal(text: str) -> str:
    """text so that OmegaConf takes it as it stands: "${" would be an interpolation, and backslashes count before it."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)


def _is_list_or_string(value: str) -> bool:
    """Whether all of value is a list or a quoted string in Hydra's grammar ("[INST] hi" is neither)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    if not value.startswith(("[", "'", '"')):
        return False
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")._value
    except HydraException:
        return False
    return isinstance(parsed, list | QuotedString)


def _resumed(overrides: list[str], raw: dict[str, str]) -> list[str]:
    """With run.resume the run's own folder is the run folder, and its own configuration is the configuration.

    `raw`: the overrides as they were typed.
    """
    if raw.get("run.resume", "null") in ("", "null"):
        return overrides
    others = [key for key in raw if not key.startswith(WITH_RESUME)]
    if others:
        raise ConfigError(
            f"run.resume continues a run as it was, and {', '.join(others)} would change it",
            "Leave that out, or start a new run.",
        )
    folder = Path(raw["run.resume"]).expanduser().absolute()
    if not (folder / "config.yaml").is_file():
        raise RequestError(f"run.resume={folder}: not a run folder (it has no config.yaml)")
    return [*overrides, f"hydra.run.dir={_quoted('run.resume', str(folder))}"]
