# `just` lists these. Options after a recipe's own arguments are passed through to the command.

python := env_var_or_default("PYTHON", if path_exists(justfile_directory() / ".venv/bin/python") == "true" { justfile_directory() / ".venv/bin/python" } else { "python3" })

_default:
    @just --list

# all tests, or those that are named: just test tests/unit -k merge
test *OPTIONS:
    {{python}} -m pytest {{OPTIONS}}

# ruff (lint and format) and mypy
lint:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} -m mypy

# the embedded model, on whatever this machine has
demo *OPTIONS:
    {{python}} -m orchestrator {{OPTIONS}}

# what fits, before anything loads: just plan model.path=/data/merged hardware=4x24gb
plan *OPTIONS:
    {{python}} -m orchestrator task=plan {{OPTIONS}}

# a model at a width, answering: just convert-and-run /data/merged 4 prompts.file=prompts.txt
convert-and-run MODEL BITS *OPTIONS:
    {{python}} -m orchestrator model.path={{quote(MODEL)}} quant.bits={{BITS}} {{OPTIONS}}

# a conversation in the terminal
chat *OPTIONS:
    {{python}} -m orchestrator task=chat {{OPTIONS}}

# an OpenAI-compatible server: just serve model.path=/data/merged server.port=8000
serve *OPTIONS:
    {{python}} -m orchestrator task=serve {{OPTIONS}}

# one run per width: just sweep 4,8 model.path=/data/merged
sweep BITS *OPTIONS:
    {{python}} -m orchestrator -m quant.bits={{BITS}} {{OPTIONS}}

# an interpreter of its own for an engine: just engine bitsandbytes
engine NAME *OPTIONS:
    {{python}} -m orchestrator task=engine engine.name={{NAME}} {{OPTIONS}}
