"""The command line: mistakes get a suggestion, texts and paths arrive as they were typed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from composing import CONF, composed, hydra_ready
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import ConfigError, RequestError
from orchestrator.overrides import VERBATIM, prepare


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with hydra_ready():
        yield


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(list(argv), CONF)
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [
        ("quant.bitz=4", "quant.bits"),
        ("+quant.bitz=4", "quant.bits"),
        ("++quant.bitz=4", "quant.bits"),
        ("bits=4", "quant.bits"),
        ("modle.path=/data/x", "model.path"),
        ("prompt.text=hi", "prompts.text"),
        ("generation.max_token=3", "generation.max_tokens"),
        ("max_tokens=3", "generation.max_tokens"),
        ("hardware.reserve=2", "hardware.reserve_gib"),
        ("backend=bitsandbites", "bitsandbytes"),
        ("hardware=4x24", "4x24gb"),
        ("hardware=2x24GB", "2x24gb"),
        ("hardware=3x24gb", "hardware=1x24gb hardware.cards=3"),
        ("hardware=3x20GB", "hardware=1x24gb hardware.cards=3 hardware.memory_gib=20"),
        ("hardware=3x7gb", "For 3 of 7 GB: hardware=1x24gb hardware.cards=3 hardware.memory_gib=7."),
        ("hardware=4x24g", "Did you mean 4x24gb?"),
        ("hardware=24GBx4", "Did you mean 4x24gb?"),
        ("hardware=4*24GiB", "Did you mean 4x24gb?"),
        ("hardware=0x24gb", "hardware=cpu"),
        ("hardware=4x-24gb", "4x24gb"),
        ("hardware=gpu", "cpu"),
        ("quant=nf5", "nf4"),
        ("task=convrt", "convert"),
        ("model=/data/x", "model.path=/data/x"),
        ("model=mine", "model.path=mine"),
        ("plan", "task=plan"),
        ("chat", "task=chat"),
        ("4x24gb", "hardware=4x24gb"),
        ("model.pth", "model.path"),
        ("~quant.bitz", "quant.bits"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(typed: str, suggested: str) -> None:
    message = refusal(typed)
    assert suggested in message.replace(typed, "", 1)
    assert "\n" not in message


@pytest.mark.parametrize("typed", ["zzzzz=1", "qqq", "xyzzy.plugh=3"])
def test_what_resembles_nothing_is_refused_with_a_way_to_all_keys(typed: str) -> None:
    assert "--help" in refusal(typed)


@pytest.mark.parametrize("key", ["paths.runs", "model.path", "prompts.text"])
def test_bytes_that_are_not_utf_8_are_refused(key: str) -> None:
    assert refusal(f"{key}=/tmp/\udcff").startswith(f"{key} has bytes that are not UTF-8")


@pytest.mark.parametrize("key", ["run.resume", "paths.artifacts", "offload.folder"])
def test_names_that_no_file_system_takes_are_refused(key: str) -> None:
    name = "é" * 128
    assert "has 256 bytes, and file systems take 255" in refusal(f"{key}=/tmp/{name}/x")


def test_what_may_be_left_unset_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(["paths.artifacts="], CONF)
    assert caught.value.hint == "Leave it out."
    with pytest.raises(ConfigError) as caught:
        prepare(["output.path="], CONF)
    assert caught.value.hint == "Leave it out, or write output.path=null."


def test_each_choice_of_a_sweep_is_checked() -> None:
    message = refusal("-m", "hardware=4x24gb,4x23gb")
    assert "8x80gb" in message
    assert "hardware=1x24gb hardware.cards=4 hardware.memory_gib=23" in message
    prepare(["-m", "hardware=4x24gb, 1x24gb", "quant=choice(nf4,int8)"], CONF)


def test_an_unknown_choice_lists_the_choices() -> None:
    message = refusal("backend=llamacpp")
    assert all(name in message for name in ("auto", "bitsandbytes", "transformers"))


@pytest.mark.parametrize(
    "argv",
    [
        ["quant.bits=4"],
        ["backend=bitsandbytes", "hardware=4x24gb", "quant=nf4", "task=plan"],
        ["-m", "quant.bits=4,8"],
        ["--multirun", "backend=transformers,bitsandbytes"],
        ["--cfg", "job"],
        ["-c", "job"],
        ["--help"],
        ["hydra.verbose=true"],
        ["~quant.bits"],
    ],
)
def test_what_is_right_is_left_as_it_is(argv: list[str]) -> None:
    assert prepare(argv, CONF) == argv


def test_a_sections_own_dictionary_is_hydras_to_check() -> None:
    assert composed("generation={max_tokens: 3, stop: [a]}").generation.stop == ["a"]


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_engine_arguments_are_free(prefix: str) -> None:
    config = composed(f"{prefix}backend.engine_args.attn_implementation=eager", "backend.engine_args.deep.er=[1,2]")
    assert config.backend.engine_args == {"attn_implementation": "eager", "deep": {"er": [1, 2]}}


# A list, a quoted string and null mean the same as elsewhere in Hydra; everything else is the text itself.
PROMPTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40).filter(
    lambda text: text not in ("", "null") and not text.startswith(("[", "'", '"'))
)


@given(PROMPTS)
@example("What is 1, 2 = 3?")
@example("it's \"quoted\" \\ and \\' and \\\\")
@example("ends with a backslash\\")
@example("ends with a backslash and a newline\\\n")
@example("${oc.env:HOME} and \\${x} and ${}")
@example("{a: 1}")
@example(" blanks around ")
@example("two\nlines\tand a tab\r\n")
@example("# no comment")
@example("true")
@example("4")
@example("~")
@example("привет, 世界 🙂")
def test_any_prompt_arrives_unchanged(text: str) -> None:
    assert composed(f"prompts.text={text}").prompts.text == text


PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r"), max_size=30)


@given(PATHS)
@example("a=b/c,d")
@example("with blanks/and 'quotes' \"both\"")
@example("${oc.env:HOME}")
@example("[list]")
@example("step={10}")
@example("back\\slash\\")
@example("(1)")
def test_any_path_arrives_unchanged(tail: str) -> None:
    path = f"/data/{tail}"
    config = composed(f"model.path={path}", f"prompts.file={path}", f"output.path={path}", f"paths.runs={path}")
    assert (config.model.path, config.prompts.file, config.output.path, config.paths.runs) == (path,) * 4


def test_home_is_expanded_in_paths_and_not_in_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = composed("model.path=~/model", "prompts.text=~/model")
    assert config.model.path == "/home/somebody/model"
    assert config.prompts.text == "~/model"


def test_a_list_of_prompts_is_a_list() -> None:
    assert composed("prompts.text=['one, two',three]").prompts.text == ["one, two", "three"]


@pytest.mark.parametrize("text", ["[INST] hello [/INST], you", "'t is the season, isn't it", '"Yes," she said'])
def test_a_prompt_that_only_begins_like_a_list_or_a_string_is_a_text(text: str) -> None:
    assert composed(f"prompts.text={text}").prompts.text == text


def test_null_unsets_a_path() -> None:
    assert composed("model.path=null").model.path is None


def test_in_a_sweep_commas_separate_values() -> None:
    assert prepare(["-m", "model.path=/a,/b"], CONF) == ["-m", "model.path=/a,/b"]


def test_every_verbatim_key_is_a_key() -> None:
    prepare([f"{key}=x" for key in VERBATIM - {"run.resume"}], CONF)


def run_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("{}\n")
    return path


def test_a_resumed_run_keeps_its_folder(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "runs" / "1")
    assert prepare([f"run.resume={run}"], CONF)[-1] == f"hydra.run.dir='{run}'"


@pytest.mark.parametrize("name", ["a b", "a=b,c", "it's", "${now}", "[x]"])
def test_a_resumed_run_may_lie_anywhere(tmp_path: Path, name: str) -> None:
    run = run_folder(tmp_path / name)
    assert len(prepare([f"run.resume={run}"], CONF)) == 2


@pytest.mark.parametrize("other", ["run.in_flight=2", "paths.artifacts=/x", "hydra.verbose=true"])
def test_beside_a_resumed_run_may_stand_what_does_not_change_it(tmp_path: Path, other: str) -> None:
    run = run_folder(tmp_path / "run")
    assert prepare([f"run.resume={run}", other], CONF)[-1].startswith("hydra.run.dir=")


@pytest.mark.parametrize("other", ["quant.bits=8", "backend=transformers", "prompts.text=hi", "task=chat"])
def test_a_resumed_run_cannot_be_changed(tmp_path: Path, other: str) -> None:
    message = refusal(f"run.resume={run_folder(tmp_path / 'run')}", other)
    assert other.partition("=")[0] in message


def test_only_a_run_folder_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"not a run folder.*config\.yaml"):
        prepare([f"run.resume={tmp_path}"], CONF)


def test_no_resume_is_an_ordinary_run() -> None:
    assert prepare(["run.resume=null"], CONF) == ["run.resume=null"]


def test_one_output_folder_is_not_for_a_sweep() -> None:
    message = refusal("-m", "task=convert", "quant.bits=4,8", "output.path=/new/out")
    assert "output.path=/new/out is one folder, and -m makes several" in message
    assert "'output.path=/new/out-${quant.bits}'" in message
    assert "'output.path=/new/out-${hydra:job.num}'" in refusal("-m", "quant=nf4,int8", "output.path=/new/out")
    for several in ("/new/out-${quant.bits}", "/new/a,/new/b"):
        assert prepare(["-m", "quant.bits=4,8", f"output.path={several}"], CONF)[-1] == f"output.path={several}"
