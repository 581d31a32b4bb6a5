# install   .venv with the pinned dependencies
# demo      compress, sample and benchmark the built-in teacher into build/demo
# test      the tests
# lint      style, format and types
# docs      the documentation site into build/site

VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: install demo test lint docs

install: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[compress,openvino,text,dev]'
	touch $@

demo: install
	$(BIN)/diffpress compress --recipe quick --out $(DEMO)
	$(BIN)/diffpress sample $(DEMO)/bundle -n 16 --seed 0 --out $(DEMO)/samples.png
	$(BIN)/diffpress bench $(DEMO)/bundle --baseline calib_data/teacher --baseline $(DEMO)/baseline --batch 8 --repeats 2 --json $(DEMO)/bench.json
	$(BIN)/diffpress report $(DEMO)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -d build/site
