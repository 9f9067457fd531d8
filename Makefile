# make run     the demo model and one with attention on POPE and MME: the whole pipeline, ends with a table of both
# make test    the test suite, in two processes (TEST_PROCESSES=0: in one)
# make lint    ruff and mypy
# make tables plots   results/tables, results/plots, STUDY.md and study/ again, from results/runs
# make screenshots   docs/report.png, report-answers.png and serve.png (needs chromium)
# make notebooks   the notebooks' outputs again, in a kernel of each
# make demo-model   train the bundled demo model again (some two hours on 2 cores)
# make gpu-check   what is measured on a GPU, into results/gpu: one card with 80 GB, some 20 minutes
# make docs    the documentation site, into site/
# Each builds .venv first when it is missing or out of date.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
TEST_PROCESSES ?= 2
DEMO_DATA ?= runs/demo-data
DEMO_OUT ?= runs/demo-model

.PHONY: install run test lint tables plots gpu-check docs screenshots notebooks demo-model clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); set PYTHON=..." >&2; exit 2; }
	@echo 'installing the pinned packages into $(VENV): about 7 GB, some minutes'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq --upgrade pip
	$(PY) -m pip install -qq --constraint constraints.txt --editable ".[dev]"
	@touch $@

run: install
	$(PY) -m harness.run --tasks pope,mme --out runs/demo
	$(PY) -m harness.run --tasks pope,mme --model nano-attention --out runs/demo-attention
	$(PY) -m harness.compare runs/demo runs/demo-attention
	@echo 'nano was trained longer: results/STUDY.md has Mamba and attention trained alike'

test: install
	$(PY) -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

tables: install
	$(PY) -m harness.tables --from results/runs --out results/tables
	$(PY) -m harness.study --records $(sort $(wildcard results/runs/study*)) --page results/STUDY.md

plots: install
	$(PY) -m harness.plots --from results/runs --out results/plots

gpu-check: install
	$(PY) tools/gpu_check.py

docs: install
	$(PY) -m pip install -qq --constraint constraints.txt --editable ".[docs]"
	$(PY) -m mkdocs build --strict

screenshots: install
	$(PY) tools/screenshots.py

notebooks: install
	$(PY) tools/run_notebooks.py

# The commands that made vlmamba/assets/nano: six stages of text, then the paper's two.
TRAIN = $(PY) -m vlmamba.train --preset nano+vss_l2+bsm --images $(DEMO_DATA) \
  --features-cache $(DEMO_OUT)/features --resume auto --save-every 200
LINES = --lr 2e-3 --micro-batch 32
demo-model: install
	test -f $(DEMO_DATA)/finetune.json || \
	  $(PY) -m vlmamba.demo --out $(DEMO_DATA) --images 14000 --captions 8000 --dialogues 16000
	$(TRAIN) --stage text --data $(DEMO_DATA)/text.txt --out $(DEMO_OUT)/text \
	  --tokenizer-data $(DEMO_DATA)/text.txt $(DEMO_DATA)/dialogue.json
	$(TRAIN) --stage dialogue --data $(DEMO_DATA)/dialogue.json --out $(DEMO_OUT)/dialogue \
	  --init $(DEMO_OUT)/text/final --save-every 300 --keep 3
	$(TRAIN) --stage text --data $(DEMO_DATA)/near.txt --out $(DEMO_OUT)/near \
	  --init $(DEMO_OUT)/dialogue/checkpoints/step-00000600 --steps 240 $(LINES)
	$(TRAIN) --stage text --data $(DEMO_DATA)/far.txt --out $(DEMO_OUT)/far \
	  --init $(DEMO_OUT)/near/final --steps 300 $(LINES)
	$(TRAIN) --stage text --data $(DEMO_DATA)/facts.txt --out $(DEMO_OUT)/facts \
	  --init $(DEMO_OUT)/far/final --steps 400 $(LINES)
	$(TRAIN) --stage text --data $(DEMO_DATA)/letters.txt --out $(DEMO_OUT)/letters \
	  --init $(DEMO_OUT)/facts/final --steps 400 $(LINES)
	$(TRAIN) --stage dialogue --data $(DEMO_DATA)/dialogue.json --out $(DEMO_OUT)/talk \
	  --init $(DEMO_OUT)/letters/final --steps 600 --lr 1.5e-3
	$(TRAIN) --stage pretrain --data $(DEMO_DATA)/pretrain.json --out $(DEMO_OUT)/pretrain \
	  --init $(DEMO_OUT)/talk/final
	$(TRAIN) --stage finetune --data $(DEMO_DATA)/finetune.json --out $(DEMO_OUT)/finetune \
	  --init $(DEMO_OUT)/pretrain/final
	$(PY) tools/bundle_model.py $(DEMO_OUT)/finetune/final vlmamba/assets/nano

clean:
	rm -rf runs site .pytest_cache .ruff_cache .mypy_cache .hypothesis
