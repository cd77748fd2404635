"""Keeps one comment on a pull request (GitHub) or merge request (GitLab): written the first time, changed afterwards.

    python3 .ci/comment.py MARKER FILE --number 12          the request's number
    python3 .ci/comment.py MARKER FILE --branch NAME        the open request of that branch; no request is no error

MARKER is a word that identifies the comment, in which it is hidden. On GitHub it reads GITHUB_API_URL, GITHUB_REPOSITORY and
GITHUB_TOKEN, on GitLab CI_API_V4_URL, CI_PROJECT_ID and GITLAB_TOKEN (of the project, scope api: a job's own token may not comment).
Needs only Python, so that no job installs anything for it.
"""

import argparse
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

LIMIT = 65_000
"""Characters; GitHub takes 65,536, GitLab more."""
SECONDS = 30


class CodeHost:
    """The pull or merge requests of one project, on either host."""

    def __init__(self, environment: dict[str, str]) -> None:
        if project := environment.get("CI_PROJECT_ID"):
            self.base = f"{environment['CI_API_V4_URL']}/projects/{project}"
            self.headers = {"PRIVATE-TOKEN": environment["GITLAB_TOKEN"]}
            self.requests, self.query, self.id = "merge_requests", {"state": "opened", "source_branch": ""}, "iid"
            self.comments, self.comment, self.verb = "merge_requests/{}/notes", "merge_requests/{}/notes/{}", "PUT"
            self.owner = ""
        else:
            self.base = f"{environment['GITHUB_API_URL']}/repos/{environment['GITHUB_REPOSITORY']}"
            self.headers = {
                "Authorization": f"Bearer {environment['GITHUB_TOKEN']}",
                "Accept": "application/vnd.github+json",
                "X-GitHub-Api-Version": "2022-11-28",
            }
            self.requests, self.query, self.id = "pulls", {"state": "open", "head": ""}, "number"
            self.comments, self.comment, self.verb = "issues/{}/comments", "issues/comments/{1}", "PATCH"
            # GitHub searches for OWNER:BRANCH.
            self.owner = environment["GITHUB_REPOSITORY"].partition("/")[0] + ":"

    def find_request(self, branch: str) -> int | None:
        """Returns the number of the open request of a branch, or None."""
        query = {name: value or self.owner + branch for name, value in self.query.items()}
        requests = self._send_request("GET", f"{self.requests}?{urllib.parse.urlencode(query)}")
        return int(requests[0][self.id]) if requests else None

    def write_comment(self, number: int, marker: str, text: str) -> str:
        """Writes the comment, or changes the existing one. Returns `new`, `changed` or `unchanged`."""
        page = 1
        while comments := self._send_request("GET", f"{self.comments.format(number)}?per_page=100&page={page}"):
            for comment in comments:
                if comment["body"].startswith(marker):
                    if comment["body"].strip() == text.strip():
                        return "unchanged"
                    self._send_request(self.verb, self.comment.format(number, comment["id"]), {"body": text})
                    return "changed"
            page += 1
        self._send_request("POST", self.comments.format(number), {"body": text})
        return "new"

    def _send_request(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {**self.headers, "Content-Type": "application/json", "User-Agent": "noisy-student"}
        request = urllib.request.Request(f"{self.base}/{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            sys.exit(f"error: {method} {self.base}/{path}: {error.code} {error.reason}: {said}; may this token comment?")
        except (urllib.error.URLError, TimeoutError) as error:
            sys.exit(f"error: {method} {self.base}/{path}: {getattr(error, 'reason', error)}; try again")


def shorten_text(text: str) -> str:
    """Shortens a text to whole lines that fit into a comment."""
    if len(text) <= LIMIT:
        return text
    return text[:LIMIT].rpartition("\n")[0] + "\n\n… and more: see the log of the job.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Keep one comment on a pull request or merge request.")
    parser.add_argument("marker", help="word that identifies the comment")
    parser.add_argument("file", type=Path, help="Markdown")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--number", type=int, help="number of the request")
    which.add_argument("--branch", help="branch of the request")
    options = parser.parse_args()
    if not re.fullmatch(r"[a-z0-9-]+", options.marker):
        parser.error(f"marker {options.marker!r}: must be lower-case letters, digits and hyphens")
    try:
        host = CodeHost(dict(os.environ))
    except KeyError as error:
        sys.exit(f"error: {error.args[0]}: is not set; this runs in a job of GitHub Actions or GitLab CI")
    number = options.number or host.find_request(options.branch)
    if number is None:
        sys.stderr.write(f"no open request of branch {options.branch}: no comment\n")
        return 0
    marker = f"<!-- noisy-student: {options.marker} -->"
    outcome = host.write_comment(number, marker, shorten_text(f"{marker}\n{options.file.read_text()}"))
    sys.stderr.write(f"comment on request {number}: {outcome}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
