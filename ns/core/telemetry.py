"""Every Prometheus metric, declared in one place, and the endpoint that shows them on NS_METRICS_PORT.

Ratios are 0–1, times seconds. The run's name is on nst_run_info only: join with it where a series of one run is wanted. No label has
a value that grows with the data: no image, file or class.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    push_to_gateway,
    start_http_server,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ns import __version__
from ns.core import log

PORT_VARIABLE = "NS_METRICS_PORT"
LINGER_VARIABLE = "NS_METRICS_LINGER_SECONDS"
"""How long a step that is done in a moment, and needs no GPU, stays to be scraped: two scrape intervals do."""
GATEWAY_VARIABLE = "NS_PUSHGATEWAY_URL"
GATEWAY_SECONDS = 10
JOB = "noisy-student"
"""Of what is pushed."""

# A series more for each counter, that nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
SUMMARY = CollectorRegistry()
"""What is pushed at the end of a run."""


class _OptionalGauge(Gauge):
    """A gauge that is not there before it is set: 0 would be a claim, and set off alerts."""

    _is_set = False

    def set(self, value: float) -> None:
        self._is_set = True
        super().set(value)

    def set_function(self, f: Callable[[], float]) -> None:
        self._is_set = True
        super().set_function(f)

    def collect(self) -> Iterable[Metric]:
        return super().collect() if self._is_set else ()


# --- Every step

BUILD = Gauge("nst_build_info", "Version of this package; always 1.", ["version"], registry=REGISTRY)
RUN = Gauge("nst_run_info", "What this process works on; always 1.", ["run_id", "config_digest", "teacher"], registry=REGISTRY)
GENERATION = Gauge("nst_generation", "Generation under way; 0 is the first teacher.", registry=REGISTRY)
STAGE = Gauge("nst_stage_running", "1 while the step is at work, 0 once it is done.", ["stage"], registry=REGISTRY)
STAGE_SECONDS = Histogram(
    "nst_stage_duration_seconds",
    "A step from begin to end.",
    ["stage"],
    buckets=(1, 3, 10, 30, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 3 * 24 * 3600, 7 * 24 * 3600),
    registry=REGISTRY,
)
IMAGES = Counter(
    "nst_images_processed",
    "Images that the step has worked on; in evaluation, each version of one.",
    ["stage"],
    registry=REGISTRY,
)
DATA_WAIT = Counter("nst_data_wait_seconds", "Time that the network waited for images.", registry=REGISTRY)

# --- Training

STEP_SECONDS = Histogram(
    "nst_step_duration_seconds",
    "Training step, waiting for images included.",
    buckets=(0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30),
    registry=REGISTRY,
)
STEPS = _OptionalGauge("nst_training_steps", "Steps of the training under way.", registry=REGISTRY)
STEPS_DONE = _OptionalGauge("nst_training_steps_done", "Steps done of the training under way.", registry=REGISTRY)
LOSS = Gauge("nst_loss", "Mean loss since the point before: total, labeled, pseudo.", ["part"], registry=REGISTRY)
LEARNING_RATE = _OptionalGauge("nst_learning_rate", "Learning rate.", registry=REGISTRY)
ACCURACY = _OptionalGauge("nst_labeled_accuracy_ratio", "Top-1 on the labeled images of training, noised.", registry=REGISTRY)
AGREEMENT = _OptionalGauge(
    "nst_teacher_student_agreement_ratio", "Share of noised images on which student and teacher agree.", registry=REGISTRY
)
CHECKPOINT_AGE = _OptionalGauge(
    "nst_checkpoint_age_seconds", "What a kill would cost: time since the last checkpoint.", registry=REGISTRY
)
CHECKPOINT_INTERVAL = _OptionalGauge(
    "nst_checkpoint_interval_seconds", "Time between checkpoints that is wanted.", registry=REGISTRY
)

# --- Labeling

SHARDS = _OptionalGauge("nst_shards", "Shards that this task has to label.", registry=REGISTRY)
SHARDS_DONE = _OptionalGauge("nst_shards_done", "Shards of this task that are labeled.", registry=REGISTRY)


class _ConfidenceHistogram(Collector):
    """A histogram that takes many images at a time: one by one they would cost more than their labels."""

    BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

    def __init__(self) -> None:
        self._counts = [0] * len(self.BOUNDS)
        self._sum = 0.0
        REGISTRY.register(self)

    def add_counts(self, counts: Sequence[int]) -> None:
        """`counts`: images by confidence, in equal bins from 0 to 1. Their sum is that of the bins' middles."""
        bins, start = len(counts), 0
        for number, bound in enumerate(self.BOUNDS):
            stop = round(bound * bins)
            self._counts[number] += sum(counts[start:stop])
            start = stop
        self._sum += sum((bin_index + 0.5) / bins * count for bin_index, count in enumerate(counts) if count)

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        total, buckets = 0, []
        for bound, count in zip(self.BOUNDS, self._counts, strict=True):
            total += count
            buckets.append((str(bound), float(total)))
        yield HistogramMetricFamily(
            "nst_pseudo_label_confidence",
            "The teacher's confidence in the images labeled by this process.",
            buckets=[*buckets, ("+Inf", float(total))],
            sum_value=self._sum,
        )


