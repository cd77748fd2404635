"""KFP components: functions with typed inputs and outputs, and calls into `ns.stages`, where the work is written. Each is named as its box
in Kubeflow's UI.

A compiled package has their signatures alone: their code is in the images, where `python -m components` runs it.

These inputs mean the same in every component:

    run                        URI of the run's folder
    generation                 counted from 1; 0 for the first teacher
    teacher                    key of that model's folder
    selection                  key of the selection's folder
    shards                     range START-STOP of the pool's shards, half open
    gpus, cpu, memory          resources of the pod
    nodes                      the nodes of a training on several (components/cluster/nodes.py); empty: the stage's own pod trains
    cluster                    fields of the cluster's placement (pipelines/placement.py)
"""

from ns import __version__

WORKER_IMAGE = f"noisy-student/worker:{__version__}"
"""The image that components run in; `make images` builds it. It holds the `ns` package and no compiler."""
TOOLS_IMAGE = f"noisy-student/tools:{__version__}"
"""The worker with DVC, git and Kubeflow's SDK."""

STAGE_USER = 10001
"""User and group that stages run as (images/Dockerfile)."""
SETTINGS_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_URI",
    "NS_METRICS_LINGER_SECONDS",
    "NS_METRICS_PORT",
    "NS_PUSHGATEWAY_URL",
)
"""Environment variables of every stage that come from a ConfigMap."""

STORE_FOLDER, REGISTRY_FOLDER, MLFLOW_FOLDER = "/run/ns/store", "/run/ns/registry", "/run/ns/mlflow"
"""Where the pods of stages have the secrets of the store, of the label registry and of MLflow's server. Each may be missing."""
SETTINGS_FOLDER = "/run/ns/settings"
"""Where they have that ConfigMap."""
