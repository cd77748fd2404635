"""Our speed against limits and peers, each figure a ratio measured in one run."""

from ns.core.process import OWN_CORES_SPINS, set_openmp_to_sleep

# Before torch is loaded: as the command line has it.
set_openmp_to_sleep(OWN_CORES_SPINS)
