# Noisy Student: `make run` needs nothing but Python 3.11+ and make; all else is installed into .venv, once.

VENV := .venv
BIN := $(VENV)/bin
NS := $(BIN)/ns
PYTEST := $(BIN)/python -m pytest
ARGS ?=
RUN_EXTRAS := pipelines,quickstart
TEST_EXTRAS := $(RUN_EXTRAS),versions,check,export,mlflow,tensorboard,dev

K8S := $(BIN)/python -m k8s
CLUSTER_OPTIONS = $(if $(KUBE_CONTEXT),--context "$(KUBE_CONTEXT)")
BUILD_OPTIONS = $(if $(BUILDER),--build "--builder=$(BUILDER)") $(if $(PYTHON_IMAGE),--build "--python=$(PYTHON_IMAGE)") \
	$(if $(CPU_INDEX),--build "--cpu-index=$(CPU_INDEX)") $(if $(PIP_CONFIG),--build "--pip-config=$(PIP_CONFIG)")
OVERLAY_OPTIONS = $(if $(OVERLAY),--overlay "$(OVERLAY)") $(if $(REGISTRY),--registry "$(REGISTRY)") \
	$(if $(WORKER),--worker "$(WORKER)") $(BUILD_OPTIONS)

MUTMUT = OMP_NUM_THREADS=1 PYTHONPATH="$(abspath $(VENV)-mutation)" $(BIN)/python -m mutmut

.DEFAULT_GOAL := help
.PHONY: $(shell awk -F: '/^[a-z-]+:.*## / {print $$1}' $(MAKEFILE_LIST))

##@ Start

help: ## Show this list
	@awk -F ':.*## |##@ ' '/^##@ / {printf "\n%s\n", $$2} /^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.run ## Run the quickstart: the whole loop on handwritten digits, a minute (ARGS="--set seed=1")
	@$(NS) run quickstart $(ARGS)

test: $(VENV)/.test ## Run the unit tests, a minute and a half
	@$(PYTEST) --numprocesses auto --dist loadfile $(ARGS)

clean: ## Remove runs/ and site/
	rm -rf runs site

##@ Develop

test-integration: $(VENV)/.test $(VENV)-mlflow/.installed ## Run the integration tests: servers, killed processes, whole runs, a browser
	@$(PYTEST) -m "integration or browser or data" --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-containers: $(VENV)/.test ## Run the tests that need a container engine
	@$(PYTEST) -m containers tests/integration --numprocesses auto --dist loadfile $(ARGS)

test-cluster: $(VENV)/.test ## Run the tests that need a Kubernetes cluster, in namespaces of their own (KUBE_CONTEXT=)
	@KUBE_CONTEXT="$(KUBE_CONTEXT)" $(PYTEST) -m cluster tests/cluster $(ARGS)

test-all: export NS_LONG_TESTS := 1

test-all: test test-integration test-containers ## Run all tests

coverage: $(VENV)/.test ## Measure which lines of ns/ the tests run, half an hour
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest --numprocesses auto --dist loadfile $(ARGS)
	@$(BIN)/coverage run -m pytest -m "integration or browser or data" --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --fail-under 90

mutation: $(VENV)-mutation/.installed ## List changes to deciding code that no test notices, an hour (ARGS="ns.evaluation.gate*")
	@$(MUTMUT) run $(ARGS)
	@$(MUTMUT) results | sed '/: not checked$$/d'

lint: $(VENV)/.test ## Check style, types, the direction of imports, and names
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python .ci/check_names.py

docs: $(VENV)/.test ## Build the documentation as a site, site/index.html, and check its links (ARGS=--help)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet $(ARGS)

format: $(VENV)/.test ## Format the code
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

compile: $(VENV)/.run ## Compile the pipelines into pipelines/*.yaml
	@$(BIN)/python -m pipelines.compile

constraints: $(VENV)/.test ## Write constraints.txt from what is installed
	@{ grep '^#' constraints.txt; $(BIN)/pip freeze --exclude-editable | grep -viE '^(nvidia-|triton|cuda-| @ )'; } > constraints.tmp
	@mv constraints.tmp constraints.txt

venv: $(VENV)/.test ## Create the virtual environment for development

distclean: clean ## Remove runs/ and the virtual environments
	rm -rf $(VENV) $(VENV)-audit $(VENV)-checkov $(VENV)-mlflow $(VENV)-mutation mutants

##@ Measure

