"""`ns models …`: weights to start from."""

from typing import Annotated

import typer

from ns.cli.options import AsJson, Root
from ns.cli.output import print_json, print_line
from ns.core.errors import ConfigError
from ns.storage import open_store

app = typer.Typer(help="Fetch weights that training starts from.", no_args_is_help=True)


@app.callback()
def _keep_as_group() -> None:
    pass


@app.command("fetch")
def fetch_models(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="timm's NAME.TAG, or hf-hub:OWNER/NAME[@REVISION].")],
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Fetch weights from the hub into the root, once. Runs of this root then need no connection to the hub.

    Example: [cyan]ns models fetch resnet18.a1_in1k --root s3://bucket/runs[/]
    """
    from ns.config.schema import is_weights_uri
    from ns.modeling.pretrained import fetch_weights

    for name in names:
        if is_weights_uri(name):
            raise ConfigError(f"{name}: is a file or a folder, and is read where it is; name it in model.pretrained")
    manifests = [fetch_weights(name, open_store(root)) for name in names]
    if as_json:
        print_json(manifests)
        return
    for manifest in manifests:
        license_name = manifest.license or "not stated"
        print_line(f"{manifest.name}: {manifest.source}, license {license_name}, sha256 {manifest.weights_sha256[:16]}")
