"""Every Prometheus metric, declared in one place, and the endpoint that shows them on NS_METRICS_PORT.

Ratios are 0–1, times seconds. The run's name is on nst_run_info only: join with it where a series of one run is wanted.
"""

import os
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from ns import __version__, log

PORT_VARIABLE = "NS_METRICS_PORT"

# A series more for each counter, that nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry()

BUILD = Gauge("nst_build_info", "Version of this package; always 1.", ["version"], registry=REGISTRY)
RUN = Gauge("nst_run_info", "What this process works on; always 1.", ["run_id", "config_digest", "teacher"], registry=REGISTRY)
GENERATION = Gauge("nst_iteration", "Generation under way; 0 is the first teacher.", registry=REGISTRY)
IMAGES = Counter("nst_images_processed", "Images that went through the network.", ["stage"], registry=REGISTRY)
STEP_SECONDS = Histogram(
    "nst_step_duration_seconds",
    "Training step, waiting for images included.",
    buckets=(0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30),
    registry=REGISTRY,
)
DATA_WAIT = Counter("nst_data_wait_seconds", "Time that training waited for images.", registry=REGISTRY)
STEPS = Gauge("nst_training_steps", "Steps of the training under way.", registry=REGISTRY)
STEPS_DONE = Gauge("nst_training_steps_done", "Steps done of the training under way.", registry=REGISTRY)
LOSS = Gauge("nst_loss", "Mean loss since the point before: total, labelled, pseudo.", ["part"], registry=REGISTRY)
LEARNING_RATE = Gauge("nst_learning_rate", "Learning rate.", registry=REGISTRY)
ACCURACY = Gauge("nst_labelled_accuracy_ratio", "Top-1 on the labelled images of training, noised.", registry=REGISTRY)
AGREEMENT = Gauge(
    "nst_teacher_student_agreement_ratio", "Share of noised images on which student and teacher agree.", registry=REGISTRY
)
CHECKPOINT_AGE = Gauge(
    "nst_checkpoint_age_seconds", "What a kill would cost: time since the last checkpoint.", registry=REGISTRY
)


def serve() -> None:
    """Shows the metrics on the port in NS_METRICS_PORT, for as long as the process lives. A taken port is logged, no more."""
    port = os.environ.get(PORT_VARIABLE, "")
    if not port:
        return
    BUILD.labels(__version__).set(1)
    try:
        start_http_server(int(port), registry=REGISTRY)
    except (OSError, OverflowError, ValueError) as error:
        log.get().warning("no metrics endpoint; work goes on without", port=port, reason=str(error))


def checkpoint_saved() -> None:
    """Starts the age of the checkpoint anew."""
    at = time.monotonic()
    CHECKPOINT_AGE.set_function(lambda: time.monotonic() - at)
