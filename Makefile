# Each target sets itself up: make demo | run | test | lint | bench | soak | outage | clean. PYTHON=... chooses the Python.
.PHONY: demo run test lint bench soak outage setup clean
BIN = .venv/bin

demo: setup ## The whole path without a phone; KEEP=1 leaves it running until Ctrl-C
	@$(BIN)/whatsapp-worker demo $(if $(KEEP),--keep)

run: setup ## The real thing: WhatsApp itself, data in ./data
	@exec $(BIN)/whatsapp-worker run --all

test: setup ## All tests; ARGS="-k name" chooses some
	@$(BIN)/pytest $(ARGS)

lint: setup ## Style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## Speed and memory beside a raw neonize loop; about five minutes
	@$(BIN)/python tests/bench.py $(ARGS)

soak: setup ## Twenty sessions under random faults for twenty minutes
	@$(BIN)/python tests/soak.py $(ARGS)

outage: setup ## Thirty sessions cut off for three minutes; about six minutes
	@$(BIN)/python tests/outage.py $(ARGS)

setup:
	@PYTHON="$(PYTHON)" scripts/setup.sh

clean: ## Removes what the other targets made, but never data/
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
