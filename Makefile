# make demo   trains a small GPT on real text with Celo2 and shows the result
# make test   style, types and tests
# Both create .venv from requirements.txt first, and reuse it. PYTHON=python3.12 chooses the interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow benchmark clean

demo: .venv/ready
	$(BIN)/python -m data.prepare stdlib prepared/stdlib --tokenizer bpe --vocab-size 2048 --val-fraction 0.05
	$(BIN)/python train.py configs/demo.yaml

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

benchmark: .venv/ready
	$(BIN)/python -m launch.benchmark optimizer

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; try PYTHON=python3.11 make")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

clean:
	rm -rf .venv runs prepared
