"""git and dvc as commands, without what the machine's owner set for his own work, and with errors of one line."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from ns.core.errors import StoreError

GIT_SECONDS = 600
"""A registry holds small files only: a git command that takes longer hangs."""
DATA_SECONDS = 12 * 3600
"""For dvc, which moves the data."""

# A hook of the owner, a signature that asks for a passphrase, or other line ends would stop a job or change its files.
GIT_OPTIONS = (
    "commit.gpgSign=false",
    "tag.gpgSign=false",
    "push.gpgSign=false",
    "push.followTags=false",
    "core.hooksPath=/dev/null",
    "core.autocrlf=false",
    "gc.auto=0",
    "advice.detachedHead=false",
)
# Set by a git hook that we may have been started from; they would lead our git into its repository.
FOREIGN_VARIABLES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_COMMON_DIR",
    "GIT_PREFIX",
    "GIT_NAMESPACE",
)
USER_VARIABLE, PASSWORD_VARIABLE = "NS_GIT_USERNAME", "NS_GIT_PASSWORD"
"""For git over HTTPS where no helper knows, as in a pod: git asks these, if there is a password, and nobody else."""
LOGIN_OPTIONS = (
    "credential.helper=",
    f'credential.helper=!f() {{ printf "username=%s\\npassword=%s\\n" "${{{USER_VARIABLE}:-git}}" "${PASSWORD_VARIABLE}"; }}; f',
)
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", PASSWORD_VARIABLE)


class GitCommands:
    """Runs git and dvc in one folder. Everything that dvc keeps beside its repository lies in `own`, a folder of ours."""

    def __init__(self, path: Path, config_dir: Path, *, s3: bool, git_seconds: float = GIT_SECONDS) -> None:
        self.path = path
        self._git_seconds = git_seconds
        config_dir.mkdir(parents=True, exist_ok=True)
        # Files are moved into the cache and linked back; copies would take the space twice.
        (config_dir / "config").write_text(
            "[core]\n    analytics = false\n    check_update = false\n    autostage = false\n"
            '[cache]\n    type = "reflink,hardlink,copy"\n'
        )
        self._environment = _build_environment(config_dir)
        if s3:
            # The owner's profiles say another thing than the environment that `ns.storage` goes by.
            for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN"):
                self._environment.pop(name, None)
            self._environment.update(_build_s3_environment(config_dir))

    def run_git(self, *arguments: str, data: str | None = None) -> str:
        """What git prints. Raises StoreError."""
        login = LOGIN_OPTIONS if self._environment.get(PASSWORD_VARIABLE) else ()
        options = [part for option in (*GIT_OPTIONS, *login) for part in ("-c", option)]
        return self._run_command(["git", *options, *arguments], f"git {arguments[0]}", self._git_seconds, data)

    def run_dvc(self, *arguments: str) -> str:
        """What dvc prints; never with --quiet, which would keep its errors back too. Raises StoreError."""
        beside_python = Path(sys.executable).parent / "dvc"
        executable = str(beside_python) if beside_python.exists() else shutil.which("dvc")
        if executable is None:
            raise StoreError("dvc: is not installed; install it with: pip install 'noisy-student[versions]'")
        return self._run_command([executable, *arguments], f"dvc {arguments[0]}", DATA_SECONDS, None)

    def ensure_identity(self) -> None:
        """Gives commits an author where git knows none, as in a container."""
        try:
            self.run_git("var", "GIT_COMMITTER_IDENT")
            email = self.run_git("config", "user.email").strip()
        except StoreError:
            email = self._environment.get("EMAIL", "")
        user = os.environ.get("USER") or "noisy-student"
        for role in ("AUTHOR", "COMMITTER"):
            if not email:
                self._environment.setdefault(f"GIT_{role}_NAME", user)
                self._environment.setdefault(f"GIT_{role}_EMAIL", f"{user}@localhost")

    def _run_command(self, command: list[str], name: str, seconds: float, data: str | None) -> str:
        try:
            process = subprocess.Popen(
                command,
                cwd=self.path,
                env=self._environment,
                stdin=subprocess.PIPE if data is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                # git starts helpers of its own, and all of them must go when time is up.
                start_new_session=True,
            )
        except OSError as error:
            raise StoreError(f"{name}: cannot be started: {error.strerror or error}; install {command[0]}") from error
        try:
            out, err = process.communicate(data, timeout=seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise StoreError(f"{name}: took longer than {seconds:g} s; look whether its server answers") from None
            raise
        if process.returncode:
            raise StoreError(f"{name}: {self._find_reason(err or out) or f'ended with code {process.returncode}'}")
        return out

    def _find_reason(self, text: str) -> str:
        """The line that says why. git ends with advice, so its last line that is marked as an error goes first."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        marked = [line for line in lines if re.match(r"fatal:|error:|ERROR:|remote: (fatal|error)|!", line)]
        line = (marked or lines or [""])[-1]
        for name in SECRET_VARIABLES:
            secret = self._environment.get(name)
            if secret:
                line = line.replace(secret, "…")
        return redact_credentials(line)


def redact_credentials(text: str) -> str:
    """`text` with `…` for user and password in URLs."""
    return re.sub(r"//[^/\s]*@", "//…@", text)


def _build_environment(config_dir: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES and not name.startswith("DVC_")},
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        "DVC_NO_ANALYTICS": "1",
        "DVC_GLOBAL_CONFIG_DIR": str(config_dir),
        "DVC_SYSTEM_CONFIG_DIR": str(config_dir / "system"),
        # Where dvc remembers what it has seen in a remote: somebody else may have collected it since.
        "DVC_SITE_CACHE_DIR": str(config_dir / "site"),
    }


def _build_s3_environment(config_dir: Path) -> dict[str, str]:
    """What `ns.storage` takes for S3, in boto's words. Raises StoreError when there are no credentials."""
    from ns.storage.endpoint import EnvironmentCredentials, FileCredentials, S3Endpoint

    endpoint = S3Endpoint.from_environment()
    provider = FileCredentials(Path(endpoint.secrets)) if endpoint.secrets else EnvironmentCredentials()
    keys = provider.retrieve()
    empty_file = config_dir / "aws"
    empty_file.touch()
    return {
        "AWS_ACCESS_KEY_ID": keys.access_key,
        "AWS_SECRET_ACCESS_KEY": keys.secret_key,
        **({"AWS_SESSION_TOKEN": keys.session_token} if keys.session_token else {}),
        "AWS_ENDPOINT_URL_S3": endpoint.url,
        "AWS_DEFAULT_REGION": endpoint.region,
        "AWS_CA_BUNDLE": endpoint.ca_file,
        "AWS_CONFIG_FILE": str(empty_file),
        "AWS_SHARED_CREDENTIALS_FILE": str(empty_file),
        "AWS_EC2_METADATA_DISABLED": "true",
        # Servers other than Amazon's refuse the checksums that boto adds by itself (dvc #10695).
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
