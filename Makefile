PHOTOS ?=
PORT ?= 9090
LS_PORT ?= 8080

.DEFAULT_GOAL := help
.PHONY: help run serve setup format lint test test-slow docs pictures env

# scripts/find_uv.sh may have fetched a uv into this folder; every recipe below finds it on the path.
export PATH := $(PATH):$(CURDIR)/.cache/uv/bin

help: ## Print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | \
		while IFS='|' read -r target text; do printf '  %-15s %s\n' "$$target" "$$text"; done

run: setup ## Start Label Studio and Facings with pre-annotated photos (PHOTOS=folder PORT=9090 LS_PORT=8080)
	@exec .venv/bin/facings demo --port "$(PORT)" --label-studio-port "$(LS_PORT)" $(if $(PHOTOS),--photos "$(PHOTOS)")

serve: setup ## Start Facings alone, for a Label Studio that you have (PORT=9090)
	@PORT="$(PORT)" exec .venv/bin/facings serve

PROTO := backend/transports/facings

setup: .venv/.synced $(PROTO)_pb2.py ## Install the locked packages into .venv, and write the code of gRPC

.venv/.synced: pyproject.toml uv.lock
	@uv=$$(sh scripts/find_uv.sh) && "$$uv" sync --locked
	@touch $@

$(PROTO)_pb2.py: $(PROTO).proto .venv/.synced
	.venv/bin/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. $<

format: setup ## Format the code and repair what ruff can repair
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lint: setup ## Check style, types and import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy model backend scripts tests/fakes.py
	.venv/bin/lint-imports

test: setup ## Run the tests, with a real Label Studio and a real Chromium
	.venv/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=25

test-slow: setup ## Compare the larger networks of SAM 2.1 with upstream, minutes each
	.venv/bin/pytest -m slow

docs: setup ## Write the generated pages: docs/settings.md and docs/cli.md
	.venv/bin/python -m scripts.generate_docs

pictures: setup ## Take the pictures of the documentation again, in a real browser
	.venv/bin/python tests/screenshots.py

env: ## Create .env for docker compose, unless it exists
	@sh scripts/create_env.sh
