"""Assumes a role with a job's identity, and prints its short-lived keys as shell: `keys=$(python3 .ci/role.py); eval "$keys"`.

Reads NS_AWS_ROLE (the role's ARN), NS_ID_TOKEN (the job's identity, a JWT), and the service: NS_STS_URL, or AWS_REGION for
Amazon's. The request needs no keys: the token authenticates it.
"""

import os
import shlex
import sys
import urllib.error
import urllib.parse
import urllib.request
from xml.etree import ElementTree

SECONDS = 30
DURATION = 3600
NAMES = {
    "AccessKeyId": "AWS_ACCESS_KEY_ID",
    "SecretAccessKey": "AWS_SECRET_ACCESS_KEY",
    "SessionToken": "AWS_SESSION_TOKEN",
}


def main() -> int:
    try:
        role, token = os.environ["NS_AWS_ROLE"], os.environ["NS_ID_TOKEN"]
    except KeyError as error:
        sys.exit(f"error: {error.args[0]}: is not set; see docs/ci.md")
    url = os.environ.get("NS_STS_URL") or f"https://sts.{os.environ.get('AWS_REGION') or 'us-east-1'}.amazonaws.com/"
    form = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleArn": role,
        "RoleSessionName": f"noisy-student-{os.environ.get('CI_JOB_ID', 'ci')}",
        "WebIdentityToken": token,
        "DurationSeconds": str(DURATION),
    }
    try:
        with urllib.request.urlopen(url, urllib.parse.urlencode(form).encode(), timeout=SECONDS) as answer:
            root = ElementTree.fromstring(answer.read())
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(300).decode(errors="replace").split())
        sys.exit(f"error: {url}: {error.code}: {said}; does {role} trust this project's tokens?")
    except (urllib.error.URLError, TimeoutError, ElementTree.ParseError) as error:
        sys.exit(f"error: {url}: {getattr(error, 'reason', error)}; NS_STS_URL is the URL of the service")
    keys = {NAMES[name]: part.text for part in root.iter() if (name := part.tag.rpartition("}")[2]) in NAMES and part.text}
    if len(keys) < len(NAMES):
        sys.exit(f"error: {url}: gave no keys for {role}")
    sys.stdout.write("".join(f"export {name}={shlex.quote(value)}\n" for name, value in keys.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
