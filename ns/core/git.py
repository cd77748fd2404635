"""git as a command, without the settings of the machine's owner, and with errors of one line."""

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

from ns.core.errors import ConfigError, StoreError
from ns.core.printable import redact_credentials

GIT_SECONDS = 600
"""Our repositories hold small files only: a git command that takes longer hangs."""

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
# A git hook that started this process has set these; they would lead our git into its repository.
FOREIGN_VARIABLES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_COMMON_DIR",
    "GIT_PREFIX",
    "GIT_NAMESPACE",
)
USER_VARIABLE, PASSWORD_VARIABLE, HOST_VARIABLE = "NS_GIT_USERNAME", "NS_GIT_PASSWORD", "NS_GIT_HOST"
"""Login for git over HTTPS where no credential helper has one, as in a pod. If there is a password, git uses only these, and tells them
to that host only: an experiment names the registry, and may come from strangers."""
LOGIN_OPTIONS = (
    "credential.helper=",
    f'credential.https://{{host}}.helper=!f() {{ printf "username=%s\\npassword=%s\\n" '
    f'"${{{USER_VARIABLE}:-git}}" "${PASSWORD_VARIABLE}"; }}; f',
)
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", PASSWORD_VARIABLE)


class GitCommands:
    """Runs git in one folder. Raises ConfigError if there is a password without its host."""

    def __init__(self, path: Path, *, git_seconds: float = GIT_SECONDS) -> None:
        self.path = path
        self._git_seconds = git_seconds
        self._environment = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
        self._environment |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
        self._login_options: tuple[str, ...] = ()
        if self._environment.get(PASSWORD_VARIABLE):
            host = self._environment.get(HOST_VARIABLE, "")
            if not re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]+)?", host):
                raise ConfigError(
                    f"{HOST_VARIABLE}: invalid value {host!r}: {PASSWORD_VARIABLE} goes to one host only; name it, e.g. git.example"
                )
            self._login_options = tuple(option.replace("{host}", host) for option in LOGIN_OPTIONS)

    def run_git(self, *arguments: str, data: str | None = None) -> str:
        """Returns what git prints. Raises StoreError naming the command and git's reason."""
        options = [part for option in (*GIT_OPTIONS, *self._login_options) for part in ("-c", option)]
        return self._run_command(["git", *options, *arguments], f"git {arguments[0]}", self._git_seconds, data)

    def ensure_identity(self) -> None:
        """Gives commits an author where git knows none, as in a container."""
        try:
            self.run_git("var", "GIT_COMMITTER_IDENT")
            email = self.run_git("config", "user.email").strip()
        except StoreError:
            email = self._environment.get("EMAIL", "")
        if not email:
            user = os.environ.get("USER") or "noisy-student"
            for role in ("AUTHOR", "COMMITTER"):
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
                raise StoreError(f"{name}: took longer than {seconds:g} s; check that its server answers") from None
            raise
        if process.returncode:
            raise StoreError(f"{name}: {self._find_reason(err or out) or f'ended with code {process.returncode}'}")
        return out

    def _find_reason(self, text: str) -> str:
        """The line that says why. git ends with advice, so the last line marked as an error is preferred."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        marked = [line for line in lines if re.match(r"fatal:|error:|ERROR:|remote: (fatal|error)|!", line)]
        line = (marked or lines or [""])[-1]
        for name in SECRET_VARIABLES:
            secret = self._environment.get(name)
            if secret:
                line = line.replace(secret, "…")
        return redact_credentials(line)
