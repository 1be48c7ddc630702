# Conveniences; README gives the same lines without make. VENV=DIR names another environment.
VENV ?= .venv
export VENV

.PHONY: demo pipeline-tiny test quick lint
demo:  ## the built-in task: a vision-language model learns to find buttons, one to two minutes
	@python=$$(sh .ci/python requirements.txt) && $$python train.py

pipeline-tiny:  ## SFT, DPO and RLOO of a tiny model in a row, a few minutes
	@python=$$(sh .ci/python requirements.txt) && $$python -m stages pipeline --output_dir runs/pipeline-tiny

test:  ## every test
	@python=$$(sh .ci/python requirements-dev.txt) && $$python -m pytest -n 2 --durations=5

quick:  ## the tests that take no training run and no second library, within a minute
	@python=$$(sh .ci/python requirements-dev.txt) && $$python -m pytest -n 2 -m "not slow"

lint:
	@python=$$(sh .ci/python requirements-dev.txt) && $$python -m ruff check .