CONFIDENCE = _ConfidenceHistogram()

# --- Selection

PSEUDO_LABELS = Counter(
    "nst_pseudo_labels",
    "Images of the pool by what became of them: kept, low_confidence, balanced_out, unreadable, left_out.",
    ["outcome"],
    registry=REGISTRY,
)
COVERAGE = _OptionalGauge(
    "nst_class_coverage_ratio", "Share of classes of which any pseudo-labeled image is kept.", registry=REGISTRY
)
CLASS_IMAGES = Gauge(
    "nst_class_kept_images",
    "Distinct images kept of a class: min, p10, median, max over classes.",
    ["statistic"],
    registry=REGISTRY,
)
CHURN = _OptionalGauge(
    "nst_label_churn_ratio", "Share of labels that differ from those of the generation before.", registry=REGISTRY
)
MAX_CHURN = _OptionalGauge("nst_label_churn_limit_ratio", "The gate's limit on it (gate.max_churn).", registry=REGISTRY)

# --- Evaluation and gate

EVALUATED = Gauge(
    "nst_eval_accuracy_ratio", "Top-1 of the model: heldout, test, and further sets by name.", ["split"], registry=REGISTRY
)
ATTACKED = Gauge("nst_eval_attacked_accuracy_ratio", "Top-1 that an attack leaves.", ["attack"], registry=REGISTRY)
MCE = _OptionalGauge("nst_eval_mce", "Mean corruption error in %, of which the reference has 100.", registry=REGISTRY)
MFR = _OptionalGauge("nst_eval_mfr", "Mean flip rate in %, of which the reference has 100.", registry=REGISTRY)
GAIN = Gauge(
    "nst_loop_gain_ratio", "Top-1 of the student less that of its teacher: value, low, high.", ["bound"], registry=REGISTRY
)
GATE = _OptionalGauge("nst_gate_passed", "1 if the student becomes the teacher, 0 if it is refused.", registry=REGISTRY)
GATE_CONDITION = Gauge(
    "nst_gate_condition_passed", "1 if a condition of the gate holds, 0 if not.", ["condition"], registry=REGISTRY
)

# --- Pushed once, at the end of a run

LAST_SUCCESS = Gauge("nst_last_success_timestamp_seconds", "When the last run ended well, since 1970.", registry=SUMMARY)
LAST_DURATION = Gauge("nst_last_run_duration_seconds", "From its start to its end.", registry=SUMMARY)
LAST_ACCURACY = _OptionalGauge("nst_last_run_accuracy_ratio", "Held-out top-1 of its best model.", registry=SUMMARY)
LAST_GAIN = _OptionalGauge("nst_last_run_gain_ratio", "That less the first teacher's.", registry=SUMMARY)
LAST_PROMOTED = Gauge("nst_last_run_promotions", "Generations whose student became the teacher.", registry=SUMMARY)

