# Every verb is done by tools/quickstart.py (on Windows: py tools\quickstart.py <verb>).
# make test ARGS="-k resume" passes arguments on; make env PYTHON=python3.12 picks the interpreter for .venv.
PYTHON ?= python3
ARGS ?=

.PHONY: demo test env check bench docs
demo test env check bench docs:
	@$(PYTHON) tools/quickstart.py $@ $(ARGS)
