# `just` lists these. Options after a recipe's own arguments are passed through to the command as they are.

set positional-arguments

python := quote(env_var_or_default("PYTHON", if path_exists(justfile_directory() / ".venv/bin/python") == "true" { justfile_directory() / ".venv/bin/python" } else { "python3" }))

_default:
    @{{quote(just_executable())}} --list

# all tests, or those that are named: just test tests/unit -k merge
test *OPTIONS:
    {{python}} -m pytest "$@"

# ruff (lint and format) and mypy
lint:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} -m mypy

# the embedded model, on whatever this machine has
demo *OPTIONS:
    {{python}} -m orchestrator "$@"

# what fits, before anything loads: just plan model.path=/data/merged hardware=4x24gb
plan *OPTIONS:
    {{python}} -m orchestrator task=plan "$@"

# a model at a width, answering: just convert-and-run /data/merged 4 prompts.file=prompts.txt
convert-and-run MODEL BITS *OPTIONS:
    shift 2 && {{python}} -m orchestrator model.path={{quote(MODEL)}} quant.bits={{quote(BITS)}} "$@"

# a conversation in the terminal
chat *OPTIONS:
    {{python}} -m orchestrator task=chat "$@"

# an OpenAI-compatible server: just serve model.path=/data/merged server.port=8000
serve *OPTIONS:
    {{python}} -m orchestrator task=serve "$@"

# one run per width: just sweep 4,8 model.path=/data/merged prompts.file=prompts.txt
sweep BITS *OPTIONS:
    shift && {{python}} -m orchestrator -m quant.bits={{quote(BITS)}} "$@"

# an interpreter of its own for an engine: just engine bitsandbytes
engine NAME *OPTIONS:
    shift && {{python}} -m orchestrator task=engine engine.name={{quote(NAME)}} "$@"
