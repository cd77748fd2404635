"""Our speed against limits and peers, each figure a ratio measured in one run."""

import ns  # noqa: F401  # before torch: it says how OpenMP's threads wait
