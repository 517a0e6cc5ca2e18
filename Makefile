# make run     Label Studio and Facings, with shelf photos that are boxed already
# make serve   Facings alone, for a Label Studio that you have
# make test    all tests, with a real Label Studio and a real Chromium; make test-slow: SAM 2.1's larger networks
# make setup format lint

PHOTOS ?=
PORT ?= 9090
LS_PORT ?= 8080

.PHONY: run serve setup format lint test test-slow
.DEFAULT_GOAL := run

# A uv that scripts/find_uv.sh had to fetch lies there; whatever runs below finds it too.
export PATH := $(PATH):$(CURDIR)/.cache/uv/bin

run: setup
	@exec .venv/bin/facings demo --port "$(PORT)" --label-studio-port "$(LS_PORT)" $(if $(PHOTOS),--photos "$(PHOTOS)")

serve: setup
	@PORT="$(PORT)" exec .venv/bin/facings serve

setup: .venv/.synced

.venv/.synced: pyproject.toml uv.lock
	@uv=$$(sh scripts/find_uv.sh) && "$$uv" sync --locked
	@touch $@

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy model backend scripts

test: setup
	.venv/bin/pytest

test-slow: setup
	.venv/bin/pytest -m slow
