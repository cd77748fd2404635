"""Secrets and settings of a stage's pod, which Kubernetes mounts as files.

The keys of the store stay in their files, where a changed key is seen; the rest becomes variables of the environment.
"""

from collections.abc import MutableMapping
from pathlib import Path

from components import MLFLOW_FOLDER, REGISTRY_FOLDER, SETTINGS_FOLDER, SETTINGS_VARIABLES, STORE_FOLDER
from ns.core.errors import ConfigError
from ns.core.git import HOST_VARIABLE, PASSWORD_VARIABLE, USER_VARIABLE
from ns.storage.endpoint import SECRETS_VARIABLE

REGISTRY_VARIABLES = {"username": USER_VARIABLE, "password": PASSWORD_VARIABLE, "host": HOST_VARIABLE}
"""Key of the registry's secret → variable."""
MLFLOW_VARIABLES = {name: f"MLFLOW_TRACKING_{name.upper()}" for name in ("username", "password", "token")}
"""Key of the secret of MLflow's server → MLflow's own variable."""


def read_mounts(environment: MutableMapping[str, str]) -> None:
    """Sets the variables that mounted files stand for; a file that is missing leaves its variable as it is.

    Raises ConfigError naming a file that cannot be read, and never its content.
    """
    if any((Path(STORE_FOLDER) / key).exists() for key in ("accesskey", "secretkey")):
        environment[SECRETS_VARIABLE] = STORE_FOLDER
    variables = {Path(REGISTRY_FOLDER) / key: variable for key, variable in REGISTRY_VARIABLES.items()}
    variables |= {Path(MLFLOW_FOLDER) / key: variable for key, variable in MLFLOW_VARIABLES.items()}
    variables |= {Path(SETTINGS_FOLDER) / variable: variable for variable in SETTINGS_VARIABLES}
    for path, variable in variables.items():
        try:
            if path.exists():
                # Secrets that are made of a file end with its newline.
                environment[variable] = path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is no text without null bytes"
            raise ConfigError(f"{path}: {reason}; correct the Secret or ConfigMap that is mounted there") from None
