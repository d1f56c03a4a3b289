# One line a target; `make help` lists them. What they do is in deploy/kit.py and the playbooks.
SITE ?= local
PYTHON ?= $(firstword $(foreach p,/usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11,$(wildcard $(p))) python3)
ARGS ?=
SERVICE ?=
MODE_ARGS := $(if $(DIFY),-e dify_mode=$(DIFY)) $(if $(MODE),-e dify_mode=$(MODE))
KIT = .venv/bin/python deploy/kit.py --site $(SITE)
.DEFAULT_GOAL := help
.PHONY: help venv venv-dev venv-plot deploy plan check status logs restart start stop debug metrics model prune-models recover-secrets uninstall release-file runtime-lock inference-lock images-archive plugin-package test lint unit integration e2e test-gpu bench-deploy bench-inference

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo; echo '  SITE=name   a folder below deploy/inventories (default: local, this machine)'; echo '  ARGS="-e name=value"   a setting for this run; settings that last: deploy/inventories/<site>/group_vars/kit/settings.yml'

venv:
	@$(PYTHON) deploy/bootstrap.py

venv-dev:
	@$(PYTHON) deploy/bootstrap.py --group dev --group plot

venv-plot:
	@$(PYTHON) deploy/bootstrap.py --group plot

deploy: venv  ## everything, to an answered question; MODE=compose in containers, DIFY=skip without Dify; ARGS=--check only looks
	@$(KIT) deploy $(MODE_ARGS) $(ARGS)

check: venv  ## test the deployed hosts thoroughly
	@$(KIT) check $(ARGS)

status: venv  ## what runs, since when, on which port
	@$(KIT) host status

logs: venv  ## a service's log, SERVICE=api; follows it with ARGS=-f
	@$(KIT) host logs $(SERVICE) $(ARGS)

restart: venv  ## all services, or SERVICE=api
	@$(KIT) host restart $(SERVICE)

start: venv  ## start what `make stop` stopped
	@$(KIT) host start

stop: venv  ## stop all services, gracefully; data stays
	@$(KIT) host stop

debug: venv  ## SERVICE=api under a debugger to attach to
	@$(KIT) host debug $(SERVICE)

metrics: venv  ## what Prometheus can scrape, as a file for its file_sd_configs; dashboard: deploy/dashboards
	@$(KIT) metrics

plan: $(if $(PLOT),venv-plot,venv)  ## where a GPU's memory goes with MODEL=; GPU=a100-40g GPUS=2 (or this host's), GOAL=most-users, PLOT=plan.png
	@.venv/bin/python -m inference plan $(MODEL) $(if $(GPU),--gpu $(GPU)) $(if $(GPUS),--gpus $(GPUS)) \
	  $(if $(GOAL),--goal $(GOAL)) $(if $(PLOT),--plot $(PLOT)) $(ARGS)

model: venv  ## serve another MODEL=, and let Dify use it; the old one's weights stay
	@$(KIT) model $(MODEL) $(MODE_ARGS) $(ARGS)

prune-models: venv  ## weights and engines that no service uses any more; ARGS=--delete removes them
	@$(KIT) prune-models $(ARGS)

recover-secrets: venv  ## a site that lost its secrets.yml: take them from its host's files
	@$(KIT) play recover_secrets $(ARGS)

images-archive: venv  ## the container images of Dify VERSION=1.16.0 in a file, for a host without a registry; ARGS=--help
	@.venv/bin/python deploy/tools/images_archive.py $(VERSION) $(ARGS)

plugin-package: venv  ## PLUGIN=x.difypkg with its Python packages inside, for hosts without a package index; MACHINE=aarch64
	@.venv/bin/python deploy/tools/plugin_package.py $(PLUGIN) $(if $(MACHINE),--machine $(MACHINE)) $(ARGS)

uninstall: venv  ## stop everything and remove the programs; data stays unless ARGS="-e kit_delete_data=yes"
	@$(KIT) play uninstall $(ARGS)

inference-lock: venv  ## rewrite the model engines' locks from inference/locks/*.in
	@set -e; compile() { name=$$1; shift; .venv/bin/uv pip compile --quiet --no-config inference/locks/$$name.in "$$@" \
	    --python-version 3.12 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate \
	    --custom-compile-command "make inference-lock" --output-file inference/locks/$$name.txt $(ARGS); }; \
	  compile cpu --overrides inference/locks/cpu-overrides.txt; compile cuda; compile cuda-0.28.0; compile router --no-deps

test: lint unit integration  ## the kit's own tests; the end-to-end ones need root, all of them about an hour
	@$(MAKE) --no-print-directory e2e ARGS='-m "not long"'
	@echo 'Left out, for the hour and a half that they take: deploys killed at ten places, by root, with all parts elsewhere, most of what is in containers. `make e2e` runs them too.'

lint: venv-dev  ## style, types, playbooks, shell
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy deploy inference tests
	@.venv/bin/yamllint --strict .
	@PATH=$(CURDIR)/.venv/bin:$$PATH ANSIBLE_CONFIG=deploy/ansible.cfg .venv/bin/ansible-lint -q
	@.venv/bin/shellcheck .ci/run

unit: venv-dev  ## decisions, without a host
	@.venv/bin/pytest -q tests/unit

integration: venv-dev  ## real parts under a throw-away home
	@.venv/bin/pytest -q tests/integration

e2e: venv-dev  ## whole deploys by throw-away users, as root; without Dify where its source cannot be had
	@.venv/bin/pytest -q -s tests/e2e $(ARGS)

test-gpu: venv-dev  ## plan, install, serve and prove on this host's GPUs; ARGS=--help
	@tests/gpu/run $(ARGS)

bench-deploy: venv-dev  ## cold, cached and no-op deploys by a throw-away user, as root: times by step
	@.venv/bin/python -m tests.bench.deploy

bench-inference: venv  ## how fast answers come by each way, against a plain vllm serve; the model pauses meanwhile
	@$(KIT) bench $(ARGS)

release-file: venv  ## draft or refresh the file of a Dify release, VERSION=1.17.0
	@.venv/bin/python deploy/tools/release_file.py $(VERSION) $(ARGS)

runtime-lock: venv  ## ask for the runtime's hashes again; ARGS=pnpm=11.11.0 moves a tool
	@.venv/bin/python deploy/tools/lock_runtime.py $(ARGS)
