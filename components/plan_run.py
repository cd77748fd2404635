from kfp import dsl
from kfp.dsl import Markdown, Output

from components import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
def plan_run(
    config: str,
    root: str,
    overrides: list[str],
    labeled: str,
    pool: str,
    heldout: str,
    generations: int,
    label_workers: int,
    devices: str,
    one_generation: bool,
    plan: Output[Markdown],
) -> str:
    """Says what a run would cost, from a short measurement here, in place of the run.

    Args:
        config: URI of the experiment's YAML file, or a preset.
        root: URI of the store that holds everything.
        overrides: Fields to change, as a.b=c.
        labeled: URI of the labeled images; as the experiment says if empty.
        pool: URI of the unlabeled images; as the experiment says if empty.
        heldout: URI of the held-out images; as the experiment says if empty.
        generations: Trips round the loop, at most; as the experiment says if 0.
        label_workers: Labeling tasks beside each other; as the experiment says if 0.
        devices: GPUs that train together.
        one_generation: Whether it is one generation from the student that was accepted last.
        plan: Device-hours, reading, checkpoints, network.

    Returns:
        The sum.
    """
    from ns.planning import dry_run

    fields: dict[str, str | int] = {
        "data.labeled": labeled,
        "data.pool": pool,
        "data.heldout": heldout,
        "generations": generations,
        "labeling.tasks": label_workers,
    }
    return dry_run(config, root, overrides, fields, devices=max(1, int(devices)), one_generation=one_generation, page=plan)
