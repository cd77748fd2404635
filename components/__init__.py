"""KFP components: typed inputs and outputs, and a call into `ns.stages.steps`. What they do is written there."""

from ns import __version__

WORKER_IMAGE = f"noisy-student/worker:{__version__}"
"""The image that components run in; `make images` builds it. It holds the `ns` package and no compiler."""
TOOLS_IMAGE = f"noisy-student/tools:{__version__}"
"""The worker with DVC, git and Kubeflow's SDK."""
