"""Labels the pool with the teacher, in tasks that each take a range of shards."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from ns.config.loader import load_experiment
from ns.core.digest import digest_json
from ns.data.dataset import Shard
from ns.data.index import ShardIndex
from ns.data.leakage import load_left_out_rows
from ns.data.prepared import PreparedData
from ns.labeling.foreign import load_foreign_scorer
from ns.labeling.label_set import LEFT_OUT_PREFIX, LabelSet, LabelShard, find_label_shard, histogram_key, label_shard_key
from ns.labeling.purge import copy_label_shard
from ns.runs.records import find_stage_note
from ns.stages.context import RunRef, StageContext, check_gpus, stage
from ns.stages.evaluate import evaluate_calibration, resolve_labeling_temperature
from ns.stages.foreign import prepare_foreign_reference
from ns.stages.keys import excluded_keys, label_set_key, labeling_inputs, open_imported_labels
from ns.storage import Store, open_store, parent_key


def split_pool(ref: RunRef, *, data: str) -> list[str]:
    """Splits the pool into ranges of shards, `START-STOP` (half open), one per labeling task."""
    _, pool = PreparedData.load_file(open_store(ref.root), data).pool.open_dataset(open_store(ref.root))
    shards = len(pool.shards)
    tasks = min(load_experiment(ref.config_uri).labeling.tasks, shards)
    bounds = [index * shards // tasks for index in range(tasks + 1)]
    return [f"{start}-{stop}" for start, stop in pairwise(bounds)]


def label_shards(ref: RunRef, *, data: str, generation: int, teacher: str, shards: str, gpus: int = 0) -> str:
    """Labels one range of shards of the pool, `START-STOP`, leaving out shards that are done. Returns the range.

    `gpus`: that this process was given.
    """
    with stage("label", ref, generation, shards=shards, teacher=teacher) as context:
        prepared = PreparedData.load_file(context.root, data)
        pool_store, pool = prepared.pool.open_dataset(context.root)
        indices = range(*(int(bound) for bound in shards.split("-")))
        range_shards = [pool.shards[index] for index in indices]
        images = sum(shard.samples for shard in range_shards)
        imported = open_imported_labels(context)
        if indices.start == 0 and not imported:
            # Usually the teacher's evaluation has done it; a teacher from another run may have had no calibration images.
            evaluate_calibration(context, prepared, teacher)
        key = label_set_key(context, prepared, teacher)
        label_store = context.root.at(key)

        def are_labeled() -> bool:
            return all(find_label_shard(label_store, shard) for shard in range_shards)

        def copy_imported(store: Store, label_set: LabelSet) -> None:
            left_out = _find_left_out(context, prepared, pool_store, range_shards)
            for shard, record in zip(range_shards, label_set.shards[indices.start : indices.stop], strict=True):
                if not find_label_shard(label_store, shard):
                    reasons = left_out.get(shard.sha256, {})
                    told = {row: f"{LEFT_OUT_PREFIX}{reason}" for row, reason in reasons.items()}
                    copy_label_shard(store, record, label_store, len(label_set.classes), told)

        def label_missing() -> None:
            if imported:
                copy_imported(*imported)
                return
            from ns.labeling.predict import label_pool_shards
            from ns.modeling.predictor import Predictor

            check_gpus(gpus)
            config = context.experiment.labeling
            reference = prepare_foreign_reference(context, prepared, teacher)
            scorer = load_foreign_scorer(context.root.at(parent_key(reference))) if reference else None
            # The teacher comes first; only it scores.
            models = [(context.root.at(teacher), scorer), *((open_store(uri), None) for uri in config.ensemble)]
            left_out = _find_left_out(context, prepared, pool_store, range_shards)
            labeled_shards = _LabeledShardIndex(context, prepared, teacher, left_out)
            label_pool_shards(
                [
                    Predictor(model_store, batch=config.batch, images=images, views=config.views, foreign_scorer=model_scorer)
                    for model_store, model_scorer in models
                ],
                pool_store,
                pool,
                label_store,
                indices,
                config,
                temperature=resolve_labeling_temperature(context, prepared, teacher),
                find_left_out=lambda shard: left_out.get(shard.sha256, {}),
                find_existing=labeled_shards.find_shard,
            )
            labeled_shards.record_shards(key, range_shards)

        reused = are_labeled()
        if not reused:
            with context.ledger.hold_lease("label-shards", {"labels": key, "shards": shards}):
                # Another run may have labeled them while this one waited.
                reused = are_labeled()
                if not reused:
                    label_missing()
        if reused and find_stage_note(context.root, context.run, generation, context.note_name) is None:
            # Who has labeled them may have been killed before its end.
            left_out = _find_left_out(context, prepared, pool_store, range_shards)
            _LabeledShardIndex(context, prepared, teacher, left_out).record_missing(key, range_shards)
        context.write_note({}, reused=reused, images=images)
        return shards


def _find_left_out(
    context: StageContext, prepared: PreparedData, pool_store: Store, shards: Iterable[Shard]
) -> dict[str, dict[int, str]]:
    """sha256 of a shard → row → why that image gets no label."""
    rows_by_shard = load_left_out_rows(context.root.at(prepared.left_out.key)) if prepared.left_out else {}
    if exclusions := excluded_keys(context):
        for shard in shards:
            keys = ShardIndex.load(pool_store, shard).keys
            if rows := {row: "excluded by data.exclude" for row, key in enumerate(keys) if key in exclusions}:
                rows_by_shard[shard.sha256] = rows_by_shard.get(shard.sha256, {}) | rows
    return rows_by_shard


class _LabeledShardIndex:
    """Shards that the same teacher labeled as part of any pool: when a pool grows, only its new shards cost anything."""

    def __init__(
        self, context: StageContext, prepared: PreparedData, teacher: str, left_out: Mapping[str, Mapping[int, str]]
    ) -> None:
        self._root, self._ledger = context.root, context.ledger
        self._labeling_inputs = labeling_inputs(context, prepared, teacher)
        self._left_out = left_out

    def find_shard(self, shard: Shard) -> tuple[Store, LabelShard] | None:
        """The store that holds the shard's labels, and their manifest; None if the teacher has not labeled it."""
        entry = self._ledger.find_entry("label-shard", self._shard_inputs(shard))
        if entry is None:
            return None
        # In the other pool the shard may have another name.
        key = entry.outputs["manifest"]
        return self._root.at(parent_key(key)), LabelShard.load_file(self._root, key)

    def record_missing(self, label_set: str, shards: Iterable[Shard]) -> None:
        """Records those that are not recorded."""
        recorded = self._ledger.list_digests("label-shard")
        self.record_shards(
            label_set,
            [
                shard
                for shard in shards
                if self._ledger.compute_digest("label-shard", self._shard_inputs(shard)) not in recorded
            ],
        )

    def record_shards(self, label_set: str, shards: Iterable[Shard]) -> None:
        for shard in shards:
            outputs = {"manifest": f"{label_set}/{label_shard_key(shard.name)}"}
            manifest = LabelShard.load_file(self._root, outputs["manifest"])
            files = (*outputs.values(), f"{label_set}/{manifest.name}", f"{label_set}/{histogram_key(manifest.name)}")
            self._ledger.record_entry("label-shard", self._shard_inputs(shard), outputs, 0.0, files=files)

    def _shard_inputs(self, shard: Shard) -> dict[str, Any]:
        reasons = {str(row): reason for row, reason in self._left_out.get(shard.sha256, {}).items()}
        return self._labeling_inputs | {"shard": shard.sha256, "left_out": reasons and digest_json(reasons)}
