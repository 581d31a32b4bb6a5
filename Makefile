# install   .venv with the pinned dependencies
# demo      compress, sample and benchmark the built-in text-to-image model into build/demo
# demo-pixels   the same for the built-in model of 28 x 28 pixels, pruning and training included, into build/demo-pixels
# test      the tests
# lint      style, format and types
# docs      the documentation site into build/site

VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
PIXELS := build/demo-pixels

.PHONY: install demo demo-pixels test lint docs

install: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[compress,openvino,search,serve,sign,text,dev]'
	touch $@

demo: install
	$(BIN)/diffpress compress calib_data/icons/student --recipe icons --out $(DEMO)
	$(BIN)/diffpress sample $(DEMO)/bundle --prompt-file calib_data/icons/prompts.txt --out $(DEMO)/samples.png
	$(BIN)/diffpress bench $(DEMO)/bundle --baseline calib_data/icons/teacher --baseline $(DEMO)/baseline --batch 1 --repeats 2 --json $(DEMO)/bench.json
	$(BIN)/diffpress report $(DEMO)

demo-pixels: install
	$(BIN)/diffpress compress --recipe quick --out $(PIXELS)
	$(BIN)/diffpress sample $(PIXELS)/bundle -n 16 --seed 0 --out $(PIXELS)/samples.png
	$(BIN)/diffpress bench $(PIXELS)/bundle --baseline calib_data/teacher --baseline $(PIXELS)/baseline --batch 8 --repeats 2 --json $(PIXELS)/bench.json
	$(BIN)/diffpress report $(PIXELS)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -d build/site
