# make demo            trains a small GPT on real text with Celo2 and shows the result
# make test            style, types and tests; test-slow: tests that take minutes
# make benchmark       times one optimizer step
# make test-versions   before a release, not in CI: make test with every other Python that is here (VERSIONS), each in a
#                      folder of its own, and the package alone, with the oldest torch that pyproject.toml allows (test-package)
# All create .venv from requirements.txt first, and reuse it. PYTHON=python3.12 chooses the interpreter (3.11 or newer),
# VENV=FOLDER another folder than .venv, JOBS=4 more tests at a time than two.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
VERSIONS ?= python3.12 python3.13
BIN := $(VENV)/bin
OLDEST_TORCH := 2.9
# The tests of the optimizer that need the package, torch and pytest alone.
PACKAGE_TESTS := $(addprefix tests/celo2/test_celo2_,rule.py rule_files.py optimizer.py optimizer_state.py rounding.py)

.PHONY: demo test test-slow test-versions test-package benchmark venv clean

demo: venv
	$(BIN)/python -m data.prepare stdlib prepared/stdlib --tokenizer bpe --vocab-size 2048 --val-fraction 0.05
	$(BIN)/python train.py configs/demo.yaml

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

test-slow: venv
	$(BIN)/python -m pytest -m slow

test-versions: test-package
	@for python in $(VERSIONS); do \
		if $$python -V > /dev/null 2>&1; then $(MAKE) test PYTHON=$$python VENV=.venv-$$(basename $$python) || exit 1; \
		else echo "$$python is not here: not tested"; fi; \
	done

# The script pytest, unlike python -m pytest, leaves the folder out of the path: the tests see the installed package.
test-package:
	rm -rf .venv-package build
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --disable-pip-version-check --quiet . "torch==$(OLDEST_TORCH).*" pytest
	.venv-package/bin/pytest -o pythonpath=tests/celo2 -m "not slow" $(PACKAGE_TESTS)

benchmark: venv
	$(BIN)/python -m launch.benchmark optimizer

# A PYTHON that is asked for and is not that of the folder is an error, not ignored.
venv: $(VENV)/ready
	@test "$(origin PYTHON)" = file || test "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" || \
		{ echo "$(VENV) has $$($(BIN)/python -V), not $(PYTHON): remove it, or add VENV=FOLDER" >&2; exit 1; }

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; try PYTHON=python3.11 make")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

clean:
	rm -rf .venv .venv-* runs prepared
