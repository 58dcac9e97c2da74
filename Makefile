PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-oldest lint clean

# Trains on images that msbreg renders; the result is in runs/default.
demo: $(VENV)/.installed-train
	$(BIN)/msbreg pretrain

# Two runs side by side, since a process either compiles Triton kernels or interprets them; the second is shown when the
# first is done. Fails where either does. Most tests start processes of their own, so that four at a time are enough.
test: $(VENV)/.installed-train,test
	@status=0; log=$$(mktemp); \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpreter -n 2 >$$log 2>&1 & interpreted=$$!; \
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile || status=$$?; \
	wait $$interpreted || status=$$?; \
	cat $$log; rm $$log; exit $$status

test-slow: $(VENV)/.installed-train,test
	$(BIN)/python -m pytest -m slow -n auto --maxprocesses 4 --dist loadfile

# The tests with the lowest versions that setup.py permits, of torch, DALI and all others. Needs uv and Python 3.10.
test-oldest:
	uv venv --quiet --clear --seed --python 3.10 $(VENV)-oldest
	uv pip install --quiet --python $(VENV)-oldest --resolution lowest-direct --editable '.[train,test]'
	$(VENV)-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Types are checked where kernels/ is msbreg.kernels: mypy does not follow an editable installation there.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed
	$(BIN)/python setup.py --quiet build_py --build-lib build/typed
	cd build/typed && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p msbreg

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# pip, not python, stands for a whole environment: python is there even where the system lacks its venv package.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: setup.py | $(BIN)/pip
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$*]'
	@touch $@
