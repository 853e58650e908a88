# Every target needs only Python 3.11 or newer, git and make, and makes the virtual environment that it uses.
PYTHON ?= python3
RUN := .venv-run
TEST := .venv-test
PYTEST := $(TEST)/bin/python -m pytest -n 2 --dist worksteal --durations=20

# The authors' ori_pqal.json, if PubMedQA is to be part of `make reproduce`.
PUBMEDQA ?=

.PHONY: quickstart reproduce padding test test-long docs clean

# A small Mamba trained on real PubMed abstracts: minutes on two cores.
quickstart: $(RUN)/installed
	$(RUN)/bin/python -m biomamba_jax.pretrain --config configs/quickstart.yaml

# BioMamba's claim at laptop scale, with controls and three seeds: trains the models of configs/reproduce, measures them and
# prints the table of docs/evaluation.md. A second start goes on where the first one ended.
reproduce: $(RUN)/installed
	$(RUN)/bin/python -m benchmarks reproduce $(if $(PUBMEDQA),--pubmedqa '$(PUBMEDQA)')

# How much of a hundredfold perplexity padding alone makes: the quickstart's model by the first published code's arithmetic
# and by its honest figures, before and after 60 steps with padding in the loss.
padding: quickstart
	$(RUN)/bin/python -m biomamba_jax.pretrain --config configs/padding/padded.yaml
	$(RUN)/bin/python -m biomamba_jax.evaluate --config configs/padding/evaluate.yaml

# Style, types, imports and all tests but those of the next target, slow ones included.
test: $(TEST)/installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports --no-logo
	$(PYTEST) -m 'not ahead_of_time and not long'

# Training on every mesh, in several processes and with interpreted kernels; then programs compiled for TPUs and GPUs
# that are not there: kernels at every published size, whole training steps, plans. ONLY is an expression of pytest's -k.
ONLY ?=
test-long: $(TEST)/compilers
	$(PYTEST) -m 'ahead_of_time or long' $(if $(ONLY),-k '$(ONLY)')

# The documentation as a site, in build/site; a warning is an error.
docs: $(TEST)/docs
	NO_MKDOCS_2_WARNING=1 $(TEST)/bin/python -m mkdocs build --quiet --strict
	@echo built build/site/index.html

$(RUN)/installed: pyproject.toml
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python -m pip install --quiet --editable .
	touch $@

$(TEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

$(TEST)/compilers: $(TEST)/installed
	$(TEST)/bin/python -m pip install --quiet --editable '.[test,chips]'
	touch $@

$(TEST)/docs: $(TEST)/installed
	$(TEST)/bin/python -m pip install --quiet --editable '.[test,docs]'
	touch $@

clean:
	rm -rf $(RUN) $(TEST) build/site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
