# make demo   builds .venv, plans and trains specs/quickstart.mlm on this machine, prints a sample
# make test   builds .venv and runs the tests, on two workers (WORKERS=4: on four)
# make check  formatter, linter and types
# make golden rewrites the golden files: read the diff
# make fuzz   property tests with examples that no run has seen
# make examples  trains specs/examples in full, one after another, and prints losses and what the models say
# make published  parameters and FLOPs per token of every shipped spec beside published figures and transformers' own models
# make huggingface  every family against transformers: logits both ways and gradients
# make sc21   docs/sc21.md: plans of Narayanan et al. SC'21, Table 1, beside the planner's
# make regret  every feasible plan of a small model on 4 and 8 ranks, timed beside the planner's choice: benchmarks/regret.md
# make verify three ranks of Llama 3 405B on 16,384 GPUs held to the plan, each in some 20 s
# make parity every plan of the lattice, and every architecture, against one process (long)

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that tests run in: some of them start up to eight ranks of their own
WORKERS ?= 2

.PHONY: demo examples test check golden fuzz published huggingface sc21 parity regret verify clean

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("mlmdsl needs Python 3.11 or newer; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c $(CONSTRAINTS)
	$(BIN)/python -m compileall -q $(VENV)/lib mlmdsl > /dev/null || true
	touch $@

demo: $(STAMP)
	$(BIN)/mlmdsl plan specs/quickstart.mlm --here
	$(BIN)/mlmdsl run specs/quickstart.mlm --here
	$(BIN)/mlmdsl generate --prompt "The import statement " --tokens 300

examples: $(STAMP)
	rm -rf runs/examples
	for name in text code chat translate; do $(BIN)/mlmdsl run specs/examples/$$name.mlm --out runs/examples/$$name || exit; done
	$(BIN)/mlmdsl generate runs/examples/text --prompt "The import statement " --tokens 240
	$(BIN)/mlmdsl generate runs/examples/code --prompt "def " --tokens 240
	$(BIN)/mlmdsl generate runs/examples/chat --prompt "What is the capital of Norway?"
	$(BIN)/mlmdsl generate runs/examples/chat --prompt "My name is Emmy."
	$(BIN)/mlmdsl generate runs/examples/translate --prompt "today the old man sees a small bird."
	$(BIN)/mlmdsl generate runs/examples/translate --prompt "does the young woman love the red flower?"

test: $(STAMP)
	$(BIN)/python -m compileall -q mlmdsl
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

golden: $(STAMP)
	$(BIN)/python -m pytest --update-golden
	git --no-pager diff --stat -- tests/golden

fuzz: $(STAMP)
	$(BIN)/python -m pytest --hypothesis-profile fuzz $$(grep -rl '@given' tests)

published: $(STAMP)
	$(BIN)/python -m tests.published.independent

huggingface: $(STAMP)
	$(BIN)/python -m tests.huggingface.table

sc21: $(STAMP)
	$(BIN)/python -m benchmarks.sc21 > docs/sc21.md.new
	mv docs/sc21.md.new docs/sc21.md

parity: $(STAMP)
	$(BIN)/python -m tests.parity.lattice
	$(BIN)/python -m tests.parity.families

regret: $(STAMP)
	$(BIN)/python benchmarks/regret.py

verify: $(STAMP)
	mkdir -p runs
	$(BIN)/mlmdsl plan specs/models/llama3_405b.mlm -o runs/llama3_405b.plan.json
	for rank in 0 8191 16383; do $(BIN)/mlmdsl verify runs/llama3_405b.plan.json --rank $$rank || exit; done

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
