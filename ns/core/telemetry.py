"""All Prometheus metrics, and the endpoint that serves them on NS_METRICS_PORT.

Ratios are in [0, 1], times in seconds. Only nst_run_info has the run's name: join with it to get the series of one run. No label has a
value that grows with the data: no image, file or class.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate

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
ADDRESS_VARIABLE = "NS_METRICS_ADDRESS"
"""Address that the endpoint listens on. If not set: all addresses in a pod, whose network policies say who may connect, and this
machine alone elsewhere."""
LINGER_VARIABLE = "NS_METRICS_LINGER_SECONDS"
"""Seconds that a short stage without a GPU stays alive at its end, to be scraped; two scrape intervals suffice."""
GATEWAY_VARIABLE = "NS_PUSHGATEWAY_URL"
GATEWAY_SECONDS = 10
JOB = "noisy-student"
"""Job label of pushed metrics."""

# Without this, each counter has one more series, which nothing uses.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()
SUMMARY = CollectorRegistry()
"""The metrics that are pushed at the end of a run."""


class _OptionalGauge(Gauge):
    """A gauge that has no value before it is set: a 0 would be a false claim, and trigger alerts."""

    _is_set = False

    def set(self, value: float) -> None:
        self._is_set = True
        super().set(value)

    def set_function(self, f: Callable[[], float]) -> None:
        self._is_set = True
        super().set_function(f)

    def collect(self) -> Iterable[Metric]:
        return super().collect() if self._is_set else ()


_gauge, _optional_gauge = partial(Gauge, registry=REGISTRY), partial(_OptionalGauge, registry=REGISTRY)
_counter, _histogram = partial(Counter, registry=REGISTRY), partial(Histogram, registry=REGISTRY)

# --- Every stage

BUILD = _gauge("nst_build_info", "Version of this package; always 1.", ["version"])
RUN = _gauge("nst_run_info", "What this process works on; always 1.", ["run_id", "config_digest", "teacher"])
GENERATION = _gauge("nst_generation", "Current generation; 0 is the first teacher.")
STAGE = _gauge("nst_stage_running", "1 while the stage works, 0 when it is done.", ["stage"])
STAGE_SECONDS = _histogram(
    "nst_stage_duration_seconds",
    "Duration of a stage.",
    ["stage"],
    buckets=(1, 3, 10, 30, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 3 * 24 * 3600, 7 * 24 * 3600),
)
IMAGES = _counter(
    "nst_images_processed", "Images that the stage has processed; in evaluation, each version of an image.", ["stage"]
)
DATA_WAIT = _counter("nst_data_wait_seconds", "Time for which the network waited for images.")

# --- Training

STEP_SECONDS = _histogram(
    "nst_step_duration_seconds",
    "Duration of a training step, including the wait for images.",
    buckets=(0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30),
)
STEPS = _optional_gauge("nst_training_steps", "Steps of the current training.")
STEPS_DONE = _optional_gauge("nst_training_steps_done", "Finished steps of the current training.")
LOSS = _gauge("nst_loss", "Mean loss since the previous point: total, labeled, pseudo.", ["part"])
LEARNING_RATE = _optional_gauge("nst_learning_rate", "Learning rate.")
ACCURACY = _optional_gauge("nst_labeled_accuracy_ratio", "Top-1 accuracy on the noised labeled images of training.")
AGREEMENT = _optional_gauge("nst_teacher_student_agreement_ratio", "Share of noised images on which student and teacher agree.")
CHECKPOINT_AGE = _optional_gauge("nst_checkpoint_age_seconds", "Time since the last checkpoint, which a kill would cost.")
CHECKPOINT_INTERVAL = _optional_gauge("nst_checkpoint_interval_seconds", "Configured time between checkpoints.")

# --- Labeling

SHARDS = _optional_gauge("nst_shards", "Shards that this task labels.")
SHARDS_DONE = _optional_gauge("nst_shards_done", "Labeled shards of this task.")


class _ConfidenceHistogram(Collector):
    """A histogram that takes many images at a time: observing them singly would take longer than labeling them."""

    BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

    def __init__(self) -> None:
        self._counts = [0] * len(self.BOUNDS)
        self._sum = 0.0
        REGISTRY.register(self)

    def add_counts(self, counts: Sequence[int]) -> None:
        """`counts`: images per confidence bin, of equal bins from 0 to 1. The middles of the bins make the sum."""
        bins, start = len(counts), 0
        for number, bound in enumerate(self.BOUNDS):
            stop = round(bound * bins)
            self._counts[number] += sum(counts[start:stop])
            start = stop
        self._sum += sum((bin_index + 0.5) / bins * count for bin_index, count in enumerate(counts) if count)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        totals = [float(total) for total in accumulate(self._counts)]
        yield HistogramMetricFamily(
            "nst_pseudo_label_confidence",
            "The teacher's confidence in the images that this process labeled.",
            buckets=[*zip(map(str, self.BOUNDS), totals, strict=True), ("+Inf", totals[-1])],
            sum_value=self._sum,
        )

    describe = collect


CONFIDENCE = _ConfidenceHistogram()

# --- Selection

PSEUDO_LABELS = _counter(
    "nst_pseudo_labels",
    "Images of the pool by outcome: kept, low_confidence, unproven, balanced_out, foreign, unreadable, left_out.",
    ["outcome"],
)
COVERAGE = _optional_gauge("nst_class_coverage_ratio", "Share of classes with at least one kept pseudo-labeled image.")
CLASS_IMAGES = _gauge(
    "nst_class_kept_images", "Distinct kept images per class: min, p10, median, max over the classes.", ["statistic"]
)
CHURN = _optional_gauge("nst_label_churn_ratio", "Share of labels that differ from those of the previous generation.")
MAX_CHURN = _optional_gauge("nst_label_churn_limit_ratio", "The gate's limit on the label churn (gate.max_churn).")

# --- Evaluation and gate

EVALUATED = _gauge(
    "nst_eval_accuracy_ratio", "Top-1 accuracy of the model on heldout, test, and further sets by name.", ["split"]
)
BALANCED_ACCURACY = _gauge("nst_eval_balanced_accuracy_ratio", "Mean accuracy of the classes on heldout and test.", ["split"])
ATTACKED = _gauge("nst_eval_attacked_accuracy_ratio", "Top-1 accuracy under an attack.", ["attack"])
MCE = _optional_gauge("nst_eval_mce", "Mean corruption error in %; the reference has 100.")
MFR = _optional_gauge("nst_eval_mfr", "Mean flip rate in %; the reference has 100.")
GAIN = _gauge("nst_loop_gain_ratio", "Top-1 accuracy of the student minus that of its teacher: value, low, high.", ["bound"])
GATE = _optional_gauge("nst_gate_passed", "1 if the gate promoted the student, 0 if it refused it.")
GATE_CONDITION = _gauge("nst_gate_condition_passed", "1 if a condition of the gate holds, 0 if not.", ["condition"])
GATE_TRIES = _optional_gauge("nst_gate_tries", "Students that were compared with a teacher on the same held-out images so far.")
FAMILY_ERROR = _optional_gauge(
    "nst_gate_family_error_ratio",
    "Upper bound of the probability that any of these tries accepted a student without the required gain.",
)

# --- Pushed once, at the end of a run

LAST_SUCCESS = Gauge(
    "nst_last_success_timestamp_seconds", "Time at which the last run succeeded, since 1970.", registry=SUMMARY
)
LAST_DURATION = Gauge("nst_last_run_duration_seconds", "Duration of the last run.", registry=SUMMARY)
LAST_ACCURACY = _OptionalGauge(
    "nst_last_run_accuracy_ratio", "Held-out top-1 accuracy of the best model of the last run.", registry=SUMMARY
)
LAST_GAIN = _OptionalGauge("nst_last_run_gain_ratio", "Gain of the last run over its first teacher.", registry=SUMMARY)
LAST_PROMOTED = Gauge("nst_last_run_promotions", "Promoted generations of the last run.", registry=SUMMARY)

_stage = ""
_served_port = ""
"""Port that this process serves the metrics on."""


def begin_stage(stage: str, generation: int, run: str, *, config_digest: str = "", teacher: str = "") -> None:
    """Begins a stage: from now on its progress counts in nst_images_processed."""
    global _stage
    BUILD.labels(__version__).set(1)
    RUN.clear()
    RUN.labels(run, config_digest, teacher).set(1)
    GENERATION.set(generation)
    STAGE.labels(stage).set(1)
    IMAGES.labels(stage)  # 0 from the first scrape on: alerts must see a stage that makes no progress
    if not _stage:
        log.add_progress_listener(lambda count: IMAGES.labels(_stage).inc(count))
    _stage = stage


def end_stage(seconds: float, *, linger: bool = False) -> None:
    """Ends the stage. With `linger` the process stays for NS_METRICS_LINGER_SECONDS: what is set at a stage's end would be gone before
    the next scrape."""
    STAGE.labels(_stage).set(0)
    STAGE_SECONDS.labels(_stage).observe(seconds)
    if linger and is_served():
        time.sleep(_read_linger_seconds())


def serve_waiting() -> None:
    """Serves the metrics of a stage that waits while another pod does its work and serves that: it is up, but not at work."""
    STAGE.labels(_stage).set(0)
    serve_metrics()


def is_served() -> bool:
    """Whether the metrics endpoint is configured."""
    return bool(os.environ.get(PORT_VARIABLE))


def is_pushed() -> bool:
    """Whether a Pushgateway is configured."""
    return bool(os.environ.get(GATEWAY_VARIABLE))


def serve_metrics() -> None:
    """Serves the metrics on NS_METRICS_PORT while the process lives, however often it is called. A port that cannot be used is only
    logged."""
    global _served_port
    port = os.environ.get(PORT_VARIABLE, "")
    if not port or port == _served_port:
        return
    try:
        start_http_server(int(port), addr=_choose_address(), registry=REGISTRY)
        _served_port = port
    except (OSError, OverflowError, ValueError) as error:
        log.get_logger().warning("no metrics endpoint; work continues without it", port=port, reason=str(error))


def _choose_address() -> str:
    is_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    return os.environ.get(ADDRESS_VARIABLE) or ("0.0.0.0" if is_pod else "127.0.0.1")


def record_checkpoint() -> None:
    """Restarts the age of the checkpoint."""
    saved_at = time.monotonic()
    CHECKPOINT_AGE.set_function(lambda: time.monotonic() - saved_at)


def record_selection(outcomes: Mapping[str, int], kept_by_class: Sequence[int]) -> None:
    """Counts the outcomes of a selection. `kept_by_class`: distinct kept images of each class."""
    for outcome, images in outcomes.items():
        PSEUDO_LABELS.labels(outcome).inc(images)
    ranked = sorted(kept_by_class)
    COVERAGE.set(sum(images > 0 for images in ranked) / len(ranked))
    for statistic, share in (("min", 0.0), ("p10", 0.1), ("median", 0.5), ("max", 1.0)):
        CLASS_IMAGES.labels(statistic).set(ranked[round(share * (len(ranked) - 1))])


def push_run_metrics(pipeline: str) -> None:
    """Pushes SUMMARY to the Pushgateway at NS_PUSHGATEWAY_URL, where it replaces what this pipeline pushed before. A failure is only
    logged."""
    url = os.environ.get(GATEWAY_VARIABLE, "")
    if not url:
        return
    try:
        push_to_gateway(url, JOB, SUMMARY, grouping_key={"pipeline": pipeline}, timeout=GATEWAY_SECONDS)
    except (OSError, ValueError) as error:
        log.get_logger().warning(
            "cannot push the run's summary to the Pushgateway; the run is complete", url=url, reason=str(error)
        )


def _read_linger_seconds() -> float:
    text = os.environ.get(LINGER_VARIABLE) or "0"
    with suppress(ValueError):
        if 0 <= float(text) <= 3600:
            return float(text)
    message = "invalid time to linger, must be 0 to 3600 seconds: ends without waiting for a scrape"
    log.get_logger().warning(message, variable=LINGER_VARIABLE, value=text)
    return 0