bench: $(VENV)/.bench ## Run all benchmarks and write benchmarks/results
	@for one in data photos train finetune label select order duplicates polluted_pool loop quickstart kfp_status soak; do $(BIN)/python -m benchmarks.$$one --keep || exit; done
	@$(BIN)/python -m benchmarks.method_digits
	@$(BIN)/python -m benchmarks.method_cifar10
	@$(BIN)/python -m benchmarks.summary

bench-quick: $(VENV)/.bench ## Run short benchmarks and compare their ratios with the recorded ones (ARGS="--only data")
	@$(BIN)/python -m benchmarks.summary --quick $(ARGS)

bench-data: $(VENV)/.bench ## Measure how fast images are read and augmented (ARGS="--quick")
	@$(BIN)/python -m benchmarks.data $(ARGS)

bench-photos: $(VENV)/.bench ## Measure how fast photographs become a network's input (ARGS="--quick")
	@$(BIN)/python -m benchmarks.photos $(ARGS)

bench-train: $(VENV)/.bench ## Measure how fast the training loop is (ARGS="--quick")
	@$(BIN)/python -m benchmarks.train $(ARGS)

bench-finetune: $(VENV)/.bench ## Measure how fast pretrained networks are fine-tuned on photographs, against timm (TIMM_TRAIN=, ARGS="--quick")
	@$(BIN)/python -m benchmarks.finetune $(ARGS)

bench-label: $(VENV)/.bench ## Measure how fast a pool is labeled (ARGS="--quick")
	@$(BIN)/python -m benchmarks.label $(ARGS)

bench-select: $(VENV)/.bench ## Measure a selection from millions of labels (ARGS="--quick")
	@$(BIN)/python -m benchmarks.select $(ARGS)

bench-order: $(VENV)/.bench ## Measure how well and how fast the order of training mixes a pool (ARGS="--quick")
	@$(BIN)/python -m benchmarks.order $(ARGS)

bench-duplicates: $(VENV)/.bench ## Measure how duplicates are found among a million images (ARGS="--quick")
	@$(BIN)/python -m benchmarks.duplicates $(ARGS)

bench-polluted: $(VENV)/.bench ## Measure how clean the foreign score keeps a polluted pool, ten minutes (ARGS="--quick")
	@$(BIN)/python -m benchmarks.polluted_pool $(ARGS)

bench-loop: $(VENV)/.bench ## Measure where the time of a whole run goes (ARGS="--quick")
	@$(BIN)/python -m benchmarks.loop $(ARGS)

bench-kfp: $(VENV)/.bench ## Compute the pods and the status of runs on Kubeflow
	@$(BIN)/python -m benchmarks.kfp_status $(ARGS)

bench-quickstart: $(VENV)/.bench ## Measure the quickstart against a plain loop in one process (ARGS="--quick")
	@$(BIN)/python -m benchmarks.quickstart $(ARGS)

bench-walk: $(VENV)/.bench ## Go a newcomer's first hour with the wheel, on images of 64 and 224 px, and time it (ARGS="--quick")
	@$(BIN)/python -m benchmarks.walk $(ARGS)

bench-method: $(VENV)/.bench ## Show the method's effects on CIFAR-10, five seeds, three hours (ARGS="--quick", ARGS="--full", a night)
	@$(BIN)/python -m benchmarks.method_cifar10 $(ARGS)

bench-digits: $(VENV)/.bench ## Show the method's effects on the quickstart's digits, 20 seeds (ARGS="--quick")
	@$(BIN)/python -m benchmarks.method_digits $(ARGS)

soak: $(VENV)/.bench ## Kill, stop and damage runs 200 times, half an hour (ARGS="--quick", ARGS="--blows 50 --seed 1")
	@$(BIN)/python -m benchmarks.soak $(ARGS)

##@ Operate

images: ## Build the container images, and print their names (REGISTRY= TAG= TARGETS= BUILDER= PYTHON_IMAGE= CPU_INDEX= PIP_CONFIG=)
	@python3 images/build.py --registry "$(REGISTRY)" --tag "$(TAG)" --builder "$(BUILDER)" --python "$(PYTHON_IMAGE)" \
		--cpu-index "$(CPU_INDEX)" --pip-config "$(PIP_CONFIG)" $(TARGETS)

deploy: $(VENV)/.run ## Deploy or update the platform on a cluster (OVERLAY= KUBE_CONTEXT= REGISTRY= WORKER= ARGS="--no-smoke")
	@$(K8S) deploy $(CLUSTER_OPTIONS) $(OVERLAY_OPTIONS) $(ARGS)

