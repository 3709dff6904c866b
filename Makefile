# `make demo` and `make test` each build their own environment from nothing; a second call reuses it.
PYTHON ?= python3
DEMO := .venv/demo
TEST := .venv/test

.PHONY: demo test types suite clean

demo: $(DEMO)/ready
	$(DEMO)/bin/peftkit train recipes/configs/reuters_r8_lora.yaml output.folder=runs/demo output.overwrite=true
	rm -rf runs/demo-merged
	$(DEMO)/bin/peftkit merge runs/demo runs/demo-merged
	$(DEMO)/bin/peftkit predict runs/demo "opec ministers agreed to cut crude oil output by one mln barrels a day"

test: $(TEST)/ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(MAKE) --jobs 2 types suite

types: $(TEST)/ready
	$(TEST)/bin/mypy

suite: $(TEST)/ready
	$(TEST)/bin/pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf .venv

$(DEMO)/ready: EXTRAS :=
$(TEST)/ready: EXTRAS := [test]
.venv/%/ready: pyproject.toml constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.$(EXTRAS)'
	touch $@