_stage = ""


def begin_stage(stage: str, generation: int, run: str, *, config_digest: str = "", teacher: str = "") -> None:
    """From now on this process is at work on a step, and its progress counts as the step's."""
    global _stage
    BUILD.labels(__version__).set(1)
    RUN.clear()
    RUN.labels(run, config_digest, teacher).set(1)
    GENERATION.set(generation)
    STAGE.labels(stage).set(1)
    IMAGES.labels(stage)  # 0 from the first scrape on: a step that never moves must be seen not to
    if not _stage:
        log.add_progress_listener(lambda count: IMAGES.labels(_stage).inc(count))
    _stage = stage


def end_stage(seconds: float, *, linger: bool = False) -> None:
    """The step is done. With `linger` the process stays as long as NS_METRICS_LINGER_SECONDS says: what is set at a step's end would
    be gone before the next scrape."""
    STAGE.labels(_stage).set(0)
    STAGE_SECONDS.labels(_stage).observe(seconds)
    if linger and is_served():
        time.sleep(_read_linger_seconds())


def is_served() -> bool:
    """Whether anybody can look."""
    return bool(os.environ.get(PORT_VARIABLE))


def is_pushed() -> bool:
    """Whether there is a Pushgateway."""
    return bool(os.environ.get(GATEWAY_VARIABLE))


def serve_metrics() -> None:
    """Shows the metrics on the port in NS_METRICS_PORT, for as long as the process lives. A taken port is logged, no more."""
    port = os.environ.get(PORT_VARIABLE, "")
    if not port:
        return
    try:
        start_http_server(int(port), registry=REGISTRY)
    except (OSError, OverflowError, ValueError) as error:
        log.get_logger().warning("no metrics endpoint; work goes on without", port=port, reason=str(error))


def record_checkpoint() -> None:
    """Starts the age of the checkpoint anew."""
    saved_at = time.monotonic()
    CHECKPOINT_AGE.set_function(lambda: time.monotonic() - saved_at)


def record_selection(outcomes: Mapping[str, int], kept_by_class: Sequence[int]) -> None:
    """What a selection made of the pool. `kept`: distinct images kept, by class."""
    for outcome, images in outcomes.items():
        PSEUDO_LABELS.labels(outcome).inc(images)
    ranked = sorted(kept_by_class)
    COVERAGE.set(sum(images > 0 for images in ranked) / len(ranked))
    for statistic, share in (("min", 0.0), ("p10", 0.1), ("median", 0.5), ("max", 1.0)):
        CLASS_IMAGES.labels(statistic).set(ranked[round(share * (len(ranked) - 1))])


def push_run_metrics(pipeline: str) -> None:
    """Leaves SUMMARY with the Pushgateway at NS_PUSHGATEWAY_URL, in the place of what the pipeline left there before. One that does not
    answer is logged, no more."""
    url = os.environ.get(GATEWAY_VARIABLE, "")
    if not url:
        return
    try:
        push_to_gateway(url, JOB, SUMMARY, grouping_key={"pipeline": pipeline}, timeout=GATEWAY_SECONDS)
    except (OSError, ValueError) as error:
        log.get_logger().warning("the run's summary is not with the Pushgateway; all else is", url=url, reason=str(error))


def _read_linger_seconds() -> float:
    text = os.environ.get(LINGER_VARIABLE, "") or "0"
    try:
        seconds = float(text)
        if not 0 <= seconds <= 3600:
            raise ValueError("must be 0 … 3600 seconds")
    except ValueError as error:
        log.get_logger().warning("ends without waiting to be scraped", variable=LINGER_VARIABLE, value=text, reason=str(error))
        return 0
    return seconds