status: $(VENV)/.run ## Show what is deployed and whether it is healthy (KUBE_CONTEXT= ARGS="--json")
	@$(K8S) status $(CLUSTER_OPTIONS) $(if $(OVERLAY),--overlay "$(OVERLAY)") $(ARGS)

diff: $(VENV)/.run ## Show what a deployment would change (OVERLAY= KUBE_CONTEXT= REGISTRY=)
	@$(K8S) diff $(CLUSTER_OPTIONS) $(OVERLAY_OPTIONS) $(ARGS)

ui: $(VENV)/.run ## Open Kubeflow's pages (KUBE_CONTEXT= ARGS="--port 8081")
	@$(K8S) ui $(CLUSTER_OPTIONS) $(ARGS)

undeploy: $(VENV)/.run ## Remove the platform, keep the data (KUBE_CONTEXT= ARGS="--delete-data")
	@$(K8S) undeploy $(CLUSTER_OPTIONS) $(if $(OVERLAY),--overlay "$(OVERLAY)") $(ARGS)

acceptance: $(VENV)/.run ## Try the platform on a cluster with real faults, an hour (KUBE_CONTEXT= OVERLAY= REGISTRY= ARGS="--only smoke")
	@$(K8S) acceptance $(CLUSTER_OPTIONS) $(OVERLAY_OPTIONS) $(ARGS)

cluster: $(VENV)/.run ## Create a kind cluster on this machine and deploy to it (ARGS="--delete")
	@$(K8S) cluster $(BUILD_OPTIONS) $(ARGS)

dashboards: $(VENV)/.test ## Write the Grafana dashboards
	@$(BIN)/python -m k8s.components.monitoring.dashboards

vendor: $(VENV)/.test ## Render the manifests of Kubeflow, Kueue and Trainer (ARGS="--repository kubeflow/pipelines=../pipelines")
	@$(BIN)/python -m k8s.vendor $(ARGS)

validate: $(VENV)/.test ## Check the manifests in k8s/ against Kubernetes' schemas
	@$(BIN)/python -m k8s.validate $(ARGS)

checkov: $(VENV)-checkov/.installed ## Check the manifests with checkov too
	@$(BIN)/python -m k8s.validate --checkov $(VENV)-checkov/bin/checkov $(ARGS)

audit: $(VENV)-audit/.installed ## Look up known holes of the dependencies
	@$(VENV)-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off $(ARGS)

# A stamp is touched last, so that the same target continues an interrupted installation. Each set of packages includes the smaller ones.
$(VENV)/.run $(VENV)/.test $(VENV)/.bench: pyproject.toml constraints.txt install.sh install_packages.py

$(VENV)/.run:
	@sh install.sh $(VENV) $(RUN_EXTRAS)
	@touch $@

$(VENV)/.test:
	@sh install.sh $(VENV) $(TEST_EXTRAS)
	@touch $(VENV)/.run $@

$(VENV)/.bench:
	@sh install.sh $(VENV) $(TEST_EXTRAS),bench
	@touch $(VENV)/.run $(VENV)/.test $@

# 290 MB with a hundred packages of its own, which would not agree with ours.
$(VENV)-checkov/.installed: $(VENV)/.test
	@$(BIN)/python -m venv $(VENV)-checkov
	@$(VENV)-checkov/bin/pip install --disable-pip-version-check --quiet checkov==3.3.30
	@touch $@

$(VENV)-audit/.installed: $(VENV)/.test
	@$(BIN)/python -m venv $(VENV)-audit
	@$(VENV)-audit/bin/pip install --disable-pip-version-check --quiet pip-audit==2.10.1
	@touch $@

# MLflow's server, for tests. It has our packages too: by its own account it takes no such new pyarrow.
$(VENV)-mlflow/.installed: $(VENV)/.test
	@$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --target $(VENV)-mlflow --upgrade mlflow==3.17.2 \
		mlflow-tracing==3.17.2 alembic==1.20.1 SQLAlchemy==2.1.9 Mako==1.4.3 graphene==3.4.3 graphql-relay==3.2.0 huey==2.6.0
	@touch $@

# It runs the tests, so it needs our packages beside its own.
$(VENV)-mutation/.installed: $(VENV)/.test
	@$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --target $(VENV)-mutation --upgrade mutmut==3.8.1
	@touch $@
