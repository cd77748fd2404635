"""A stand-in for kubectl and the cluster behind it: answers from a file, does what it is told there, and records every call.

The program wants FAKE_KUBECTL, a folder with `state.json`. `Fake`, with which tests make that folder, writes the program, too.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path

CLUSTER_WIDE = ("Node", "Namespace", "StorageClass", "CustomResourceDefinition", "ClusterRole", "ClusterQueue")
SHORT = {"customresourcedefinitions": "customresourcedefinition", "crd": "customresourcedefinition", "ns": "namespace"}


def singular(kind):
    kind = kind.partition(".")[0].lower()
    kind = SHORT.get(kind, kind)
    for ending, short in (("classes", "class"), ("prometheuses", "prometheus"), ("policies", "policy"), ("ies", "y")):
        if kind.endswith(ending):
            return kind[: -len(ending)] + short
    return kind[:-1] if kind.endswith("s") and not kind.endswith(("class", "prometheus")) else kind


PROGRAM = """#!{python} -SE
import sys
sys.path.insert(0, {folder!r})
from fake_kubectl import main
main()
"""
ADVICE = "Please review the fields above--they currently have other managers. Here\nare the ways you can resolve this warning:"


class Fake:
    """A cluster in a folder, and kubectl on the PATH that talks to it."""

    def __init__(self, folder, monkeypatch, objects=(), contexts=("kind-test",), current="kind-test"):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        program = self.folder / "bin" / "kubectl"
        program.parent.mkdir(exist_ok=True)
        if not program.exists():
            # The interpreter by its path: a PATH in a test may have no other program. This module is compiled once for all calls.
            program.write_text(PROGRAM.format(python=os.path.realpath(sys.executable), folder=str(Path(__file__).parent)))
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_KUBECTL", str(self.folder))
        self.state = {
            "contexts": list(contexts),
            "current": current,
            "objects": list(objects),
            "rules": [],
            "denied": [],
            "port": 0,
            "ports": {},
            "rendered": [],
        }
        self.save()

    def save(self):
        (self.folder / "state.json").write_text(json.dumps(self.state))

    def load(self):
        self.state = json.loads((self.folder / "state.json").read_text())
        return self.state["objects"]

    def rule(self, match, *, code=1, stderr="", stdout="", times=None, after=None):
        """From now on calls that match fail so: `times` times, and with `after`, which counts objects, in their middle."""
        self.load()
        rule = {"match": match, "code": code, "stderr": stderr, "stdout": stdout, "times": times, "after": after}
        self.state["rules"].append(rule)
        self.save()

    def calls(self, match=""):
        """Arguments of the calls so far that match, each as one text."""
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [text for text in (" ".join(json.loads(line)["arguments"]) for line in lines) if re.search(match, text)]

    def forget(self):
        (self.folder / "calls.jsonl").unlink(missing_ok=True)

    def names(self):
        """`Kind/name` of all objects."""
        return sorted(f"{one['kind']}/{one['metadata']['name']}" for one in self.load())


def key(one):
    meta = one["metadata"]
    return one["kind"], None if one["kind"] in CLUSTER_WIDE else meta.get("namespace", "default"), meta["name"]


class Program:
    def __init__(self, folder, arguments):
        self.file = folder / "state.json"
        self.state = json.loads(self.file.read_text())
        self.options = dict(option.removeprefix("--").partition("=")[::2] for option in arguments if option.startswith("--"))
        self.words = [word for word in arguments if not word.startswith("-")]
        self.text = " ".join(arguments)

    def save(self):
        self.file.with_suffix(".new").write_text(json.dumps(self.state))
        self.file.with_suffix(".new").replace(self.file)

    def fail(self, message, code=1):
        sys.stderr.write(f"{message}\n")
        sys.exit(code)

    def main(self):
        context = self.options.get("context")
        if context is not None and context not in self.state["contexts"]:
            self.fail(f'error: context "{context}" does not exist')
        self.rule = None
        for rule in self.state["rules"]:
            if re.search(rule["match"], self.text) and rule["times"] != 0:
                if rule["times"] and rule["after"] is None:
                    rule["times"] -= 1
                    self.save()
                self.rule = rule
                break
        if self.rule and self.rule["after"] is None:
            sys.stdout.write(self.rule["stdout"])
            sys.stderr.write(f"{self.rule['stderr']}\n" if self.rule["stderr"] else "")
            sys.exit(self.rule["code"])
        getattr(self, "do_" + self.words[0].replace("-", "_"))()

    def documents(self):
        value = json.loads(sys.stdin.read())
        return value["items"] if value.get("kind") == "List" else [value]

    def found(self, kind, names=()):
        everywhere = "all-namespaces" in self.options
        namespace = self.options.get("namespace", "default")
        selector = dict(part.split("=") for part in self.options.get("selector", "").split(",") if part)
        return [
            one
            for one in self.state["objects"]
            if one["kind"].lower() == singular(kind)
            and (one["kind"] in CLUSTER_WIDE or everywhere or one["metadata"].get("namespace", "default") == namespace)
            and (not names or one["metadata"]["name"] in names)
            and selector.items() <= (one["metadata"].get("labels") or {}).items()
        ]

    def do_version(self):
        print(json.dumps({"clientVersion": {"gitVersion": "v1.34.1"}, "serverVersion": {"gitVersion": "v1.34.2"}}))

    def do_config(self):
        if self.words[1] != "view":
            self.fail(f"error: unknown command {self.words[1]}")
        names = self.state["contexts"]
        if "minify" in self.options:
            names = [self.options.get("context") or self.state["current"]]
        value = {
            "contexts": [{"name": name, "context": {"cluster": name}} for name in names],
            "clusters": [{"name": name, "cluster": {"server": f"https://{name}.example"}} for name in names],
            "current-context": self.state["current"] or "",
        }
        print(json.dumps(value))

    def do_get(self):
        if "raw" in self.options:
            answer = self.state.get("raw", {}).get(self.options["raw"])
            print(json.dumps(answer)) if answer else self.fail("Error from server (NotFound): the server could not find it")
            return
        kind, names = self.words[1], self.words[2:]
        found = [one for kind in kind.split(",") for one in self.found(kind, names)]
        if names:
            missing = [name for name in names if name not in [one["metadata"]["name"] for one in found]]
            if missing and "ignore-not-found" not in self.options:
                self.fail(f'Error from server (NotFound): {kind} "{missing[0]}" not found')
            if len(names) == 1:
                print(json.dumps(found[0]) if found else "", end="")
                return
            if not found:
                return
        print(json.dumps({"kind": "List", "items": found}))

    def do_create(self):
        if "raw" in self.options:
            body = json.loads(sys.stdin.read())
            asked = body["spec"]["resourceAttributes"]
            who = body["spec"].get("user", "").removeprefix("system:serviceaccount:")
            text = f"{who} {asked['verb']} {asked['resource']}".strip()
            allowed = not any(re.search(pattern, text) for pattern in self.state["denied"])
            print(json.dumps({**body, "status": {"allowed": allowed}}))
            return
        for one in self.documents():
            if any(key(old) == key(one) for old in self.state["objects"]):
                self.fail(f'Error from server (AlreadyExists): {one["kind"]} "{one["metadata"]["name"]}" already exists')
            self.state["objects"].append(one)
        self.save()

    def do_apply(self):
        force = "force-conflicts" in self.options
        dry = self.options.get("dry-run") == "server"
        errors = []
        for number, one in enumerate(self.documents()):
            if self.rule and number >= self.rule["after"]:
                self.rule["times"] = self.rule["times"] and self.rule["times"] - 1
                self.save()
                self.fail(self.rule["stderr"], self.rule["code"])
            there = next((old for old in self.state["objects"] if key(old) == key(one)), None)
            if error := self.refusal(one, there, force):
                errors.append(error)
                continue
            group = "." + one["apiVersion"].partition("/")[0] if "/" in one["apiVersion"] else ""
            name = f"{one['kind'].lower()}{group}/{one['metadata']['name']}"
            print(f"{name} serverside-applied{' (server dry run)' if dry else ''}")
            if dry:
                continue
            if there:
                self.state["objects"].remove(there)
            self.state["objects"].append({**one, "status": self.status(one)})
        if not dry:
            self.save()
        if errors:
            self.fail("\n".join(errors))

    def refusal(self, one, there, force):
        name = one["metadata"]["name"]
        if there is None:
            return ""
        if one["kind"] == "Job" and there["spec"]["template"] != one["spec"]["template"]:
            return f'The Job "{name}" is invalid: spec.template: Invalid value: field is immutable'
        if one["kind"] == "StatefulSet" and there["spec"].get("volumeClaimTemplates") != one["spec"].get(
            "volumeClaimTemplates"
        ):
            return f'The StatefulSet "{name}" is invalid: spec: Forbidden: updates to statefulset spec are forbidden'
        if there["metadata"].get("foreign") and not force:
            return f'error: Apply failed with 1 conflict: conflict with "other": .spec.replicas\n{ADVICE}'
        return ""

    def do_patch(self):
        (one,) = self.found(self.words[1], self.words[2:3])
        storage = json.loads(self.options["patch"])["spec"]["resources"]["requests"]["storage"]
        one["spec"]["resources"]["requests"]["storage"] = storage
        self.save()

    def status(self, one):
        """As after a while: everything works."""
        replicas = one.get("spec", {}).get("replicas", 1)
        return {
            "Deployment": {
                "replicas": replicas,
                "updatedReplicas": replicas,
                "availableReplicas": replicas,
                "observedGeneration": 1,
            },
            "StatefulSet": {"replicas": replicas, "updatedReplicas": replicas, "readyReplicas": replicas},
            "Job": {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]},
            "CustomResourceDefinition": {"conditions": [{"type": "Established", "status": "True"}]},
        }.get(one["kind"], {})

    def do_delete(self):
        kind, names = self.words[1], self.words[2:]
        gone = self.found(kind, names)
        if not gone and "ignore-not-found" not in self.options:
            self.fail(f'Error from server (NotFound): {kind} "{names[0]}" not found')
        for one in gone:
            self.state["objects"].remove(one)
            if one["kind"] == "Namespace":
                inside = [
                    other for other in self.state["objects"] if other["metadata"].get("namespace") == one["metadata"]["name"]
                ]
                for other in inside:
                    self.state["objects"].remove(other)
            print(f'{kind} "{one["metadata"]["name"]}" deleted')
        self.save()

    def do_kustomize(self):
        file = Path(self.words[1]) / "kustomization.yaml"
        (self.file.parent / "kustomization.yaml").write_text(file.read_text())
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": self.state["rendered"]}))

    def do_diff(self):
        def bare(one):
            return {name: value for name, value in one.items() if name != "status"}

        known = {key(one): bare(one) for one in self.state["objects"]}
        changed = [one for one in self.documents() if known.get(key(one)) != bare(one)]
        for one in changed:
            print(f"+ {one['kind']}/{one['metadata']['name']}")
        sys.exit(1 if changed else 0)

    def do_wait(self):
        missing = [name for name in self.words[2:] if not self.found(self.words[1], [name])]
        if missing:
            self.fail(f"Error from server (NotFound): {missing[0]} not found")

    def do_port_forward(self):
        service, (local, _, port) = self.words[1], self.words[2].partition(":")
        # It forwards nothing: what it names is served there already.
        served = local or self.state["ports"].get(service, self.state["port"])
        print(f"Forwarding from 127.0.0.1:{served} -> {port}", flush=True)
        time.sleep(600)


def main():
    place = Path(os.environ["FAKE_KUBECTL"])
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        data = None
        if any(argument in ("-f", "--filename=-") for argument in sys.argv):
            import io

            data = sys.stdin.read()
            sys.stdin = io.StringIO(data)
        with (place / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps({"arguments": sys.argv[1:], "data": data}) + "\n")
        if "port-forward" in sys.argv:
            fcntl.flock(lock, fcntl.LOCK_UN)
        with contextlib.suppress(BrokenPipeError):
            Program(place, sys.argv[1:]).main()
