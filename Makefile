# Both targets need only Python 3.11 or newer, git and make; each makes the virtual environment that it uses.
PYTHON ?= python3
RUN := .venv-run
TEST := .venv-test

.PHONY: quickstart test clean

# A small Mamba trained on real PubMed abstracts: minutes on two cores.
quickstart: $(RUN)/installed
	$(RUN)/bin/python -m biomamba_jax.pretrain --config configs/quickstart.yaml

# Style, types and all tests, slow ones included.
test: $(TEST)/installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/python -m pytest -n 2 --dist worksteal

$(RUN)/installed: pyproject.toml
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python -m pip install --quiet --editable .
	touch $@

$(TEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(RUN) $(TEST) .pytest_cache .mypy_cache .ruff_cache
