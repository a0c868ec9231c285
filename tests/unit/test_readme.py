"""What the README says is so: its commands, its settings, its examples, the recipes."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from composing import CONF, hydra_ready

from orchestrator.backends.exl2_setup import FLASH_ATTENTION
from orchestrator.backends.table import BACKENDS
from orchestrator.config import keys
from orchestrator.overrides import prepare

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TYPED = README + (ROOT / "Justfile").read_text(encoding="utf-8")
HELP = (ROOT / "conf" / "config.yaml").read_text(encoding="utf-8")
JUST = shutil.which("just", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with hydra_ready():
        yield


def command(name: str) -> str:
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme_command.py", name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_both_commands_are_one_line_that_makes_the_environment_installs_and_runs() -> None:
    for name, last in (("demo", "-m orchestrator"), ("tests", "-m pytest")):
        line = command(name)
        assert "\n" not in line
        steps = line.split(" && ")
        assert steps[0] == "python3 -m venv .venv"
        assert "-c constraints.txt -e" in steps[1]
        assert steps[-1] == f".venv/bin/python {last}"


def test_an_unknown_command_of_the_readme_is_an_error() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme_command.py", "nothing"], capture_output=True)
    assert done.returncode != 0


def test_the_extras_of_the_commands_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("demo", "tests"):
        for extra in re.findall(r"\[(\w+)\]", command(name)):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def settings_table() -> list[str]:
    """The keys in the first column of the README's table of settings, written out."""
    rows = README.partition("### Settings")[2].partition("###")[0].splitlines()
    found = []
    for row in rows:
        cell = row.split("|")[1] if row.startswith("| `") else ""
        section = ""
        for key in re.findall(r"`([^`]+)`", cell):
            section = section if key.startswith(".") else key.partition(".")[0]
            found.append(section + key if key.startswith(".") else key)
    return found


def test_every_setting_of_the_readme_is_a_key() -> None:
    known = {*keys(), *(path.name for path in CONF.iterdir() if path.is_dir())}
    found = settings_table()
    assert len(found) > 20
    assert set(found) <= known


def test_every_backend_is_in_the_readme() -> None:
    for name in BACKENDS:
        assert f"| `{name}` |" in README


def test_the_least_flash_attn_is_said_alike() -> None:
    least = ".".join(map(str, FLASH_ATTENTION))
    assert f"flash-attn {least} or later" in README
    assert f"flash-attn >= {least} " in (ROOT / "orchestrator/engine/pins/exllamav2.txt").read_text(encoding="utf-8")


def test_exit_codes_are_in_the_readme() -> None:
    section = README.partition("### Exit codes")[2]
    assert all(re.search(rf"\b{code} [a-z]", section) for code in (0, 1, 2, 3, 4, 130))


def examples(text: str) -> list[str]:
    """Lines of a text that are commands of this program."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line.startswith("python -m orchestrator")]


@pytest.mark.parametrize("line", examples(README))
def test_every_example_of_the_readme_is_a_valid_command(line: str, tmp_path: Path) -> None:
    check(shlex.split(line, comments=True)[3:], tmp_path)


@pytest.mark.parametrize("line", [*examples(README), *re.findall(r"^.*just (?:sweep|convert-and-run) .*", TYPED, re.M)])
def test_every_example_that_answers_with_a_users_model_has_prompts(line: str) -> None:
    words = shlex.split(line, comments=not line.startswith("#"))
    model = any(word.startswith("model.path=") for word in words) or "convert-and-run" in words
    if model and not any(word.startswith("task=") for word in words):
        assert any(word.startswith("prompts.") for word in words), line


@pytest.mark.parametrize("line", examples(HELP))
def test_every_example_of_the_help_is_a_valid_command(line: str, tmp_path: Path) -> None:
    check(shlex.split(re.split(r" {3,}", line)[0])[3:], tmp_path)


def check(argv: list[str], folder: Path) -> None:
    """The command line is accepted, by our checks and by Hydra's parser."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (folder / "config.yaml").write_text("{}\n")
    argv = [f"run.resume={folder}" if argument.startswith("run.resume=") else argument for argument in argv]
    prepared = prepare(argv, CONF)
    OverridesParser.create().parse_overrides([argument for argument in prepared if "=" in argument])


def recipes() -> dict[str, str]:
    """The recipes of the Justfile with the comment above each."""
    lines = (ROOT / "Justfile").read_text(encoding="utf-8").splitlines()
    return {m[1]: above for above, line in pairwise(lines) if (m := re.match(r"([a-z][\w-]*)[^:=]*:(?!=)", line))}


def test_just_lists_every_recipe_with_what_it_does() -> None:
    if JUST is None:
        pytest.skip("just is not installed")
    done = subprocess.run([JUST, "--list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"test", "lint", "demo", "plan", "convert-and-run", "chat", "serve", "sweep", "engine"} <= set(recipes())
    for name, comment in recipes().items():
        assert re.search(rf"^    {name}\b.* # {re.escape(comment.removeprefix('# '))}", done.stdout, re.MULTILINE)


def test_recipes_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"^just ([a-z][\w-]*)", README, re.MULTILINE))
    assert named
    assert named <= set(recipes())


def test_just_alone_lists_them_wherever_just_is() -> None:
    if JUST is None:
        pytest.skip("just is not installed")
    done = subprocess.run([JUST], cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert "convert-and-run" in done.stdout


def typed(recipe: list[str], folder: Path) -> list[list[str]]:
    """What a recipe gives to Python, argument by argument: one list a line of the recipe."""
    if JUST is None:
        pytest.skip("just is not installed")
    python = folder / "a python"
    python.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    python.chmod(0o755)
    done = subprocess.run([JUST, "--set", "python", shlex.quote(str(python)), *recipe], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    return [ast.literal_eval(line) for line in done.stdout.decode().splitlines()]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (["plan"], ["task=plan"]),
        (["plan", "model.path=/a"], ["task=plan", "model.path=/a"]),
        (["plan", "prompts.text=a b"], ["task=plan", "prompts.text=a b"]),
        (["demo", "prompts.text='Why is the sky blue?'"], ["prompts.text='Why is the sky blue?'"]),
        (["convert-and-run", "/my model", "4", "x=it's"], ["model.path=/my model", "quant.bits=4", "x=it's"]),
        (["convert-and-run", "/it's", "4"], ["model.path=/it's", "quant.bits=4"]),
        (["chat", "a=$HOME `id`"], ["task=chat", "a=$HOME `id`"]),
        (["serve", "server.port=8000"], ["task=serve", "server.port=8000"]),
        (["sweep", "4,8", "a=b c", "d=*"], ["-m", "quant.bits=4,8", "a=b c", "d=*"]),
        (["sweep", "4,8"], ["-m", "quant.bits=4,8"]),
        (["engine", "bitsandbytes", "a=b c"], ["task=engine", "engine.name=bitsandbytes", "a=b c"]),
    ],
)
def test_a_recipe_types_the_command(recipe: list[str], expected: list[str], tmp_path: Path) -> None:
    assert typed(recipe, tmp_path) == [["-m", "orchestrator", *expected]]


def test_options_of_the_tests_may_have_blanks(tmp_path: Path) -> None:
    assert typed(["test", "-m", "not slow"], tmp_path) == [["-m", "pytest", "-m", "not slow"]]


def test_the_check_of_a_change_runs_the_readmes_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "tools/readme_command.py tests" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_measured_tables_are_those_of_the_results() -> None:
    command = [sys.executable, ROOT / "tools" / "readme_tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
